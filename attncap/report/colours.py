"""Colour scales of the heat maps: one hue family, rising evenly in lightness, one for each theme."""

from __future__ import annotations

# Low values fade into the page, high ones stand out: pale to deep on white, dim to bright on black. Both stay
# ordered when printed in grey or seen without red or green.
LIGHT = ("#f1f4f9", "#d3e3f3", "#a9cdea", "#74b0da", "#4390c4", "#226fae", "#114f8f", "#0b3169", "#071d42")
DARK = ("#1b222c", "#1c3350", "#1b4874", "#1d6299", "#2f80b8", "#559fcd", "#85bede", "#b9dcee", "#f0f9ff")
