"""Circuits of heads: from D x D products what the E x E matrices say, and on weights whose meaning is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attncap import UnsupportedError
from attncap.analysis import circuits, composition, detect_head
from attncap.analysis.blocks import attention_blocks
from attncap.capture import Capture
from attncap.nn import MultiheadAttention
from tests import handmade

pytest.importorskip("transformers")

import transformers

from tests import models


def _phi3() -> Any:
    grouped = {**models._GROUPED, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**grouped))


def _gpt_neox() -> Any:
    sizes = {name: models._SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.GPTNeoXConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPTNeoXForCausalLM(config)


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=models.VOCABULARY, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return transformers.DistilBertModel(config)


def model_of(kind: str) -> Any:
    more = {"phi3": _phi3, "gpt_neox": _gpt_neox, "distilbert": _distilbert}
    if kind in more:
        return models.sharpened(more[kind](), 0)
    return {"t5": models.t5, "bart": models.bart}[kind]() if kind in ("t5", "bart") else models.text_model(kind)


KINDS = [*models.TEXT_MODELS, "phi3", "gpt_neox", "distilbert", "t5", "bart"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_heads_are_those_the_model_computes_with(kind):
    """Of every module: values are x W_V + b_V head by head, and what it gives is the sum of out_h W_O + b_O."""
    model = model_of(kind)
    blocks = {block.name: block for block in attention_blocks(model)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for name, block in blocks.items():
        block.out.register_forward_hook(lambda _, args, out, name=name: given.update({name: out}))
        block.value.owner.register_forward_hook(lambda _, args, out, name=name: read.update({name: args[0]}))
    batch = models.tokens(2, 7, 1)
    if kind in ("t5", "bart"):
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    with torch.no_grad(), Capture(model, watch=lambda name, call, out, _: seen.update({name: (call.value, out)})):
        model(**batch)
    assert set(seen) == set(blocks)
    for name, (value, out) in seen.items():
        block = blocks[name]
        bias = getattr(block.out, "bias", None)
        total = torch.einsum("bhnv,hve->bne", out.double(), block.out_weight) + (0 if bias is None else bias)
        torch.testing.assert_close(given[name].double(), total, atol=1e-4, rtol=1e-4)
        values = torch.einsum("bne,hev->bhnv", read[name].double(), block.value_weight)
        value_bias = getattr(block.value.owner, "bias", None)
        if value_bias is not None:
            by_group = value_bias[block.value.features].view(1, -1, 1, block.value_dim)
            values += by_group.repeat_interleave(block.heads // block.key_heads, 1)
        expected = value.double().repeat_interleave(block.heads // block.key_heads, 1)
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert"])
def test_queries_and_keys_of_heads_make_the_scores(kind):
    """Without rotary positions they are x W_Q + b_Q and x W_K + b_K as they stand."""
    model = model_of(kind)
    read: dict[str, Tensor] = {}
    calls: dict[str, Any] = {}
    for block in attention_blocks(model):
        block.query.owner.register_forward_hook(lambda _, a, out, name=block.name: read.update({name: a[0]}))
    with torch.no_grad(), Capture(model, watch=lambda name, call, *_: calls.update({name: call})):
        model(**models.tokens(2, 7, 1))
    for block in attention_blocks(model):
        call, hidden = calls[block.name], read[block.name].double()
        for part, weight, found in (
            (block.query, block.query_weight, call.query),
            (block.key, block.key_weight, call.key),
        ):
            bias = part.owner.bias[part.features].view(1, block.heads, 1, -1)
            expected = torch.einsum("bne,hed->bhnd", hidden, weight) + bias
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own", [{}, {"kdim": 6, "vdim": 5}])
def test_heads_of_torchs_module(own):
    torch.manual_seed(0)
    module = MultiheadAttention(12, 3, batch_first=True, **own)
    (block,) = attention_blocks(module)
    query, key, value = (
        torch.randn(2, 4, 12),
        torch.randn(2, 5, own.get("kdim", 12)),
        torch.randn(2, 5, own.get("vdim", 12)),
    )
    seen: list[Any] = []
    with torch.no_grad(), Capture(module, watch=lambda name, call, *_: seen.append(call)):
        module(query, key, value)
    for given, weight, found in (
        (query, block.query_weight, seen[0].query),
        (key, block.key_weight, seen[0].key),
        (value, block.value_weight, seen[0].value),
    ):
        torch.testing.assert_close(
            found.double(), torch.einsum("bne,hed->bhnd", given.double(), weight), atol=1e-5, rtol=1e-4
        )


def matrices(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(QK, OV), (H, E, E) each, layer by layer, as they are written."""
    return [
        (block.query_weight @ block.key_weight.mT, block.value_weight @ block.out_weight)
        for block in attention_blocks(model)
    ]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gpt_neox"])
def test_numbers_are_those_of_the_whole_matrices(kind):
    model = model_of(kind)
    found = circuits(model)
    assert found.layers == tuple(block.name for block in attention_blocks(model))
    for layer, (qk, ov) in enumerate(matrices(model)):
        eigenvalues = torch.linalg.eigvals(ov)
        copying = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
        torch.testing.assert_close(found.copying[layer], copying)
        torch.testing.assert_close(found.qk_norm[layer], torch.linalg.matrix_norm(qk))
        torch.testing.assert_close(found.ov_norm[layer], torch.linalg.matrix_norm(ov))


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_composition_is_that_of_the_whole_matrices(kind):
    model = model_of("llama")
    (_, writes), (qk, ov) = matrices(model)
    norm = torch.linalg.matrix_norm
    found = composition(model, kind)
    for a in range(4):
        for b in range(4):
            product = {"q": writes[a] @ qk[b], "k": qk[b] @ writes[a].T, "v": writes[a] @ ov[b]}[kind]
            reads = ov[b] if kind == "v" else qk[b]
            torch.testing.assert_close(found[0, a, 1, b], norm(product) / norm(writes[a]) / norm(reads))
    assert found[1].isnan().all()
    assert found[0, :, 0].isnan().all()


def test_copying_from_token_to_token_is_that_of_the_whole_circuit():
    model = model_of("gpt2")
    embed = model.transformer.wte.weight
    unembed = torch.randn(embed.shape, generator=torch.Generator().manual_seed(1))
    found = circuits(model, embed=embed, unembed=unembed).copying
    for layer, (_, ov) in enumerate(matrices(model)):
        whole = embed.detach().double() @ ov @ unembed.double().T
        # The 34 zeros among 50 eigenvalues add their rounding error to the sum of absolute values.
        eigenvalues = torch.linalg.eigvals(whole)
        expected = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
        torch.testing.assert_close(found[layer], expected, atol=1e-6, rtol=1e-6)


def test_prefix_matching_beside_copying_makes_an_induction_head():
    model = handmade.InductionModel()
    tokens = handmade.repeated(3, seed=0)
    with torch.no_grad():
        guess = model(tokens).argmax(-1)
    assert torch.equal(guess[:, 16:-1], tokens[:, 17:])  # the second time it knows what comes
    numbers = circuits(model)
    matching = detect_head(model, tokens, "induction_head")
    heads = [(layer, head) for layer, head in (matching > 0.4).nonzero().tolist() if numbers.copying[layer, head] > 0.5]
    assert heads == [handmade.INDUCTION]
    assert numbers.copying[handmade.INDUCTION] == pytest.approx(1)
    assert numbers.copying[handmade.ANTICOPY] == pytest.approx(-1)
    previous = detect_head(model, tokens, "previous_token_head")
    assert (previous > 0.9).nonzero().tolist() == [list(handmade.PREVIOUS)]
    assert numbers.output_norm[handmade.ANTICOPY] == pytest.approx(0.1 * handmade.VOCABULARY**0.5)


def test_the_induction_head_reads_its_keys_from_the_previous_token_head():
    model = handmade.InductionModel()
    from_previous = {kind: composition(model, kind)[(*handmade.PREVIOUS, *handmade.INDUCTION)] for kind in "qkv"}
    assert from_previous["k"] > 0.2
    assert from_previous["q"] == 0
    assert from_previous["v"] == 0


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.everything = nn.Linear(8, 24)


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="weights of Unknown is not known"):
        circuits(Unknown())
    with pytest.raises(TypeError, match=r"model: expected a .*Module, got str"):
        circuits("bert")
    with pytest.raises(ValueError, match='kind: expected "q", "k" or "v"'):
        composition(model_of("bert"), "o")
    with pytest.raises(TypeError, match="unembed: expected a tensor beside"):
        circuits(model_of("bert"), embed=torch.ones(3, 16))
    with pytest.raises(ValueError, match="reads vectors of 16"):
        circuits(model_of("bert"), embed=torch.ones(3, 4), unembed=torch.ones(3, 4))
