"""attncap.nn.MultiheadAttention in the place of torch's."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import attncap
import attncap.nn
from attncap import StatSpec, UnsupportedError
from tests.test_capture import FULL, assert_stats_match

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

BATCH, ROWS, KEYS = 3, 5, 7


def pair(seed: int = 0, **options: Any) -> tuple[nn.MultiheadAttention, attncap.nn.MultiheadAttention]:
    """Torch's module and attncap's with the same weights, biases included."""
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(**{"embed_dim": 12, "num_heads": 2, **options}).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = attncap.nn.MultiheadAttention(**{"embed_dim": 12, "num_heads": 2, **options}, spec=FULL).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_signature_and_state_dict_are_torchs() -> None:
    for name in ("__init__", "forward"):
        wanted = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        found = inspect.signature(getattr(attncap.nn.MultiheadAttention, name)).parameters
        assert [one for one in found if one != "spec"] == list(wanted)
        assert [found[one].default for one in wanted] == [one.default for one in wanted.values()]
    theirs, ours = pair(add_bias_kv=True)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(1)
    fresh = nn.MultiheadAttention(12, 2)
    torch.manual_seed(1)
    assert torch.equal(attncap.nn.MultiheadAttention(12, 2).in_proj_weight, fresh.in_proj_weight)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]:
    """(options of the modules, query key value, options of the call); every row sees a key."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    flag = st.booleans()
    other = draw(st.sampled_from([None, 6]))
    options = {"num_heads": draw(st.sampled_from([1, 2, 3])), "kdim": other, "vdim": other}
    options |= {name: draw(flag) for name in ("batch_first", "bias", "add_bias_kv", "add_zero_attn")}
    batched, itself = draw(flag), other is None and draw(flag)
    keys = ROWS if itself else KEYS

    def tokens(length: int, width: int) -> Tensor:
        shape = (BATCH, length, width) if options["batch_first"] else (length, BATCH, width)
        return torch.randn(shape if batched else (length, width))

    query = tokens(ROWS, 12)
    key = query if itself else tokens(keys, other or 12)
    value = key if itself or draw(flag) else tokens(keys, other or 12)
    heads = (BATCH if batched else 1) * options["num_heads"]
    arguments: dict[str, Any] = {}
    kind = draw(st.sampled_from(["none", "bool", "float", "heads", "causal"]))
    if kind != "none":
        mask = torch.rand((heads, ROWS, keys) if kind == "heads" else (ROWS, keys)) < 0.5
        mask = torch.ones(ROWS, keys, dtype=torch.bool).triu(1) if kind == "causal" else mask
        mask[..., 0] = False
        arguments["attn_mask"] = torch.randn(mask.shape).masked_fill(mask, -torch.inf) if kind == "float" else mask
        arguments["is_causal"] = kind == "causal" and draw(flag)
    if draw(flag):
        pads = torch.arange(keys) >= torch.randint(1, keys, (BATCH, 1))
        pads = pads if batched else pads[0]
        arguments["key_padding_mask"] = torch.zeros(pads.shape).masked_fill(pads, -torch.inf) if draw(flag) else pads
    return options, (query, key, value), arguments


@settings(max_examples=150, deadline=None)
@given(call=calls(), need_weights=st.booleans())
def test_outputs_and_statistics_are_those_of_torchs_module(call: Any, need_weights: bool) -> None:
    options, inputs, arguments = call
    theirs, ours = pair(**options)
    with torch.no_grad():
        expected, _ = theirs(*inputs, need_weights=need_weights, **arguments)
        found, stats = ours(*inputs, need_weights=need_weights, **arguments)
        exact = tree_map_only(Tensor, lambda one: one if one.dtype == torch.bool else one.double(), arguments)
        doubles = [one.double() for one in inputs]
        if inputs[0] is inputs[1]:
            doubles[1] = doubles[2] = doubles[0]
        _, prob = copy.deepcopy(theirs).double()(*doubles, average_attn_weights=False, **exact)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (stats is not None) == need_weights
    if stats is None:
        return
    batched = inputs[0].dim() == 3
    if not batched:
        assert stats.lse.shape == (options["num_heads"], ROWS)
        stats = attncap.HeadStats(**{name: tensor[None] for name, tensor in stats.items()})
        prob = prob[None]
    counted = torch.ones(prob.shape[0], ROWS, dtype=torch.bool)
    pads = arguments.get("key_padding_mask")
    if pads is not None and inputs[0] is inputs[1] and prob.shape[-1] == ROWS:
        counted = (pads == 0).reshape(counted.shape)
    assert_stats_match(stats, prob, counted)


def test_what_a_row_that_sees_nothing_gives() -> None:
    _, ours = pair(batch_first=True)
    tokens, pads = torch.randn(2, 4, 12), torch.tensor([[False] * 4, [True] * 4])
    with torch.no_grad():
        out, stats = ours(tokens, tokens, tokens, key_padding_mask=pads)
    assert stats.entropy[1].abs().max() == 0
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(4, 12))


def test_a_hand_written_model_takes_it_and_is_captured() -> None:
    class Block(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.attn = module.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens + self.attn(tokens, tokens, tokens)[0]

    theirs, ours = Block(nn).eval(), Block(attncap.nn).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 5, 12)
    with torch.no_grad():
        caps = []
        for model in (theirs, ours):
            with attncap.capture(model, FULL) as cap:
                found = model(tokens)
            torch.testing.assert_close(found, theirs(tokens), atol=1e-5, rtol=1e-5)
            caps.append(cap)
    assert caps[0].layers == caps[1].layers == ("attn",)
    torch.testing.assert_close(caps[0].mean("entropy"), caps[1].mean("entropy"), atol=1e-5, rtol=1e-5)


def test_it_stands_in_torchs_own_layers() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval()
    tokens = torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = layer(tokens)
        ours = attncap.nn.MultiheadAttention(12, 2, batch_first=True).eval()
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
        with attncap.capture(layer) as cap:
            torch.testing.assert_close(layer(tokens), expected, atol=1e-5, rtol=1e-5)
    assert cap.layers == ("self_attn",)


def test_torch_compile_takes_it_whole() -> None:
    _, ours = pair(batch_first=True)
    tokens, pads = torch.randn(2, 5, 12), torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        out, stats = ours(tokens, tokens, tokens, key_padding_mask=pads)
        again, kept = torch.compile(ours, fullgraph=True, backend="eager")(
            tokens, tokens, tokens, key_padding_mask=pads
        )
    torch.testing.assert_close(again, out)
    for (name, one), (_, other) in zip(stats.items(), kept.items(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


TOKENS = torch.randn(5, 3, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": None}, TypeError, "key: expected a torch.Tensor, got NoneType"),
        ({"query": torch.randn(12)}, ValueError, r"query: expected \(rows, embedding\)"),
        ({"query": torch.randn(5, 3, 8)}, ValueError, "query: expected an embedding of 12"),
        ({"key": torch.randn(5, 2, 12)}, ValueError, "key: expected the query's batch size 3"),
        ({"value": torch.randn(4, 3, 12)}, ValueError, "value: expected the key's length 5"),
        ({"attn_mask": torch.zeros(5, 4)}, ValueError, r"attn_mask: expected shape \(5, 5\), got \(5, 4\)"),
        ({"attn_mask": torch.zeros(5, 5, 5)}, ValueError, r"attn_mask: expected shape \(6, 5, 5\)"),
        ({"attn_mask": torch.zeros(5, 5).long()}, TypeError, "attn_mask: expected a bool or floating dtype"),
        ({"key_padding_mask": torch.zeros(5, 3)}, ValueError, r"key_padding_mask: expected shape \(3, 5\)"),
        ({"is_causal": True}, ValueError, "attn_mask: expected the causal mask together with is_causal=True"),
    ],
)
def test_bad_calls_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    _, ours = pair()
    with torch.no_grad(), pytest.raises(error, match=message):
        ours(**{"query": TOKENS, "key": TOKENS, "value": TOKENS, **arguments})


def test_dropout_and_other_specs_are_refused_by_name() -> None:
    ours = attncap.nn.MultiheadAttention(12, 2, dropout=0.1)
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"dropout: .* got 0\.1; call model\.eval\(\)"):
        ours(TOKENS, TOKENS, TOKENS)
    with pytest.raises(TypeError, match="spec: expected a StatSpec"):
        attncap.nn.MultiheadAttention(12, 2, spec="entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim, 8, got 3"):
        attncap.nn.MultiheadAttention(8, 3)
    with torch.no_grad():
        _, stats = attncap.nn.MultiheadAttention(12, 2, spec=StatSpec.none())(TOKENS, TOKENS, TOKENS)
    assert [name for name, _ in stats.items()] == ["lse"]
