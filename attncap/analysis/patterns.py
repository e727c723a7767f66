"""Shapes of a head's attention: one fixed offset, Kovaleva's five patterns, copying from a needle.

Every label comes with the numbers it was given by and the thresholds they were held to.

B sequences   H heads   Q query rows   N tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attncap.adapters.served import ServedCall
from attncap.analysis.batches import run
from attncap.analysis.blocks import by_layer_and_head
from attncap.analysis.roles import HALF, means_by_stat
from attncap.capture import Capture
from attncap.types import HeadStats, StatSpec

if TYPE_CHECKING:
    import pyarrow

POSITIONAL_THRESHOLD = 0.9
"""Voita et al. 2019: a head is positional when its maximum is at one relative position in at least 90 % of rows."""

RETRIEVAL_THRESHOLD = 0.1
"""Wu et al. 2024: a head that copies at least a tenth of the needle, on average over tests, is a retrieval head."""

BLOCK_THRESHOLD, PART_THRESHOLD = 0.9, 0.2
"""Of mass on the own segment, and of each part of a mixed pattern; choices of this project. Kovaleva et al. 2019 have
no thresholds: they train a network on pictures of maps."""

VERTICAL, DIAGONAL, BOTH = "vertical", "diagonal", "vertical + diagonal"
BLOCK, HETEROGENEOUS = "block", "heterogeneous"

_NEAR = ("offset_mass[-1]", "diagonal_mass", "offset_mass[1]")


@dataclass(frozen=True)
class PositionalHead:
    """The offset (key less query) at which a head's largest probability is in most rows, and the share of those rows.

    Attributes:
        rows: how many rows were looked at.
        threshold: the share from which on the head is positional.
    """

    module: str
    head: int
    offset: int
    share: float
    rows: int
    threshold: float

    @property
    def holds(self) -> bool:
        """Whether the head is positional."""
        return self.share >= self.threshold


@dataclass(frozen=True)
class HeadPattern:
    """Which of Kovaleva's five patterns a head has.

    Attributes:
        numbers: the masses it was told by, "vertical", "diagonal" and, where there are two segments, "block".
        rule: what decided, "vertical 0.71 > 0.50".
    """

    layer: int
    module: str
    head: int
    pattern: str
    numbers: Mapping[str, float]
    rule: str


@dataclass(frozen=True)
class Needle:
    """A long context, a question, and the answer a model generated from a needle in the context.

    Attributes:
        tokens: (N,) the prompt and what the model generated after it.
        start, stop: the needle is tokens start .. stop - 1.
        answer: index of the first generated token.
    """

    tokens: Tensor
    start: int
    stop: int
    answer: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tensor) or self.tokens.dim() != 1:
            got = tuple(self.tokens.shape) if isinstance(self.tokens, Tensor) else type(self.tokens).__name__
            raise ValueError(f"tokens: expected a tensor (N,) of token ids, got {got}")
        if not 0 <= self.start < self.stop <= self.answer < len(self.tokens):
            raise ValueError(
                f"start, stop, answer: expected 0 <= start < stop <= answer < {len(self.tokens)}, got "
                f"{self.start}, {self.stop}, {self.answer}"
            )


def positional_heads(
    model: nn.Module, batches: Iterable[Any], *, threshold: float = POSITIONAL_THRESHOLD
) -> tuple[PositionalHead, ...]:
    """Every head's most common offset of its row maximum, and whether it makes the head positional (Voita et al. 2019).

    Ties go to the key with the smaller index, and of two offsets that are equally common to the nearer one. Rows of
    padding do not count.

    Args:
        model: what `capture` serves; run under no_grad.
        batches: each a mapping of keyword arguments or the only argument.

    Returns:
        One entry a head, by layer and head, positional or not.

    Raises:
        ValueError: no batches.
    """
    counts: dict[str, list[dict[int, int]]] = {}

    def watch(name: str, call: ServedCall, _out: Tensor, stats: HeadStats) -> None:
        index, own = _largest(call, stats)
        found = counts.setdefault(name, [{} for _ in range(index.shape[1])])
        for head, by_offset in enumerate(found):
            key = index[:, head]
            offsets, number = torch.unique((key - own)[key >= 0], return_counts=True)
            for offset, count in zip(offsets.tolist(), number.tolist(), strict=True):
                by_offset[offset] = by_offset.get(offset, 0) + count

    _run_all(model, batches, watch)
    if not counts:
        raise ValueError("batches: expected at least one, got none")
    return tuple(
        _positional(module, head, by_offset, threshold)
        for module, heads in counts.items()
        for head, by_offset in enumerate(heads)
        if by_offset
    )


def find_patterns(heads: pyarrow.Table) -> tuple[HeadPattern, ...]:
    """The pattern of every head of a run, by rule, after the five classes of Kovaleva et al. 2019::

        vertical = mass on special tokens (the tag ``special_tokens``; without it the first ones, ``sink_mass``)
        diagonal = mass on the token before, the token itself and the one after
        block    = mass on the token's own segment (the tag ``segment``), where texts have two

        both > 0.2 and together > 0.5    vertical + diagonal
        vertical > 0.5                   vertical
        diagonal > 0.5                   diagonal
        block > 0.9                      block
        otherwise                        heterogeneous

    Args:
        heads: the table of ``heads.parquet``, with ``offset_mass[-1]``, ``offset_mass[1]`` and ``diagonal_mass`` of
            diagonal 0; several groups are pooled.

    Raises:
        ValueError: a statistic that is needed is not in the table.
    """
    means = {
        stat: {(head.layer, head.module, head.head): head.mean for head in found}
        for stat, found in means_by_stat(heads).items()
    }
    missing = [stat for stat in _NEAR if stat not in means]
    column = next((stat for stat in ("special_tokens", "sink_mass") if stat in means), None)
    if column is None:
        missing.append("special_tokens or sink_mass")
    if missing or column is None:
        raise ValueError(f"heads: expected the statistics {', '.join(missing)} beside {', '.join(means) or 'none'}")
    segment = means.get("segment", {})
    # Where all texts are of one segment, every head gives it everything.
    two_segments = any(mean < 0.999 for mean in segment.values())
    found = []
    for place in sorted(means[column]):
        layer, module, head = place
        numbers = {VERTICAL: means[column][place], DIAGONAL: sum(means[stat][place] for stat in _NEAR)}
        if two_segments and place in segment:
            numbers[BLOCK] = segment[place]
        found.append(HeadPattern(layer, module, head, *_pattern(numbers)))
    return tuple(found)


def retrieval_scores(model: nn.Module, needles: Iterable[Needle]) -> Tensor:
    """How much of a needle each head copies while the model answers from it (Wu et al. 2024).

    At the step that generates token w a head copies it where its most attended key lies in the needle and holds w. With
    g_h the set of tokens that head h copied and k that of the needle's tokens::

        score_h = |g_h and k| / |k|    mean over needles

    The steps are read from one forward over prompt and answer, whose rows are those of decoding step by step. Heads
    from 0.1 on (`RETRIEVAL_THRESHOLD`) are called retrieval heads.

    Args:
        model: a causal model that takes token ids (as ``input_ids`` where it is a Transformers model).
        needles: tests; ``tokens`` of `model.generate` with the prompt in front, for instance.

    Returns:
        (layers, heads) float64, from 0 to 1; NaN where a layer has fewer heads.

    Raises:
        ValueError: no needles.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    largest: dict[str, Tensor] = {}

    def watch(name: str, call: ServedCall, _out: Tensor, stats: HeadStats) -> None:
        largest[name] = _largest(call, stats)[0][0]

    def batches() -> Iterator[Any]:
        nonlocal count
        for needle in needles:
            yield needle.tokens[None] if not hasattr(model, "config") else {"input_ids": needle.tokens[None]}
            for name, index in largest.items():
                scores = _copied(index.cpu(), needle)
                sums[name] = sums.get(name, torch.zeros(len(scores), dtype=torch.float64)) + scores
            count += 1

    _run_all(model, batches(), watch)
    if not count:
        raise ValueError("needles: expected at least one, got none")
    return by_layer_and_head([total / count for total in sums.values()])


def _run_all(model: nn.Module, batches: Iterable[Any], watch: Any) -> None:
    spec = StatSpec(entropy=False, max=False, sink=0, diagonal=None, topk=1)
    with torch.no_grad(), Capture(model, spec, watch=watch):
        for batch in batches:
            run(model, batch)


def _largest(call: ServedCall, stats: HeadStats) -> tuple[Tensor, Tensor]:
    """(the key (B, H, Q) of each row's largest probability, -1 in rows that do not count; the row's own key (Q,))."""
    assert stats.topk_index is not None
    index = stats.topk_index[..., 0].long()
    own = torch.arange(index.shape[-1], device=index.device) + call.query_offset
    return index, own


def _positional(module: str, head: int, by_offset: Mapping[int, int], threshold: float) -> PositionalHead:
    rows = sum(by_offset.values())
    offset, count = min(by_offset.items(), key=lambda entry: (-entry[1], abs(entry[0]), entry[0]))
    return PositionalHead(module, head, offset, count / rows, rows, threshold)


def _pattern(numbers: Mapping[str, float]) -> tuple[str, Mapping[str, float], str]:
    vertical, diagonal, block = numbers[VERTICAL], numbers[DIAGONAL], numbers.get(BLOCK, 0.0)
    if min(vertical, diagonal) > PART_THRESHOLD and vertical + diagonal > HALF:
        rule = f"vertical {vertical:.2f} and diagonal {diagonal:.2f} > {PART_THRESHOLD:.2f}, together > {HALF:.2f}"
        return BOTH, numbers, rule
    for name, number, threshold in (
        (VERTICAL, vertical, HALF),
        (DIAGONAL, diagonal, HALF),
        (BLOCK, block, BLOCK_THRESHOLD),
    ):
        if number > threshold:
            return name, numbers, f"{name} {number:.2f} > {threshold:.2f}"
    given: Sequence[str] = [f"{name} {number:.2f}" for name, number in numbers.items()]
    return HETEROGENEOUS, numbers, f"none of {', '.join(given)} is beyond its threshold"


def _copied(index_HQ: Tensor, needle: Needle) -> Tensor:
    """(H,) float64: the share of the needle's different tokens that each head copied."""
    tokens = needle.tokens.cpu()
    steps = torch.arange(needle.answer - 1, len(tokens) - 1)
    key, generated = index_HQ[:, steps], tokens[steps + 1]
    copies = (key >= needle.start) & (key < needle.stop) & (tokens[key.clamp_min(0)] == generated)
    wanted = set(tokens[needle.start : needle.stop].tolist())
    found = torch.stack([(copies & (generated == token)).any(-1) for token in wanted])
    return found.double().mean(0)
