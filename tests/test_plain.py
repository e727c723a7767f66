"""`capture` on plain torch modules, held against attention maps computed in float64."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.utils._pytree import tree_map_only

import attncap
from attncap import UnsupportedError
from tests import models
from tests.test_capture import FULL, TOLERANCE, assert_stats_match

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

WIDTH, HEADS = 8, 2


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths: list[int], longest: int) -> Tensor:
    """(B, longest) bool, True for padding on the right."""
    return torch.arange(longest) >= torch.tensor(lengths)[:, None]


class Attention(nn.Module):
    """Self- or cross-attention that calls a function of torch's signature."""

    def __init__(self, function: Callable[..., Tensor] = F.scaled_dot_product_attention, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.queries, self.others = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def projected(self, tokens: Tensor, context: Tensor) -> list[Tensor]:
        parts = [self.queries(tokens), *self.others(context).chunk(2, -1)]
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        heads = self.projected(tokens, tokens if context is None else context)
        return self.function(*heads, attn_mask=mask, **self.options).transpose(1, 2).flatten(2)

    def map(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The map p (B, H, Q, K) in float64."""
        twin = copy.deepcopy(self).double()
        query, key, _ = twin.projected(tokens.double(), (tokens if context is None else context).double())
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if self.options.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).nan_to_num()


class MapKeeper(nn.MultiheadAttention):
    """Keeps the map of its newest call."""

    prob: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, self.prob = super().forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        return out, None


def maps_in_float64(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Name -> map p of every nn.MultiheadAttention, by torch's own slow path in float64."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MapKeeper
    both = tree_map_only(Tensor, lambda one: one.double() if one.is_floating_point() else one, (args, kwargs))
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        twin(*both[0], **both[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    return {name: module.prob.nan_to_num() for name, module in twin.named_modules() if isinstance(module, MapKeeper)}


def capture_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[attncap.Capture, Any]:
    """(capture, what the model gave inside it), the outputs being equal to those before and after it."""
    with torch.no_grad():
        before = model(*args, **kwargs)
        with attncap.capture(model, FULL, keep="last") as cap:
            inside = model(*args, **kwargs)
        after = model(*args, **kwargs)
    for one, other, last in zip(*(x if isinstance(x, tuple) else (x,) for x in (before, inside, after)), strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
            assert torch.equal(last, one)
    return cap, inside


def every_row(batch: int, rows: int) -> Tensor:
    return torch.ones(batch, rows, dtype=torch.bool)


# Calls of the function.

FUNCTIONS = {
    "F": F.scaled_dot_product_attention,
    "imported by name": imported_by_name,
    "torch._C": torch._C._nn.scaled_dot_product_attention,
    "aten": torch.ops.aten.scaled_dot_product_attention,
    "attncap": attncap.scaled_dot_product_attention,
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_way_to_call_the_function_is_captured(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    model, tokens = nn.Sequential(nn.LayerNorm(WIDTH), Attention(function, **options)), seeded(0, 2, 6, WIDTH)
    cap, _ = capture_of(model, tokens)
    assert cap.layers == ("1",)
    assert_stats_match(cap.stats["1"], model[1].map(model[0](tokens)), every_row(2, 6))
    seen = torch.arange(1, 7) if options else torch.full((6,), 6)
    assert (cap.count("relative_entropy") == 2 * int((seen >= 2).sum())).all()


class Encoder(nn.Module):
    """Hands its padding on as a mask of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor, attention_mask: Tensor, causal: bool = False) -> Tensor:
        return self.attn(tokens, mask=self.mask(tokens, attention_mask, causal))

    def mask(self, tokens: Tensor, attention_mask: Tensor, causal: bool) -> Tensor:
        keys = attention_mask.bool()[:, None, None]
        return keys & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril() if causal else keys


@pytest.mark.parametrize("causal", [False, True])
def test_padding_told_by_an_attention_mask_does_not_count(causal: bool) -> None:
    model, tokens, mask = Encoder(), seeded(1, 3, 7, WIDTH), (~padding([7, 4, 1], 7)).long()
    cap, _ = capture_of(model, tokens, attention_mask=mask, causal=causal)
    assert_stats_match(cap.stats["attn"], model.attn.map(tokens, mask=model.mask(tokens, mask, causal)), mask.bool())
    assert (cap.count("entropy") == 12).all()


def test_padding_told_by_the_mask_of_the_scores_alone_does_not_count() -> None:
    model, tokens, keys = Attention(), seeded(1, 3, 7, WIDTH), ~padding([7, 4, 1], 7)
    mask = keys[:, None, None]
    cap, _ = capture_of(model, tokens, mask=mask)
    assert_stats_match(cap.stats["Attention"], model.map(tokens, mask=mask), keys)
    assert (cap.count("received_mass") == 12).all()
    cap, _ = capture_of(model, tokens, seeded(2, 3, 7, WIDTH), mask)  # of others' keys it says nothing about the rows
    assert (cap.count("entropy") == 21).all()
    assert (cap.count("received_mass") == 12).all()


class Twice(nn.Module):
    """Two calls in one forward, and one module for two kinds of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Attention()

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (tokens, context)]
        first = F.scaled_dot_product_attention(heads[0], heads[0], heads[0], is_causal=True)
        second = F.scaled_dot_product_attention(first, heads[1], heads[1])
        return second.transpose(1, 2).flatten(2) + self.shared(tokens) + self.shared(tokens, context)


def test_calls_of_one_module_are_kept_apart() -> None:
    model, tokens, context = Twice(), seeded(3, 2, 5, WIDTH), seeded(4, 2, 9, WIDTH)
    cap, _ = capture_of(model, tokens, context)
    assert set(cap.layers) == {"Twice", "Twice#1", "shared", "shared:cross"}
    assert_stats_match(cap.stats["shared"], model.shared.map(tokens), every_row(2, 5))
    assert_stats_match(cap.stats["shared:cross"], model.shared.map(tokens, context), every_row(2, 5))
    assert cap.stats["Twice"].received_mass.shape[-1] == 5
    assert cap.stats["Twice#1"].received_mass.shape[-1] == 9


def test_tags_and_features_are_functions_of_the_models_arguments() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.attn = nn.Embedding(4, WIDTH), Attention()

        def forward(self, input_ids: Tensor, scale: float = 1.0) -> Tensor:
            return self.attn(self.table(input_ids) * scale)

    model, ids = Embedded(), torch.tensor([[0, 1, 0, 2, 1], [3, 3, 3, 0, 1]])
    weights = {"place": lambda batch: torch.arange(5.0).expand(batch["input_ids"].shape)}
    with torch.no_grad(), attncap.capture(model, tags={"duplicate": attncap.tags.duplicate}, features=weights) as cap:
        model(ids)
    prob = model.attn.map(model.table(ids))
    query_tags, key_tags = attncap.tags.duplicate({"input_ids": ids})
    same = (query_tags[:, :, None] == key_tags[:, None, :]) & (key_tags >= 0)[:, None]
    expected = (prob * same[:, None]).sum(-1).mean((0, 2))
    torch.testing.assert_close(cap.mean("duplicate")[0], expected, **TOLERANCE)
    torch.testing.assert_close(cap.mean("place")[0], (prob @ torch.arange(5.0).double()).mean((0, 2)), **TOLERANCE)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attn has query tags for \(2, 5\)"):  # noqa: SIM117
        with attncap.capture(model, tags={"wrong": lambda _: (ids[:, :3], ids[:, :3])}):
            model(ids)


def test_unselected_modules_keep_their_own_attention() -> None:
    seen: list[str] = []

    def spy(name: str) -> Callable[..., Tensor]:
        def function(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(name)
            return F.scaled_dot_product_attention(*args, **kwargs)

        return function

    model, tokens = nn.Sequential(Attention(spy("first")), Attention(spy("second"))), seeded(5, 2, 5, WIDTH)
    with torch.no_grad():
        first = model[0](tokens)
        with attncap.capture(model, layers=["1"]) as cap:
            assert torch.equal(model[0](tokens), first)
            model(tokens)
    assert cap.layers == ("1",)
    assert seen == ["first"] * 3 + ["second"]


def test_autocast_rounds_as_torch_does() -> None:
    model, tokens = Attention(), seeded(6, 2, 5, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens)
        with attncap.capture(model) as cap:
            found = model(tokens)
        query = seeded(7, 1, 2, 5, 4)
        mixed = attncap.scaled_dot_product_attention(query, query.bfloat16(), query)
    assert found.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert (cap.count("entropy") == 10).all()


# nn.MultiheadAttention and nn.Transformer.


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


# What cannot be captured.


class ByHand(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = F.dropout(torch.softmax(query @ key.transpose(-1, -2), dim=-1), 0.0)
        return (prob @ value).transpose(1, 2).flatten(2)


class ByEinsum(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = torch.einsum("bhqd,bhkd->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", prob, value).flatten(2)


class Turned(Attention):
    """The product of the transposed map and values, as models of pictures write it; fewer keys than rows."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = torch.softmax(query @ key[:, :, 1:].mT, dim=-1)
        return (value[:, :, 1:].mT @ prob.mT).permute(0, 3, 1, 2).flatten(2)


class LinearAttention(nn.Linear):
    pass


class ByFlex(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return flex_attention(*self.projected(tokens, tokens)).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_not_captured_is_named_once_with_the_reason() -> None:
    parts = {"hand": ByHand(), "einsum": ByEinsum(), "turned": Turned(), "flex": ByFlex()}
    parts |= {"linear": LinearAttention(WIDTH, WIDTH)}
    parts |= {"script": torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(1, WIDTH)), "good": Attention()}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    cap = attncap.capture(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad(), cap:
            model(seeded(16, 2, 5, WIDTH))
            model(seeded(16, 2, 5, WIDTH))
    (one,) = (warning for warning in told if "not captured" in str(warning.message))
    assert one.filename == __file__
    message = str(one.message)
    for name, reason in (
        ("hand", "multiplies a softmax itself"),
        ("einsum", "multiplies a softmax itself"),
        ("turned", "multiplies a softmax itself"),
        ("linear", "ran without an attention call"),
        ("flex", "calls flex_attention"),
        ("script", "is TorchScript"),
    ):
        assert f"{name} {reason}" in message
    assert "good" not in message
    assert cap.layers == ("good",)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        with torch.no_grad(), cap:
            model(seeded(16, 2, 5, WIDTH))
    assert not [warning for warning in again if "not captured" in str(warning.message)]


def test_a_model_of_which_nothing_can_be_captured_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"made no attention call .* ByHand multiplies a softmax itself"):  # noqa: SIM117
        with torch.no_grad(), attncap.capture(model := ByHand()):
            model(seeded(16, 2, 5, WIDTH))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(1, WIDTH))
    with pytest.raises(UnsupportedError, match=r"model: .* is TorchScript, inside which no call can be seen"):
        attncap.capture(scripted)


def test_calls_outside_every_module_are_named_where_nothing_else_was_captured() -> None:
    tokens = seeded(17, 1, 2, 5, 4)
    model = Attention()
    with pytest.warns(UserWarning, match=r"outside the forward of any module of the model \(1\)"):  # noqa: SIM117
        with attncap.capture(model):
            F.scaled_dot_product_attention(tokens, tokens, tokens)
    with torch.no_grad(), attncap.capture(model) as cap:
        F.scaled_dot_product_attention(tokens, tokens, tokens)
        model(seeded(17, 2, 5, WIDTH))
    assert (cap.count("entropy") == 10).all()


def test_a_softmax_that_is_no_attention_is_not_named() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.gate = Attention(), nn.Linear(WIDTH, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            tokens = self.attn(tokens)
            return torch.softmax(self.gate(tokens), dim=-1) * (tokens @ tokens.transpose(1, 2)).mean()

    model = Mixture()
    with torch.no_grad(), warnings.catch_warnings(), attncap.capture(model):
        warnings.simplefilter("error")
        model(seeded(18, 2, 5, WIDTH))


def test_nested_tensors_are_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    nested = torch.nested.nested_tensor([seeded(20, 3, WIDTH), seeded(21, 5, WIDTH)])
    with pytest.raises(UnsupportedError, match="src: TransformerEncoder was given a nested tensor"):  # noqa: SIM117
        with torch.no_grad(), attncap.capture(model):
            model(nested)


# Nothing is left behind.


def traces(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a capture could leave behind."""
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
        )
    ]
    return sum(hooks), torch._C._len_torch_function_stack(), torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException] | None) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), Attention()).eval()
    tokens = seeded(22, 2, 5, WIDTH)
    with torch.no_grad():
        before, clean = model(tokens), traces(model)
        cap = attncap.capture(model)
        if error is None:
            with cap:
                model(tokens)
        else:
            raised = error

            def fail(*_: Any, **__: Any) -> Tensor:
                raise raised

            model[1].function = fail
            with pytest.raises(error), cap:
                model(tokens)
            model[1].function = F.scaled_dot_product_attention
        assert traces(model) == clean
        assert torch.equal(model(tokens), before)
        with cap:  # and the next forward is named right
            model(tokens)
    assert cap.layers == ("0.layers.0.self_attn", "0.layers.1.self_attn", "1")


def test_an_interrupt_inside_the_block_does_not_confuse_the_next_forward() -> None:
    model, tokens = nn.Sequential(nn.Sequential(Attention())), seeded(22, 2, 5, WIDTH)
    function = model[0][0].function

    def interrupt(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with torch.no_grad(), attncap.capture(model) as cap:
        model[0][0].function = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
        model[0][0].function = function
        model(tokens)
    assert cap.layers == ("0.0",)
    assert (cap.count("entropy") == 10).all()


def test_captures_of_two_models_at_once_do_not_mix() -> None:
    one, other = nn.Sequential(Attention()), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    tokens = seeded(23, 2, 5, WIDTH)
    with torch.no_grad(), attncap.capture(one) as outer, attncap.capture(other) as inner:
        for _ in range(2):
            other(tokens, tokens, tokens)
        one(tokens)
        with pytest.raises(RuntimeError, match="captured already"), attncap.capture(one[0]):
            pass
    assert (outer.layers, inner.layers) == (("0",), ("MultiheadAttention",))
    assert (outer.count("entropy") == 10).all()
    assert (inner.count("entropy") == 20).all()


def test_threads_may_run_the_model_and_others_are_left_alone() -> None:
    model, stranger, tokens = Attention(), Attention(), seeded(24, 2, 5, WIDTH)
    results: list[Tensor] = []

    def work(module: nn.Module) -> None:
        with torch.no_grad():
            results.extend(module(tokens) for _ in range(5))

    with torch.no_grad(), attncap.capture(model) as cap:
        threads = [threading.Thread(target=work, args=(one,)) for one in (model, model, model, stranger)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 20
        assert (cap.count("entropy") == 15 * 10).all()


def test_captures_in_several_threads_do_not_mix() -> None:
    tokens, counts = seeded(25, 2, 5, WIDTH), []

    def work(forwards: int) -> None:
        model = nn.Sequential(Attention())
        with torch.no_grad(), attncap.capture(model) as cap:
            for _ in range(forwards):
                model(tokens)
        counts.append((forwards, int(cap.count("entropy")[0, 0])))

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [(1, 10), (2, 20), (3, 30)]


# torch.compile.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(is_causal=True)
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)

    def forward(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = tokens + self.attn(tokens)
        return self.layer(tokens + self.heads(tokens, tokens, tokens, key_padding_mask=attention_mask == 0)[0])


@pytest.mark.parametrize("warm", [False, True], ids=["compiled inside", "compiled before"])
def test_a_compiled_model_keeps_its_whole_graph_and_its_statistics(warm: bool) -> None:
    model, tokens = Network().eval(), seeded(26, 2, 5, WIDTH)
    batch = {
        "input_ids": torch.tensor([[0, 1, 0, 2, 1], [1, 1, 2, 0, 0]]),
        "attention_mask": (~padding([5, 3], 5)).long(),
    }
    options: dict[str, Any] = {"tags": {"duplicate": attncap.tags.duplicate}}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(tokens, **batch) if warm else model(tokens, **batch)
        with attncap.capture(model, FULL, **options) as plain:
            model(tokens, **batch)
        for captured in (model, compiled):
            with attncap.capture(captured, FULL, **options) as cap:
                found = [compiled(tokens, **batch) for _ in range(3)]
            assert cap.layers == plain.layers == ("attn", "heads", "layer.self_attn")
            for one in found:
                torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
            for name in plain.accumulator.stats:
                assert torch.equal(cap.count(name), 3 * plain.count(name)), name
                torch.testing.assert_close(cap.mean(name), plain.mean(name), equal_nan=True, **TOLERANCE)
        torch.testing.assert_close(compiled(tokens, **batch), expected, atol=1e-5, rtol=1e-5)
    assert torch._C._len_torch_function_stack() == 0


def test_more_captures_than_torch_compile_makes_graphs() -> None:
    model, tokens = nn.Sequential(Attention()), seeded(26, 2, 5, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    limit = torch._dynamo.config.recompile_limit
    with torch.no_grad():
        for _ in range(limit + 2):
            with attncap.capture(model) as cap:
                compiled(tokens)
            assert (cap.count("entropy") == 10).all()
    assert torch._dynamo.config.recompile_limit == limit


def test_parts_that_are_compiled_by_themselves() -> None:
    model, tokens = nn.Sequential(torch.compile(Attention(), backend="eager"), Attention()), seeded(26, 2, 5, WIDTH)
    model[1].compile(backend="eager")
    with torch.no_grad(), attncap.capture(model, keep="last", spec=FULL) as cap:
        model(tokens)
    assert cap.layers == ("0", "1")
    assert_stats_match(cap.stats["0"], model[0]._orig_mod.map(tokens), every_row(2, 5))


# Transformers models whose parts call torch's functions.


def test_the_parts_of_a_transformers_model_that_call_torch_are_captured_too() -> None:
    model, pixels = models.siglip(), seeded(27, 2, 3, 12, 12)
    with torch.no_grad():
        before = model(pixels).pooler_output
        with attncap.capture(model, FULL, keep="last") as cap:
            inside = model(pixels).pooler_output
        assert torch.equal(model(pixels).pooler_output, before)
        maps = maps_in_float64(model, pixels)
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert len(cap.layers) == 3
    assert_stats_match(cap.stats["head.attention"], maps["head.attention"], every_row(2, 1))


def test_what_is_written_around_a_transformers_model_is_captured_too() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = models.text_model("bert"), Attention()
            self.down = nn.Linear(16, WIDTH)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.pool(self.down(self.body(**batch).last_hidden_state))

    model, batch = Pooled(), models.tokens(3, 9, seed=2, padding="left")
    tags = {"duplicate": attncap.tags.duplicate}
    with torch.no_grad(), attncap.capture(model, FULL, keep="last", tags=tags) as cap:
        model(batch)
        expected = model.pool.map(model.down(model.body(**batch).last_hidden_state))
    assert cap.layers == ("body.encoder.layer.0.attention.self", "body.encoder.layer.1.attention.self", "pool")
    assert_stats_match(cap.stats["pool"], expected, batch["attention_mask"].bool())
    assert cap.stats["body.encoder.layer.1.attention.self"].tag_mass is not None
    with torch.no_grad(), attncap.capture(model, layers=[-1]) as cap:
        model(batch)
    assert cap.layers == ("body.encoder.layer.1.attention.self",)


# Wrappers.


def test_modules_have_the_names_they_have_without_their_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    tokens = seeded(28, 2, 5, WIDTH)
    inner = nn.Sequential(checkpoint_wrapper(nn.Sequential(Attention())), torch.compile(Attention(), backend="eager"))
    model = nn.DataParallel(inner)
    with torch.no_grad(), attncap.capture(model) as cap:
        model(tokens)
    assert cap.layers == ("0.0", "1")
    with torch.no_grad(), attncap.capture(model, layers=["0.0"]) as cap:
        model(tokens)
    assert cap.layers == ("0.0",)
