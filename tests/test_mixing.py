"""The mixing ratio from the diagonal and the heads' outputs equals Kobayashi's formula on the whole map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap import UnsupportedError
from attncap.analysis import mixing_ratio
from attncap.analysis.blocks import attention_blocks
from attncap.capture import Capture
from tests import handmade

pytest.importorskip("transformers")

import transformers

from tests import maps, models

# Where the residual and the LayerNorm of the first two layers lie, for the map-based formula.
POST_NORMS: dict[str, Callable[[Any, int], nn.LayerNorm]] = {
    "bert": lambda model, layer: model.encoder.layer[layer].attention.output.LayerNorm,
    "albert": lambda model, layer: model.encoder.albert_layer_groups[0].albert_layers[0].attention.LayerNorm,
}


def ratio_of_map(prob: Tensor, value: Tensor, weight: Tensor, carried: Tensor | None, gain: Tensor | None) -> Tensor:
    """(N,) of one sequence: prob (H, N, N), value (H, N, V), weight (H, V, E); parts of every pair of tokens."""
    parts = torch.einsum("hij,hjv,hve->ije", prob.double(), value.double(), weight)
    own = parts.diagonal().T + (0 if carried is None else carried.double())
    others = parts.sum(1) - parts.diagonal().T
    if gain is not None:
        own, others = ((part - part.mean(-1, keepdim=True)) * gain.double() for part in (own, others))
    return others.norm(dim=-1) / (others.norm(dim=-1) + own.norm(dim=-1))


def captured_values(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    values: list[Tensor] = []
    with torch.no_grad(), Capture(model, watch=lambda _, call, *__: values.append(call.value)):
        model(**batch)
    return values


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "llama", "mistral", "modernbert"])
def test_ratios_are_those_of_the_maps(kind, padding):
    model = models.text_model(kind)
    batch = models.tokens(3, 9, 4, padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    twin = maps.eager(model)
    with torch.no_grad():
        out = twin(**batch, output_attentions=True, output_hidden_states=True)
    blocks = attention_blocks(model)
    found = mixing_ratio(model, [batch])
    alone = mixing_ratio(model, [batch], residual=False)
    post = kind in POST_NORMS
    layers = 1 if kind == "albert" else len(out.attentions)
    if kind == "albert":  # one module runs in every layer: its ratio is the mean
        blocks = blocks * len(out.attentions)
    by_layer, by_head, without = [], [], []
    for layer, (prob, value) in enumerate(zip(out.attentions, captured_values(model, batch), strict=True)):
        block = blocks[layer]
        weight = block.out_weight
        value = value.repeat_interleave(block.heads // block.key_heads, 1)
        gain = POST_NORMS[kind](model, layer).weight.detach() if post else None
        rows: list[list[Tensor]] = [[] for _ in range(block.heads + 2)]
        for p, v, keeps, carried in zip(prob, value, kept, out.hidden_states[layer], strict=True):
            p, v, x = p[:, keeps][..., keeps], v[:, keeps], carried[keeps]
            for head in range(block.heads):
                one = slice(head, head + 1)
                rows[head].append(ratio_of_map(p[one], v[one], weight[one], x, gain))
            rows[-2].append(ratio_of_map(p, v, weight, x, gain))
            rows[-1].append(ratio_of_map(p, v, weight, None, None))
        means = torch.stack([torch.cat(one).mean() for one in rows])
        by_head.append(means[:-2])
        by_layer.append(means[-2])
        without.append(means[-1])
    if layers == 1:
        by_head, by_layer = [torch.stack(by_head).mean(0)], [torch.stack(by_layer).mean()]
        without = [torch.stack(without).mean()]
    torch.testing.assert_close(found.head, torch.stack(by_head), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.layer, torch.stack(by_layer), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.layer, torch.stack(without), atol=1e-5, rtol=1e-4)
    assert set(found.kind) == {"post-norm" if post else "pre-norm"}
    assert set(alone.kind) == {"attention only"}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_ratios_of_torchs_encoder_layer(norm_first, batch_first):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=batch_first, norm_first=norm_first).eval()
    nn.init.normal_(layer.norm1.weight)
    nn.init.normal_(layer.self_attn.out_proj.bias)
    hidden = torch.randn(1, 6, 12)
    read = layer.norm1(hidden) if norm_first else hidden
    query, key, value = F.linear(read, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
    query, key, value = (part[0].detach().view(6, 3, 4).transpose(0, 1) for part in (query, key, value))
    prob = (query @ key.mT / 2).softmax(-1)
    (block,) = attention_blocks(layer)
    gain = None if norm_first else layer.norm1.weight.detach()
    expected = ratio_of_map(prob, value, block.out_weight, hidden[0], gain).mean()
    found = mixing_ratio(layer, [hidden if batch_first else hidden.transpose(0, 1)])
    torch.testing.assert_close(found.layer, expected[None])
    assert found.kind == ("pre-norm" if norm_first else "post-norm",)
    assert found.layers == ("self_attn",)


def test_heads_that_look_at_themselves_mix_nothing_and_previous_token_heads_everything():
    model = handmade.InductionModel()
    tokens = handmade.repeated(2, 0)
    found = mixing_ratio(model, [tokens], residual=False)
    rows = tokens.shape[1]
    assert float(found.head[handmade.ITSELF]) == pytest.approx(0, abs=1e-6)
    assert float(found.head[handmade.PREVIOUS]) == pytest.approx((rows - 1) / rows)  # the first token sees itself
    with pytest.raises(UnsupportedError, match=r"layers.0 does not simply add its attention"):
        mixing_ratio(model, [tokens])


def test_batches_are_weighted_by_their_tokens():
    model = models.text_model("bert")
    one, other = models.tokens(1, 9, 1), models.tokens(1, 4, 2)
    both = mixing_ratio(model, [one, other]).layer
    expected = (9 * mixing_ratio(model, [one]).layer + 4 * mixing_ratio(model, [other]).layer) / 13
    torch.testing.assert_close(both, expected)
    with pytest.raises(ValueError, match="batches: expected some"):
        mixing_ratio(model, [])


def test_cross_attention_is_left_out():
    model = models.bart()
    batch = models.tokens(2, 6, 1)
    found = mixing_ratio(model, [{**batch, "decoder_input_ids": batch["input_ids"]}])
    assert len(found.layers) == 4
    assert not any("encoder_attn" in name for name in found.layers)


def test_what_is_not_a_plain_sum_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"layers.0.self_attn does not simply add"):
        mixing_ratio(models.text_model("gemma2"), [models.tokens(1, 5, 1)])  # a norm after the attention
    changed = copy.deepcopy(models.text_model("bert"))
    changed.encoder.layer[1].attention.output.dense.register_forward_hook(lambda _, args, out: out * 2)
    with pytest.raises(UnsupportedError, match=r"layer.1.attention.self gives is not the sum of its heads' outputs"):
        mixing_ratio(changed, [models.tokens(1, 5, 1)], residual=False)
    assert isinstance(changed, transformers.BertModel)
