"""`capture` as it is used: what it keeps, what it leaves behind, which layers, tags, features and refusals."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attncap
from attncap import StatSpec, UnsupportedError, tags
from attncap.adapters.delegate import eager_parameters
from tests import maps, models

SMALL = models.tokens(2, 7, seed=1, padding="right")


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def output(model: Any, batch: dict[str, Any] = SMALL) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def names_registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS) | set(AttentionMaskInterface._global_mapping)


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


# Which layers.


def test_unselected_layers_keep_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.text_model("mistral")
    calls = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counting(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return own(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counting)
    before = output(model)
    calls.clear()
    with attncap.capture(model, layers=["model.layers.1.self_attn"]) as cap:
        inside = output(model)
    assert cap.layers == ("model.layers.1.self_attn",)
    assert calls == [0]
    kept = SMALL["attention_mask"].bool()
    torch.testing.assert_close(inside[kept], before[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gemma2", "mistral", "gpt_oss"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_unselected_layers_on_eager_attention_give_the_same_output(kind: str, padding: str) -> None:
    batch = models.tokens(2, 8, seed=4, padding=padding)
    model = maps.eager(models.text_model(kind))
    before = output(model, batch)
    with attncap.capture(model, layers=[1]) as cap:
        inside = output(model, batch)
    assert len(cap.layers) == 1
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(inside[kept], before[kept], atol=1e-5, rtol=1e-5)


def test_layers_are_named_by_name_or_index() -> None:
    model = models.text_model("bert")
    first, second = "encoder.layer.0.attention.self", "encoder.layer.1.attention.self"
    for layers, expected in (([0], (first,)), ([-1], (second,)), ([second, 0], (first, second))):
        with attncap.capture(model, layers=layers) as cap:
            output(model)
        assert cap.layers == expected
    with pytest.raises(ValueError, match=f"index 2; there are: 0 '{first}', 1 '{second}'"):
        attncap.capture(model, layers=[2])
    with pytest.raises(ValueError, match=f"'encoder'; there are: 0 '{first}'"):
        attncap.capture(model, layers=["encoder"])
    with pytest.raises(TypeError, match="layers"):
        attncap.capture(model, layers=first)
    with pytest.raises(TypeError, match="layers"):
        attncap.capture(model, layers=[True])


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


# Tags and features.


def brute_force_tag(prob: Tensor, query_tags: Tensor, key_tags: Tensor) -> Tensor:
    match = (query_tags[:, :, None] == key_tags[:, None, :]) & (key_tags[:, None, :] >= 0)
    return (prob * match[:, None]).sum(-1)


@pytest.mark.parametrize("positional", [True, False])
def test_tags_and_features_are_functions_of_the_batch(positional: bool) -> None:
    model = models.text_model("llama")
    batch = models.tokens(2, 7, seed=6, padding="right")
    norms = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(7))
    seen: list[set[str]] = []

    def parity(given: Any) -> tuple[Tensor, Tensor]:
        seen.append({name for name, value in given.items() if value is not None})
        return given["input_ids"] % 2, given["input_ids"] % 2

    features = {"norm": lambda given: norms, "place": lambda given: torch.arange(7.0).expand(2, 7)}
    with attncap.capture(model, tags={"parity": parity}, features=features, keep="last") as cap, torch.no_grad():
        if positional:
            model(batch["input_ids"], batch["attention_mask"])
        else:
            model(**batch)
    assert seen == [{"input_ids", "attention_mask"}]
    with torch.no_grad():
        found = maps.eager(model)(**batch, output_attentions=True).attentions
    kept = batch["attention_mask"].bool()[:, None].expand(2, 4, 7)
    for layer, (name, prob) in enumerate(zip(cap.layers, found, strict=True)):
        tags = batch["input_ids"] % 2
        expected = {
            "parity": brute_force_tag(prob, tags, tags),
            "norm[0]": (prob @ norms[:, None])[..., 0],
            "norm[1]": (prob @ norms[:, None])[..., 1],
            "place": prob @ torch.arange(7.0),
        }
        for statistic, wanted in expected.items():
            for head in range(4):
                mean = wanted[:, head][kept[:, head]].double().mean()
                torch.testing.assert_close(cap.mean(statistic)[layer, head], mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cap.stats[name].tag_mass[..., 0][kept], expected["parity"][kept])


WRONG_TAGS = {
    "pair": (lambda batch: batch["input_ids"], TypeError, "query_tags, key_tags"),
    "float": (lambda batch: (torch.zeros(2, 7), torch.zeros(2, 7)), TypeError, "integer query_tags"),
    "none": (lambda batch: (None, None), TypeError, "expected a tensor, got NoneType"),
    "rank": (lambda batch: (torch.zeros(7, dtype=torch.int64),) * 2, ValueError, "shape \\(batch, tokens\\)"),
    "length": (lambda batch: (torch.zeros(2, 5, dtype=torch.int64),) * 2, ValueError, "\\(2, 7\\)"),
}


@pytest.mark.parametrize("name", sorted(WRONG_TAGS))
def test_a_tag_function_that_gives_something_else_is_named(name: str) -> None:
    function, error, message = WRONG_TAGS[name]
    model = models.text_model("bert")
    with pytest.raises(error, match=message), attncap.capture(model, tags={name: function}):
        output(model)
    assert hooks(model) == 0


def test_names_of_tags_and_features_are_checked() -> None:
    model = models.text_model("bert")
    for name in ("entropy", "max_prob", "offset_mass[-1]", "", "relative_entropy", "topk_mass"):
        with pytest.raises(ValueError, match="cannot be a name"):
            attncap.capture(model, tags={name: lambda batch: None})
    with pytest.raises(ValueError, match="'mine' is the name of a tag already"):
        attncap.capture(model, tags={"mine": lambda batch: None}, features={"mine": lambda batch: None})
    with pytest.raises(TypeError, match="expected a function"):
        attncap.capture(model, features={"mine": torch.zeros(2, 7)})
    with pytest.raises(TypeError, match="floating"), attncap.capture(model, features={"f": lambda b: b["input_ids"]}):
        output(model)


def test_tags_while_decoding_say_that_they_cannot() -> None:
    model = models.text_model("llama")
    with attncap.capture(model, tags={"duplicate": tags.duplicate}), torch.no_grad():
        past = model(**models.tokens(1, 5, seed=8)).past_key_values
        with pytest.raises(ValueError, match="cannot follow a cache"):
            model(**models.tokens(1, 1, seed=8), past_key_values=past)


# Refusals.


def test_dropout_is_refused_by_name() -> None:
    model = models.text_model("bert")
    model.train()
    message = r"dropout 0\.1 in training mode; call model\.eval\(\)"
    with pytest.raises(UnsupportedError, match=message), attncap.capture(model):
        output(model)
    model.eval()
    assert hooks(model) == 0


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


def test_importing_attncap_does_not_import_transformers() -> None:
    code = "import attncap, sys; attncap.capture; sys.exit('transformers' in sys.modules)"
    root = os.path.dirname(os.path.dirname(attncap.__file__))
    environment = {**os.environ, "PYTHONPATH": root}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
