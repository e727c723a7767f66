"""What each statistic is called on the page, its unit, and one or two sentences a newcomer can follow."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PROBABILITY = "probability"


@dataclass(frozen=True)
class Statistic:
    """How a statistic of heads.parquet is presented.

    Attributes:
        title: short name for a heading.
        unit: nats, probability, tokens, ...
        explanation: what a value means; plain text.
        from_zero: whether its colours start at 0 (masses) or at its smallest value.
        measure: the number that tells heads apart, shown first.
    """

    title: str
    unit: str
    explanation: str
    from_zero: bool = True
    measure: str = "mean"


_FIXED = {
    "relative_entropy": Statistic(
        "Breadth",
        "share",
        "Relative entropy: entropy divided by that of uniform attention over the keys a row sees. 1 looks everywhere "
        "alike, 0 looks at a single token. Rows that see one key are left out.",
        from_zero=False,
    ),
    "entropy": Statistic(
        "Entropy",
        "nats",
        "How spread out attention is. exp(entropy) is the number of tokens that uniform attention of the same "
        "breadth would look at; it grows with the length of the text.",
        from_zero=False,
    ),
    "max_prob": Statistic(
        "Largest probability",
        PROBABILITY,
        "Probability of the one token that a row looks at most. Voita 2019 calls its mean the head's confidence.",
    ),
    "collision": Statistic(
        "Collision",
        PROBABILITY,
        "Sum of squared probabilities. Its inverse is the effective number of tokens a row looks at.",
    ),
    "distance": Statistic(
        "Distance",
        "tokens",
        "Mean distance, in either direction, between a token and those it looks at.",
    ),
    "null_mass": Statistic(
        "Attention sink logit",
        PROBABILITY,
        "Probability that goes to no token at all, through the head's learned sink logit.",
    ),
    "received_mass": Statistic(
        "Received attention",
        "sum of probabilities",
        "Attention that a token receives from all rows together. Its mean is the same for every head; its standard "
        "deviation, shown first, is large where few tokens receive most of it.",
        measure="std",
    ),
    "max_logit": Statistic(
        "Largest score",
        "score",
        "Largest attention score of a row before the softmax. Scores in the hundreds precede instability in training.",
        from_zero=False,
    ),
    "lse": Statistic(
        "Log-sum-exp",
        "nats",
        "Logarithm of the softmax's normaliser; mostly useful for checking and for merging results.",
        from_zero=False,
    ),
}

_TAGS = {
    "induction": (
        "Induction",
        "Attention on tokens that come right after an occurrence of the same token: what a head needs to continue a "
        "repeated passage (Olsson 2022). In a model that sees ahead this includes the next token, which the "
        "role of that name subtracts.",
    ),
    "duplicate": (
        "Duplicate token",
        "Attention on occurrences of the same token, the token itself included (Wang 2023).",
    ),
    "segment": ("Same segment", "Attention on tokens of the same segment (Kovaleva 2019's block pattern)."),
    "special_tokens": (
        "Special tokens",
        "Attention on the tokenizer's special tokens, such as [CLS] and [SEP] (Clark 2019).",
    ),
}

_OFFSET = re.compile(r"offset_mass\[(-?\d+)\]")

_LARGEST = "_largest"

_ORDER = (
    "offset_mass", "diagonal_mass", "sink_mass", "tag", "relative_entropy", "entropy", "max_prob", "topk_mass",
    "distance", "collision", "null_mass", "feature", "received_mass", "max_logit", "lse",
)  # fmt: skip


def describe(stat: str, spec: Mapping[str, Any], tags: Collection[str] = ()) -> Statistic:
    """How to present `stat` of a run made with `spec` and `tags`; what is unknown is a feature under its own name."""
    if stat in _FIXED:
        return _FIXED[stat]
    if stat.endswith(_LARGEST) and stat.removesuffix(_LARGEST) in _FIXED:
        of = _FIXED[stat.removesuffix(_LARGEST)]
        text = f"Largest value in a document. {of.explanation}"
        return Statistic(f"{of.title}, largest of a document", of.unit, text, of.from_zero)
    if match := _OFFSET.fullmatch(stat):
        return _offset(int(match[1]))
    if stat == "diagonal_mass":
        return _diagonal(int(spec.get("diagonal") or 0))
    if stat == "sink_mass":
        return _sink(int(spec.get("sink", 4)))
    if stat == "topk_mass":
        k = int(spec.get("topk", 8))
        return Statistic(f"Top {k}", PROBABILITY, f"Attention on the {k} tokens a row looks at most, together.")
    if stat in tags:
        title, explanation = _TAGS.get(stat, (stat, f"Attention on tokens whose tag {stat!r} matches that of the row."))
        return Statistic(title, PROBABILITY, explanation)
    return Statistic(stat, "unit of the feature", f"Mean of the feature {stat!r} under attention.", from_zero=False)


def display_rank(stat: str, tags: Collection[str] = ()) -> tuple[int, int, str]:
    """Sort key: where attention goes first, how broad it is after that, what serves checking last."""
    if match := _OFFSET.fullmatch(stat):
        offset = int(match[1])
        return (0, 2 * abs(offset) + (offset > 0), stat)
    family = stat if stat in _ORDER else "tag" if stat in tags else "feature"
    return (_ORDER.index(family), 0, stat)


def _offset(offset: int) -> Statistic:
    if offset == 0:
        return Statistic("Self", PROBABILITY, "Attention on the token itself.")
    near = {-1: "Previous token", 1: "Next token"}
    direction = "before" if offset < 0 else "after"
    title = near.get(offset, f"{abs(offset)} tokens {direction}")
    place = f"right {direction}" if abs(offset) == 1 else f"{abs(offset)} places {direction}"
    return Statistic(title, PROBABILITY, f"Attention on the token {place} the one that looks.")


def _diagonal(width: int) -> Statistic:
    if width == 0:
        return Statistic("Self", PROBABILITY, "Attention on the token itself.")
    return Statistic(f"Within {width}", PROBABILITY, f"Attention on the token itself and the {width} on either side.")


def _sink(sink: int) -> Statistic:
    keys = "token" if sink == 1 else f"{sink} tokens"
    return Statistic(
        f"First {keys}",
        PROBABILITY,
        f"Attention on the first {keys} of the text, whatever they are. Heads with nothing to do often rest there "
        "(Xiao 2024, Gu 2025).",
    )
