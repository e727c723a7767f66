"""Which tiles a kernel is compiled with: a small table, and rules that depend on shapes alone.

Nothing is timed at run time, so the same call takes the same tiles, and gives the same bits, in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, and how the compiler lays it out."""

    rows: int
    keys: int
    warps: int
    stages: int


# By the larger of the padded head dims. Rows are chosen so that nothing spills with every statistic on.
HALF = {
    16: Tiles(128, 128, 4, 3),
    32: Tiles(128, 128, 4, 3),
    64: Tiles(128, 128, 8, 3),
    128: Tiles(128, 128, 8, 2),
    256: Tiles(128, 64, 8, 2),
}
FLOAT = {
    16: Tiles(64, 64, 4, 2),
    32: Tiles(64, 64, 4, 2),
    64: Tiles(64, 64, 4, 2),
    128: Tiles(64, 32, 4, 2),
    256: Tiles(32, 32, 4, 2),
}
# Interpreted kernels are slow, and small tiles walk through more of their loops.
INTERPRETED = Tiles(32, 32, 4, 1)
DECODING_ROWS = 16
MOST_PARTS = 64


def tiles_for(pad: int, dtype: torch.dtype, rows: int, topk: int) -> Tiles:
    """Tiles for head dims padded to `pad`, `rows` rows a head (or group of heads) and a top `topk`."""
    tiles = INTERPRETED if triton.knobs.runtime.interpret else (FLOAT if dtype == torch.float32 else HALF)[pad]
    if topk > tiles.keys // 2:
        # Classes must be more than k.
        tiles = Tiles(tiles.rows // 2, 2 * tiles.keys, tiles.warps, tiles.stages)
    if rows <= DECODING_ROWS:
        return Tiles(DECODING_ROWS, tiles.keys, 4, tiles.stages)
    if rows <= tiles.rows // 2:
        return Tiles(max(16, tiles.rows // 2), tiles.keys, 4, tiles.stages)
    return tiles


def selecting_tiles(tiles: Tiles) -> Tiles:
    """Tiles of the pass that orders lists of candidates: few rows, for a list is long."""
    return Tiles(16, max(64, tiles.keys), 4, 1)


def parts_for(programs: int, keys: int, tiles: Tiles) -> int:
    """Parts that the keys are split into, so that few rows fill a card; a part has at least four tiles."""
    wanted = -(-512 // max(programs, 1))
    return max(1, min(wanted, keys // (4 * tiles.keys), MOST_PARTS))


def classes_for(topk: int, tile_keys: int) -> int:
    """Classes of keys whose maxima bound the k-th largest score: twice k at least, as far as a tile has keys."""
    return min(max(32, 1 << (2 * topk - 1).bit_length()), tile_keys)


def capacity_for(topk: int) -> int:
    """Tiles in a row's list of candidates; about 1.4 k keys are expected to reach the bound."""
    return max(32, 4 * topk)


def most_listed(topk: int) -> int:
    """Keys of a row that are scored one by one; where more reach the bound, all of them are walked."""
    return 64 + 8 * topk
