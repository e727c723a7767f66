"""Colour scales of heat maps, for light and dark pages.

Their steps are even in OKLab, which is made for that: the same difference of a number looks the same everywhere on the
scale. They run in lightness, so that they stay ordered in grey and without red or green; blue and orange, the two arms
of the diverging ones, are told apart with every kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Sequence

Scale = tuple[str, ...]

# Low values fade into the page, high ones stand out: pale to deep on white, dim to bright on black.
LIGHT: Scale = (
    "#eaf5ff", "#c1e1ff", "#99cbfe", "#71b5fd", "#539df2", "#4186dd", "#3570c3", "#2e5ba5", "#294882", "#24365d",
    "#1b253f",
)  # fmt: skip
DARK: Scale = (
    "#1c243c", "#21355d", "#214880", "#1b5e9f", "#1275ba", "#138dd0", "#2ca5e1", "#51bdee", "#7bd3f6", "#abe7fb",
    "#e0f9ff",
)  # fmt: skip

# For numbers with a zero in the middle: blue below, orange above.
DIVERGING_LIGHT: Scale = (
    "#004182", "#2963a9", "#5987c1", "#88abd7", "#bacfeb", "#f3f3f3", "#e7c5b4", "#d09a7f", "#b6704c", "#9a4710",
    "#6b2e03",
)  # fmt: skip
DIVERGING_DARK: Scale = (
    "#91c1fe", "#649fe9", "#517eb8", "#3f5f87", "#304158", "#252525", "#54392b", "#805036", "#ad6843", "#db8252",
    "#fda577",
)  # fmt: skip


def shade(scale: Sequence[str], share: float) -> str:
    """The colour at `share` (0 to 1) of the way along a scale, as "#rrggbb"."""
    place = min(max(share, 0.0), 1.0) * (len(scale) - 1)
    index = min(int(place), len(scale) - 2)
    rest = place - index
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in scale[index : index + 2]]
    return "#" + "".join(f"{round(one + (other - one) * rest):02x}" for one, other in zip(*ends, strict=True))
