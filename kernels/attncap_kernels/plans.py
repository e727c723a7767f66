"""Which tiles a kernel is compiled with: a small table, and rules that depend on shapes alone.

Nothing is timed at run time, so the same call takes the same tiles, and gives the same bits, in every run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile, and how the compiler lays it out.

    registers: the most that a thread may take on an NVIDIA GPU. Left to itself (None), ptxas takes as few as let one
    more program run beside the others, and spills where some are lacking; told a number, it takes what the code needs.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As a launch takes it."""
        if torch.version.hip:
            # An AMD warp has 64 lanes, and 8 of them would leave each half of the registers.
            return {"num_warps": min(self.warps, 4), "num_stages": self.stages}
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# By the larger of the padded head dims. A larger tile has fewer instructions for each score, until registers spill
# (benchmarks/gate shows both). Hopper multiplies matrices without holding them in registers. Generations are those of
# `generation`: 0 is AMD's.
HALF_ON_HOPPER = {
    16: Tiles(128, 128, 8, 3),
    32: Tiles(128, 128, 8, 3),
    64: Tiles(128, 128, 8, 3),
    128: Tiles(128, 64, 8, 3),
    256: Tiles(64, 32, 8, 2),
}
HALF = {pad: Tiles(128, 32, 8, 3) for pad in (16, 32, 64, 128)} | {256: Tiles(32, 32, 4, 2)}
HALF_OF_GENERATION = {9: HALF_ON_HOPPER, 10: HALF | {256: HALF_ON_HOPPER[256]}}
FLOAT = {
    16: Tiles(64, 32, 4, 2, 255),
    32: Tiles(64, 32, 4, 2, 255),
    64: Tiles(32, 32, 8, 2, 255),
    128: Tiles(32, 32, 8, 2, 255),
    256: Tiles(16, 32, 8, 1, 255),
}
FLOAT_OF_GENERATION = {0: FLOAT | {64: Tiles(64, 32, 4, 2)}}
# With tags or features, which take registers for each key of a tile.
HALF_WITH_TAGS = {pad: Tiles(128, 32, 8, 3) for pad in (16, 32, 64, 128)} | {256: Tiles(32, 32, 8, 3)}
FLOAT_WITH_TAGS = {16: Tiles(32, 32, 4, 2), 32: Tiles(32, 32, 4, 2), 64: Tiles(32, 32, 8, 2, 255)} | {
    128: Tiles(16, 32, 4, 2),
    256: Tiles(16, 32, 8, 1, 255),
}
# Of a backward, whose programs own rows (dq, levels, masks) or keys (dk and dv, features).
HALF_ROWS_ON_HOPPER = {pad: Tiles(128, 64, 8, 3) for pad in (16, 32, 64, 128)} | {256: Tiles(64, 32, 8, 2)}
HALF_ROWS = {pad: Tiles(64, 32, 4, 3) for pad in (16, 32, 64, 128)} | {256: Tiles(32, 32, 8, 2)}
HALF_KEYS_ON_HOPPER = {pad: Tiles(64, 128, 8, 3) for pad in (16, 32, 64)} | {
    128: Tiles(32, 128, 8, 3),
    256: Tiles(32, 32, 8, 2),
}
HALF_KEYS = {pad: Tiles(32, 64, 4, 2) for pad in (16, 32, 64, 128)} | {256: Tiles(32, 32, 8, 2)}
FLOAT_BACKWARD = {
    16: Tiles(32, 32, 4, 2),
    32: Tiles(32, 32, 4, 2),
    64: Tiles(32, 32, 8, 2, 255),
    128: Tiles(16, 32, 8, 2, 255),
    256: Tiles(16, 16, 8, 1),
}
# With statistics that take registers or loops for each key of a tile. A loop in a tile reads nothing ahead, so that
# there is one stage.
HALF_ROWS_HEAVY = {pad: Tiles(16, 32, 4, 1) for pad in (16, 32, 64, 128)} | {256: Tiles(16, 64, 8, 1)}
HALF_KEYS_HEAVY = {16: Tiles(16, 32, 4, 1), 32: Tiles(16, 32, 4, 1)} | {
    pad: Tiles(32, 32, 8, 1) for pad in (64, 128, 256)
}
LATER_REGISTERS = 128  # in passes that hold no output: two programs of 8 warps, or four of 4, on a multiprocessor
WIDE_BYTES = 512  # of a row that takes 8 warps, however few rows there are
STEP_D = 32  # columns of a product of float32 at a time
KEYS_WITH_MASK = 64  # masks and softcap take registers too
# Whether kernels run on the CPU (TRITON_INTERPRET=1): decided once, as they are when their modules are imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Interpreted kernels are slow, and small tiles walk through more of their loops.
INTERPRETED_TILES = Tiles(32, 32, 4, 1)
DECODING_ROWS = 16
MOST_PARTS = 64
ENOUGH_PROGRAMS = 128  # about as many as a large card has multiprocessors


def generation() -> int:
    """The compute capability, less its minor, that kernels are compiled for; 0 where it is no NVIDIA GPU."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch // 10 if target.backend == "cuda" else 0


def tiles_for(
    pad: int,
    dtype: torch.dtype,
    rows: int,
    topk: int = 0,
    *,
    tags: bool = False,
    masked: bool = False,
    later: bool = False,
) -> Tiles:
    """Tiles for head dims padded to `pad`, `rows` rows a head (or group of heads) and a top `topk`.

    tags: there are tags or features; masked: there is an attn_mask or a softcap; later: of a pass after the forward.
    """
    precise, decoding = dtype == torch.float32, rows <= DECODING_ROWS
    wide = pad * dtype.itemsize >= WIDE_BYTES
    if precise:
        tiles = (FLOAT_WITH_TAGS if tags else FLOAT_OF_GENERATION.get(generation(), FLOAT))[pad]
    else:
        tiles = (HALF_WITH_TAGS if tags else HALF_OF_GENERATION.get(generation(), HALF))[pad]
    if INTERPRETED:
        tiles = INTERPRETED_TILES
    if masked:
        tiles = replace(tiles, keys=min(tiles.keys, KEYS_WITH_MASK))
    while topk > tiles.keys // 2:
        # There must be more classes of keys than k.
        tiles = replace(tiles, rows=max(16, tiles.rows // 2), keys=2 * tiles.keys, stages=2)
    if decoding:
        tiles = Tiles(DECODING_ROWS, tiles.keys, 8 if wide else 4, tiles.stages, 255 if precise else None)
    elif rows <= tiles.rows // 2:
        tiles = replace(tiles, rows=max(16, tiles.rows // 2), warps=4)
    if later and (precise or decoding):
        tiles = replace(tiles, registers=LATER_REGISTERS if tiles.warps == 8 else None)
    return tiles


def backward_tiles(
    pad: int, dtype: torch.dtype, *, of_keys: bool = False, masked: bool = False, few: bool = False, heavy: bool = False
) -> Tiles:
    """Tiles of a backward's kernels.

    of_keys: of those whose programs own keys; masked: there is an attn_mask or a softcap; few: statistics have
    derivatives; heavy: some are of those that HALF_ROWS_HEAVY is for.
    """
    if INTERPRETED:
        return INTERPRETED_TILES
    if dtype == torch.float32:
        return FLOAT_BACKWARD[pad]
    if heavy:
        return (HALF_KEYS_HEAVY if of_keys else HALF_ROWS_HEAVY)[pad]
    large = generation() == 9 and not masked
    if not of_keys:
        return (HALF_ROWS_ON_HOPPER if large else HALF_ROWS)[pad]
    tiles = (HALF_KEYS_ON_HOPPER if large else HALF_KEYS)[pad]
    # A program that owns keys holds what each row's statistics have for every row of a tile.
    return replace(tiles, rows=min(tiles.rows, 32)) if few else tiles


def selecting_tiles(tiles: Tiles, pad: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the pass that orders lists of candidates: few rows, for a list is long."""
    keys = max(64, tiles.keys)
    if dtype == torch.float32:
        return Tiles(16, keys, 8, 1, LATER_REGISTERS)
    return Tiles(16, keys, 4, 1, 168 if pad == 256 else LATER_REGISTERS)


def parts_for(programs: int, keys: int, tiles: Tiles) -> int:
    """Parts that the keys are split into, so that few rows fill a card; a part has at least four tiles."""
    if programs >= ENOUGH_PROGRAMS:
        return 1
    wanted = -(-4 * ENOUGH_PROGRAMS // max(programs, 1))
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
