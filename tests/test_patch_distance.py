"""Distances in the plane: of even attention as it is known, of other attention as its map says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap.analysis import patch_distance, row_blocks
from tests import maps, models


class Even(nn.Module):
    """Three heads that look everywhere alike."""

    def forward(self, tokens: Tensor) -> Tensor:
        heads = torch.zeros(len(tokens), 3, tokens.shape[1], 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


def test_even_attention_over_14_x_14_patches_of_16_pixels() -> None:
    found = patch_distance(Even(), [torch.zeros(2, 196)], 16, others=0)
    assert found.shape == (1, 3)
    assert found[0].tolist() == pytest.approx([116.49] * 3, abs=0.005)
    with_class = patch_distance(Even(), [torch.zeros(1, 197)], 16)
    assert with_class[0].tolist() == pytest.approx([116.49 * 196 / 197] * 3, abs=0.005)


def test_a_line_of_patches() -> None:
    # Of four places in a row: (0 + 1 + 2 + 3 + 1 + 0 + 1 + 2 + 2 + 1 + 0 + 1 + 3 + 2 + 1 + 0) / 16 = 20 / 16
    assert float(patch_distance(Even(), [torch.zeros(1, 4)], 2, grid=(1, 4), others=0)[0, 0]) == pytest.approx(2.5)


def test_distances_are_those_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK", 100)  # a few rows at once
    model: Any = models.vit()
    pixels = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = maps.eager(model)(pixel_values=pixels, output_attentions=True).attentions
    place = torch.tensor([[row, column] for row in range(3) for column in range(3)]).double() * 4
    apart = (place[:, None] - place[None]).norm(dim=-1)
    found = patch_distance(model, [{"pixel_values": pixels[:2]}, {"pixel_values": pixels[2:]}], 4)
    for layer, prob in enumerate(attentions):
        expected = (prob.double()[:, :, 1:, 1:] * apart).sum(-1).mean((0, 2))
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-4)


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a square of patches behind 1 other tokens, got 9 tokens"):
        patch_distance(Even(), [torch.zeros(1, 9)], 1)
    with pytest.raises(ValueError, match="expected 2 x 3 patches behind 0 other tokens, got 9 tokens"):
        patch_distance(Even(), [torch.zeros(1, 9)], 1, grid=(2, 3), others=0)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        patch_distance(Even(), [], 1)
