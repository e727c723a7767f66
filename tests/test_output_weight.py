"""A head's share of its layer's output is that of the maps, and why it is small is told where the reason is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap.analysis import circuits, output_weight, rank_correlation
from attncap.analysis.blocks import attention_blocks
from attncap.analysis.output_weight import CANCELLING, PLACE, WEIGHT
from attncap.capture import Capture
from tests import handmade

pytest.importorskip("transformers")

from tests import maps, models

PARTS = ("output", "share", "value", "place", "agreement", "sink", "sink_value")


def of_maps(prob: Tensor, value: Tensor, weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The numbers of a layer from its map (B, H, N, N), value (B, H, N, V), weight (H, V, E); kept (B, N)."""
    moved = torch.einsum("bhjv,hve->bhje", value.double(), weight)
    norms = moved.norm(dim=-1)
    prob = prob.double()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("output", "attended", "value", "sink", "sink_value")}
    for sequence, tokens in enumerate(kept):
        p, f, n = prob[sequence][:, tokens][:, :, tokens], moved[sequence][:, tokens], norms[sequence][:, tokens]
        parts["output"].append((p @ f).norm(dim=-1))
        parts["attended"].append((p @ n[..., None])[..., 0])
        parts["value"].append(n)
        received = p.mean(1)
        most = received.argmax(-1, keepdim=True)
        parts["sink"].append(received.gather(-1, most))
        parts["sink_value"].append(n.gather(-1, most) / n.mean(-1, keepdim=True))
    mean = {name: torch.cat(rows, -1).mean(-1) for name, rows in parts.items()}
    mean["share"] = mean["output"] / mean["output"].sum()
    mean["place"], mean["agreement"] = mean["attended"] / mean["value"], mean["output"] / mean["attended"]
    return mean


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral"])
def test_numbers_are_those_of_the_maps(kind: str, padding: str) -> None:
    model, batch = models.text_model(kind), models.tokens(3, 9, 4, padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        attentions = maps.eager(model)(**batch, output_attentions=True).attentions
    values: list[Tensor] = []
    with torch.no_grad(), Capture(model, watch=lambda _, call, *__: values.append(call.value)):
        model(**batch)
    found = output_weight(model, [batch])
    for layer, block in enumerate(attention_blocks(model)):
        value = values[layer].repeat_interleave(block.heads // block.key_heads, 1)
        expected = of_maps(attentions[layer], value, block.out_weight, kept)
        for name in PARTS:
            torch.testing.assert_close(
                getattr(found, name)[layer],
                expected[name],
                rtol=2e-4,
                atol=2e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    torch.testing.assert_close(found.weight, circuits(model).output_norm)
    torch.testing.assert_close(found.output, found.value * found.place * found.agreement)
    torch.testing.assert_close(found.share.sum(1), torch.ones(len(found.share), dtype=torch.float64))


class FourHeads(nn.Module):
    """Values of one number a head. Features of a token: whether it is the first, 1, and +1 or -1 in turn."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(3, 4, bias=False))
        self.o_proj = nn.Linear(4, 3, bias=False)
        self.head_dim = 1
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for head in (0, 1):  # look everywhere alike, at values of 1
                self.v_proj.weight[head, 1] = 1
            self.q_proj.weight[2, 1] = 60  # looks at the first token, whose value is a hundredth of the others'
            self.k_proj.weight[2, 0] = 1
            self.v_proj.weight[2] = torch.tensor([-0.99, 1.0, 0.0])
            self.v_proj.weight[3, 2] = 1  # looks everywhere alike, at values of +1 and -1
            self.o_proj.weight[0] = torch.tensor([1.0, 0.01, 1.0, 1.0])

    def forward(self, hidden: Tensor) -> Any:
        query, key, value = (
            projection(hidden).unflatten(-1, (4, 1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(-2))


def test_small_weights_a_sink_and_values_that_cancel_are_told_apart() -> None:
    tokens = 20
    first, sign = torch.eye(tokens)[0], torch.tensor([1.0, -1.0]).repeat(tokens // 2)
    hidden = torch.stack([first, torch.ones(tokens), sign], -1)[None]
    found = output_weight(FourHeads(), [hidden])
    assert [found.reason(0, head) for head in range(4)] == [None, WEIGHT, PLACE, CANCELLING]
    assert found.output[0].tolist() == pytest.approx([1, 0.01, 0.01, 0], abs=1e-6)
    assert found.value[0].tolist() == pytest.approx([1, 0.01, (19 + 0.01) / 20, 1])
    assert found.place[0].tolist() == pytest.approx([1, 1, 0.01 * 20 / 19.01, 1], rel=1e-4)
    assert found.agreement[0].tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert float(found.sink[0, 2]) == pytest.approx(1)
    assert float(found.sink_value[0, 2]) == pytest.approx(0.01 * 20 / 19.01, rel=1e-4)
    assert found.weight[0].tolist() == pytest.approx([1, 0.01, 1, 1])


def test_the_hand_made_models_induction_head_writes_most() -> None:
    found = output_weight(handmade.InductionModel(), [handmade.repeated(4, 0)])
    layer, head = handmade.INDUCTION
    assert int(found.share[layer].argmax()) == head
    assert float(found.share[layer, head]) > 0.9
    assert found.reason(*handmade.ITSELF) == WEIGHT


def test_layers_with_fewer_heads_and_no_batches() -> None:
    with pytest.raises(ValueError, match="batches: expected some"):
        output_weight(handmade.InductionModel(), [])


def test_rank_correlation_is_spearmans() -> None:
    source = np.random.default_rng(0)
    for levels in (4, 1000):
        one, other = source.integers(levels, size=(2, 60)), source.integers(levels, size=(2, 60))
        other[0] += one[0]
        expected = scipy.stats.spearmanr(one[0], other[0]).statistic
        pair = torch.tensor(one[0].astype(float)).view(6, 10), torch.tensor(other[0].astype(float)).view(6, 10)
        assert rank_correlation(*pair) == pytest.approx(expected)
        pair[0][2, 3] = torch.nan
        kept = np.arange(60) != 23
        assert rank_correlation(*pair) == pytest.approx(scipy.stats.spearmanr(one[0][kept], other[0][kept]).statistic)
    assert np.isnan(rank_correlation(torch.ones(4), torch.arange(4.0)))
    assert np.isnan(rank_correlation(torch.full((2,), torch.nan), torch.arange(2.0)))
    with pytest.raises(ValueError, match="other: expected the shape"):
        rank_correlation(torch.ones(2), torch.ones(3))
