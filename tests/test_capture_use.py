"""`capture` as it is used: what it keeps, what it leaves behind, what it refuses."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

import attncap
from attncap import StatSpec, UnsupportedError
from attncap.adapters.delegate import eager_parameters
from tests import models
from tests.traces import hooks, names_registered

SMALL = models.tokens(2, 7, seed=1, padding="right")


def output(model: Any, batch: dict[str, Any] = SMALL) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


# What is left behind.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_nothing_is_left_behind(kind: str, implementation: str) -> None:
    model = models.text_model(kind)
    model.set_attn_implementation(implementation)
    before, registered = output(model), names_registered()
    with attncap.capture(model):
        output(model)
        assert names_registered() != registered
    assert torch.equal(output(model), before)
    assert model.config._attn_implementation == implementation
    assert names_registered() == registered
    assert hooks(model) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied_with_the_capture_that_hangs_on_it(copied: Callable[[Any], Any]) -> None:
    model = models.text_model("bert")
    with (
        attncap.capture(model),
        pytest.raises(TypeError, match="neither copied nor pickled while it is captured"),
    ):
        copied(model)
    copied(model)


def test_nothing_is_left_behind_by_an_exception_in_the_middle_of_a_forward() -> None:
    model = models.text_model("bert")
    before, registered = output(model), names_registered()

    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    handle = model.encoder.layer[1].register_forward_pre_hook(fail)
    cap = attncap.capture(model)
    with pytest.raises(KeyError, match="in the middle"), cap:
        output(model)
    handle.remove()
    assert len(cap.layers) == 1  # what ran is still there
    assert torch.equal(output(model), before)
    assert names_registered() == registered
    assert hooks(model) == 0
    with cap:  # and it can go on
        output(model)
    assert cap.count("entropy")[:, 0].tolist() == [2 * SMALL["attention_mask"].sum(), SMALL["attention_mask"].sum()]


def test_a_capture_inside_a_capture_of_the_same_model_is_refused() -> None:
    model = models.text_model("llama")
    with attncap.capture(model) as outer:
        for inner in (model, model.model):
            with pytest.raises(RuntimeError, match="being captured already"), attncap.capture(inner):
                pass
        output(model)
    assert len(outer.layers) == 2
    assert model.config._attn_implementation == "sdpa"


def test_two_models_can_be_captured_at_once() -> None:
    first, second = models.text_model("bert", seed=1), models.text_model("bert", seed=2)
    with attncap.capture(first) as one, attncap.capture(second) as other:
        output(first)
        output(second)
    assert not torch.allclose(one.mean("entropy"), other.mean("entropy"))


def test_a_model_that_shares_the_configuration_is_left_alone() -> None:
    first = models.text_model("bert", seed=1)
    second = type(first)(first.config).eval()
    assert second.config is first.config
    before = output(second)
    with attncap.capture(first) as cap:
        assert torch.equal(output(second), before)
        output(first)
        with pytest.raises(RuntimeError, match="is shared with a model that is being captured"):
            attncap.capture(second).__enter__()
        output(first)
    assert (cap.count("entropy") == 2 * SMALL["attention_mask"].sum()).all()


# What is kept.


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_maps_that_are_never_made_are_warned_of_once(how: str) -> None:
    model = models.text_model("bert")
    given = {"output_attentions": True} if how == "argument" else {}
    model.set_attn_implementation("eager")  # no other lets the configuration ask for maps
    model.config.output_attentions = how == "configuration"
    with attncap.capture(model), torch.no_grad():
        with pytest.warns(UserWarning, match="output_attentions: inside a capture the attention maps are never made"):
            model(**SMALL, **given)
        model(**SMALL, **given)  # a second warning would be an error
        assert not model(**SMALL, **given).attentions


def test_keep_decides_what_stats_holds() -> None:
    model = models.text_model("bert")
    with attncap.capture(model, keep="all") as everything, torch.no_grad():
        model(**SMALL)
        model(**models.tokens(1, 4, seed=2))
    with attncap.capture(model, keep="last") as newest, torch.no_grad():
        model(**SMALL)
        model(**models.tokens(1, 4, seed=2))
    with attncap.capture(model) as summary, torch.no_grad():
        model(**SMALL)
        model(**models.tokens(1, 4, seed=2))
    name = newest.layers[0]
    assert [stats.lse.shape for stats in everything.stats[name]] == [(2, 4, 7), (1, 4, 4)]
    assert newest.stats[name].lse.shape == (1, 4, 4)
    with pytest.raises(ValueError, match='keep="last" or keep="all"'):
        summary.stats[name]
    with pytest.raises(KeyError, match="was not captured; captured: encoder"):
        newest.stats["nothing"]
    assert torch.equal(summary.mean("entropy"), newest.mean("entropy"))
    assert torch.equal(summary.std("entropy"), everything.std("entropy"))


def test_an_unknown_statistic_is_answered_with_the_known_ones() -> None:
    model = models.text_model("bert")
    cap = attncap.capture(model, StatSpec(topk=0))
    with pytest.raises(ValueError, match="nothing was captured yet"):
        cap.mean("entropy")
    with cap:
        output(model)
    with pytest.raises(ValueError, match="expected one of lse, max_logit, entropy"):
        cap.mean("topk_mass")


def test_groups_split_the_summary() -> None:
    model = models.text_model("bert")
    cap = attncap.Capture(model, histogram=True)
    cap.groups = ["short", "long"]
    with cap:
        output(model, models.tokens(2, 9, seed=3, padding="right"))
    counts = {group: cap.accumulator.table("entropy", "count", group)[0, 0].item() for group in cap.accumulator.groups}
    mask = models.tokens(2, 9, seed=3, padding="right")["attention_mask"].sum(-1)
    assert counts == {"short": mask[0], "long": mask[1]}
    assert cap.accumulator.table("entropy", "p50", "short").isfinite().all()


# Nothing of size N x N.


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "gemma2", "modernbert"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_no_mask_of_size_n_by_n_is_made(kind: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.text_model(kind), models.tokens(2, 8, seed=5, padding=padding)

    def refuse(**_: Any) -> None:
        raise AssertionError("a whole mask was made")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)
    with attncap.capture(model) as cap:
        output(model, batch)
    assert len(cap.layers) == model.config.num_hidden_layers


# Refusals.


def test_a_model_without_the_registry_is_refused_by_name() -> None:
    import transformers

    sizes = {"vocab_size": 20, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = transformers.BloomModel(transformers.BloomConfig(**sizes))
    with pytest.raises(UnsupportedError, match="BloomModel does not go through Transformers' AttentionInterface"):
        attncap.capture(model)


def test_an_argument_of_the_eager_attention_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def with_tilt(*args: Any, tilt: float | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", with_tilt)
    eager_parameters.cache_clear()
    model = models.text_model("llama")
    with torch.no_grad(), attncap.capture(model) as cap:
        model(**SMALL, anything_else=1.0)
        with pytest.raises(UnsupportedError, match=r"tilt: model\.layers\.0\.self_attn gives its attention 'tilt'"):
            model(**SMALL, tilt=1.0)
    assert len(cap.layers) == 2
    eager_parameters.cache_clear()


def test_arguments_are_checked() -> None:
    model = models.text_model("bert")
    with pytest.raises(TypeError, match="model: expected a"):
        attncap.capture("bert")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="spec: expected a StatSpec"):
        attncap.capture(model, "entropy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep: expected one of summary, last, all"):
        attncap.capture(model, keep="everything")


# A Transformers model inside another module, and modules that are not Transformers models.


class Pooled(nn.Module):
    """A model around a model, as sentence encoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.text_model("bert")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor]:
        return (self.body(**batch).last_hidden_state.mean(1),)


def test_a_transformers_model_inside_another_module() -> None:
    model = Pooled().eval()
    with attncap.capture(model) as cap, torch.no_grad():
        model(SMALL)
    assert cap.layers == ("body.encoder.layer.0.attention.self", "body.encoder.layer.1.attention.self")
    assert (cap.count("entropy") == SMALL["attention_mask"].sum()).all()


class Block(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(8, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(tokens).chunk(3, dim=-1)
        )
        out = attncap.scaled_dot_product_attention(query, key, value, is_causal=True)
        return tokens + out.transpose(1, 2).flatten(2)


class Plain(nn.Sequential):
    def __init__(self, *heads: int) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Sequential(nn.LayerNorm(8), Block(count)) for count in heads))


def test_plain_modules_are_captured_where_they_call_attncap() -> None:
    model, tokens = Plain(2, 4), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before = model(tokens)
        with attncap.capture(model, keep="last") as cap:
            inside = model(tokens)
    assert torch.equal(inside, before)
    assert cap.layers == ("0.1", "1.1")
    assert cap.count("entropy").tolist() == [[18, 18, 0, 0], [18] * 4]
    assert cap.stats["1.1"].lse.shape == (3, 4, 6)
    assert hooks(model) == 0
    with torch.no_grad():
        model(tokens)
    assert cap.count("entropy")[0, 0] == 18  # the capture is closed


def test_plain_modules_can_be_selected() -> None:
    model, tokens = Plain(2, 2), torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(10))
    for layers, expected in (([1], "1.1"), (["0.1"], "0.1")):
        with attncap.capture(model, layers=layers) as cap, torch.no_grad():
            model(tokens)
        assert cap.layers == (expected,)
    for wrong in (["0.0"], [2]):
        message = re.escape("made no attention call; there are: 0 '0.1', 1 '1.1'")
        with torch.no_grad(), pytest.raises(ValueError, match=message), attncap.capture(model, layers=wrong):
            model(tokens)
    with pytest.raises(ValueError, match="no attention module is called 'x'"):
        attncap.capture(model, layers=["x"])


def test_a_module_that_is_attention_itself_goes_by_the_name_of_its_class() -> None:
    model = Block(2)
    with attncap.capture(model) as cap, torch.no_grad():
        model(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(11)))
    assert cap.layers == ("Block",)


def test_a_module_without_attention_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    message = "Sequential made no attention call that attncap can see"
    with pytest.raises(UnsupportedError, match=message), attncap.capture(model):
        model(torch.zeros(1, 4))
    assert hooks(model) == 0
