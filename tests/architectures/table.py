"""The page that says which architectures are served, and how."""

from __future__ import annotations

from pathlib import Path

from tests.architectures import ENTRIES, SERVED, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_HEAD = """# Transformers architectures

Made by `python -m tests.architectures` from the entries of `tests/architectures`; `tests/test_architectures.py` runs
every line and fails where this page is older than they are.

{served} architectures are served, {refused} are refused by name. *Served* means, for a tiny model with random weights
and every padding in the last column: on rows that are tokens all outputs inside `attncap.capture` equal those of eager
attention within 3e-5 of their largest number, and every statistic of every head equals that of eager's own map, row by
row (2e-5 + 1e-4 of the value, float32). A padding row that sees no key gets 0 from the attention, as from torch's own
function; eager attention gives it the mean of all values. *Holes* are masks with padding anywhere; *packed* are
documents one after another in `position_ids`. An architecture that is not listed is served where its modules ask
Transformers' attention *registry*, call *torch's functions* (`F.scaled_dot_product_attention`,
`F.multi_head_attention_forward`) or hold an `nn.MultiheadAttention`; where they do not, `capture` says so by name.

*Mask memory* is what masks and biases take beside the attention itself, for a batch of padded sequences of N tokens.
Packed documents take N² in every model.

| architecture | family | attention | how | mask memory | checked with |
| --- | --- | --- | --- | --- | --- |
"""
_THROUGH = {"registry": "registry", "torch": "torch's functions"}


def page() -> str:
    """The whole page."""
    head = _HEAD.format(served=len(SERVED), refused=len(ENTRIES) - len(SERVED))
    return head + "".join(_line(entry) for entry in ENTRIES)


def _line(entry: Architecture) -> str:
    if entry.refused:
        return f"| {entry.name} | {entry.family} | {entry.about} | refused: {entry.refused} | | |\n"
    how = " and ".join(_THROUGH[one] for one in entry.through)
    how += ", in part; the rest is named in a warning" if entry.escapes else ""
    memory = f"N²: {entry.whole_mask}" if entry.whole_mask else "N" if entry.inputs in ("text", "sequences") else ""
    padding = ", ".join("no padding" if padding == "none" else padding for padding in entry.paddings)
    return f"| {entry.name} | {entry.family} | {entry.about} | {how} | {memory} | {padding} |\n"
