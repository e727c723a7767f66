"""`capture` on nn.MultiheadAttention and nn.Transformer, held against attention maps computed in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncap
from attncap import UnsupportedError
from tests.plain import HEADS, WIDTH, capture_of, every_row, maps_in_float64, padding, seeded
from tests.test_capture import FULL, assert_stats_match

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "float", "heads", "both"])
def test_multihead_attention(masks: str, need_weights: bool, batch_first: bool) -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).eval()
    tokens = seeded(8, 3, 5, WIDTH) if batch_first else seeded(8, 5, 3, WIDTH)
    pads = padding([5, 2, 3], 5)
    options: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": masks != "heads"}
    options |= {"key_padding_mask": pads} if masks in ("padding", "both") else {}
    options |= {"attn_mask": seeded(9, 5, 5)} if masks == "float" else {}
    options |= {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)} if masks == "both" else {}
    options |= {"attn_mask": seeded(9, 3 * HEADS, 5, 5) > 1} if masks == "heads" else {}
    with torch.no_grad():
        cap, (_, weights) = capture_of(model, tokens, tokens, tokens, **options)
        (prob,) = maps_in_float64(model, tokens, tokens, tokens, **options).values()
    counted = ~pads if "key_padding_mask" in options else every_row(3, 5)
    assert_stats_match(cap.stats["MultiheadAttention"], prob, counted)
    assert (weights is not None) == need_weights
    assert (cap.count("entropy") == int(counted.sum())).all()


def test_multihead_attention_of_other_tokens_counts_every_row() -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=4, add_bias_kv=True, add_zero_attn=True, bias=False)
    query, key, value = seeded(10, 5, 3, WIDTH), seeded(11, 5, 3, 6), seeded(12, 5, 3, 4)
    pads = padding([5, 2, 3], 5)
    with torch.no_grad():
        cap, _ = capture_of(model.eval(), query, key, value, key_padding_mask=pads)
        (prob,) = maps_in_float64(model, query, key, value, key_padding_mask=pads).values()
    assert prob.shape[-1] == 7
    assert_stats_match(cap.stats["MultiheadAttention"], prob, every_row(3, 5))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pads", [None, padding([6, 2, 4], 6), padding([6, 2, 4], 6).flip(-1)])
def test_the_encoders_fast_path_is_captured_and_its_zeros_stay(pads: Tensor | None, causal: bool, norm: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH) if norm else None).eval()
    tokens = seeded(13, 3, 6, WIDTH)
    options: dict[str, Any] = {"src_key_padding_mask": pads}
    if causal:
        options["mask"] = nn.Transformer.generate_square_subsequent_mask(6)
    if causal and pads is not None and bool(pads[:, 0].any()):
        return  # rows that see no key, which are NaN in torch
    with torch.no_grad():
        cap, _ = capture_of(model, tokens, **options)
        maps = maps_in_float64(model, tokens, **options)
    assert cap.layers == ("layers.0.self_attn", "layers.1.self_attn")
    for name, prob in maps.items():
        assert_stats_match(cap.stats[name], prob, every_row(3, 6) if pads is None else ~pads)


def test_an_encoder_and_decoder_count_the_rows_of_each_side() -> None:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 16, batch_first=True).eval()
    source, target = seeded(14, 3, 6, WIDTH), seeded(15, 3, 6, WIDTH)
    sides = {"src": padding([6, 2, 4], 6), "tgt": padding([3, 6, 5], 6)}
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(6),
        "src_key_padding_mask": sides["src"],
        "memory_key_padding_mask": sides["src"],
        "tgt_key_padding_mask": sides["tgt"],
    }
    with torch.no_grad():
        before = model(source, target, **options)
        with attncap.capture(model, FULL, keep="last") as cap:
            inside = model(source, target, **options)
        maps = maps_in_float64(model, source, target, **options)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert set(cap.layers) == set(maps)
    assert len(maps) == 6
    for name, prob in maps.items():
        assert_stats_match(cap.stats[name], prob, ~sides["src" if name.startswith("encoder") else "tgt"])


def test_nested_tensors_are_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    nested = torch.nested.nested_tensor([seeded(20, 3, WIDTH), seeded(21, 5, WIDTH)])
    with pytest.raises(UnsupportedError, match="src: TransformerEncoder was given a nested tensor"):  # noqa: SIM117
        with torch.no_grad(), attncap.capture(model):
            model(nested)
