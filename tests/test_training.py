"""Models that are trained inside a capture: their gradients, what is counted, and what backwards tell of heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attncap
import attncap.nn
from attncap import StatSpec, UnsupportedError
from attncap.analysis import head_importance
from tests import maps, models
from tests.plain import WIDTH, Attention, seeded

BATCH = models.tokens(2, 7, seed=1, padding="right")
DUPLICATE = {"duplicate": attncap.tags.duplicate}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training_model(kind: str) -> Any:
    """In training mode, without dropout."""
    model = models.text_model(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    return model.requires_grad_()


def loss_of(model: Any, batch: Any = BATCH) -> Tensor:
    """Depends on every entry of the output at a token."""
    out = model(**batch)[0].double()
    weight = torch.linspace(-1, 1, out[0].numel(), dtype=torch.float64).view(out.shape[1:])
    tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return (out * weight * tokens[..., None]).sum()


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def collected(model: Any) -> dict[str, Tensor]:
    """What backwards left at the parameters."""
    named = model.named_parameters()
    return {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in named}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = max(1.0, float(expected[name].abs().max()))
        off = float((gradient - expected[name]).abs().max())
        assert off <= 2e-5 * size, f"{name}: {off} of {size}"


def assert_same_summary(found: attncap.Capture, expected: attncap.Capture) -> None:
    assert found.layers == expected.layers
    assert found.accumulator.stats == expected.accumulator.stats
    for stat in expected.accumulator.stats:
        assert torch.equal(found.count(stat), expected.count(stat)), stat
        torch.testing.assert_close(found.mean(stat), expected.mean(stat), equal_nan=True, **CLOSE)


def observed(model: Any, **options: Any) -> attncap.Capture:
    """The capture of one forward without gradients."""
    with torch.no_grad(), attncap.capture(model, maps.FULL, **options) as cap:
        model(**BATCH)
    return cap


# Gradients.


@pytest.mark.parametrize("kind", ["bert", "llama", "gemma2", "gpt_oss", "gpt2"])
def test_a_captured_model_has_the_gradients_of_its_eager_attention(kind: str) -> None:
    model = training_model(kind)
    twin = maps.eager(model)
    expected = gradients_of(twin, loss_of(twin))
    with attncap.capture(model, maps.FULL, tags=DUPLICATE) as cap:
        found = gradients_of(model, loss_of(model))
    assert_same(found, expected)
    assert_same_summary(cap, observed(model, tags=DUPLICATE))


def test_a_learned_bias_has_its_gradient() -> None:
    """T5 adds a table of position biases to the scores."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = transformers.T5EncoderModel(config).train()
    twin = maps.eager(model)
    expected = gradients_of(twin, loss_of(twin))
    with attncap.capture(model):
        found = gradients_of(model, loss_of(model))
    assert any(gradient.any() for name, gradient in found.items() if "relative_attention_bias" in name)
    assert_same(found, expected)


class Layer(nn.Module):
    """Torch's attention module, with a floating mask that is learned."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.bias = nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.attention(tokens, tokens, tokens, key_padding_mask=padding, attn_mask=self.bias)[0]
        return out


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_torchs_module_and_attncaps_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    theirs = Layer(nn.MultiheadAttention(12, 2, batch_first=True))
    ours = Layer(attncap.nn.MultiheadAttention(12, 2, batch_first=True))
    ours.load_state_dict(theirs.state_dict())
    tokens, padding = torch.randn(3, 5, 12), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [4], [2]])
    expected = gradients_of(theirs, theirs(tokens, padding).square().sum())
    assert_same(gradients_of(ours, ours(tokens, padding).square().sum()), expected)
    with attncap.capture(theirs) as cap:
        assert_same(gradients_of(theirs, theirs(tokens, padding).square().sum()), expected)
    assert (cap.count("entropy") == 11).all()


def test_statistics_of_the_module_may_be_part_of_a_loss() -> None:
    torch.manual_seed(0)
    module = attncap.nn.MultiheadAttention(12, 2, batch_first=True)
    _, stats = module(*[torch.randn(2, 6, 12)] * 3)
    before = stats.entropy.mean()
    for parameter, gradient in zip(
        module.parameters(), torch.autograd.grad(-before, module.parameters(), allow_unused=True), strict=True
    ):
        if gradient is not None:
            parameter.data -= 0.5 * gradient
    torch.manual_seed(0)
    attncap.nn.MultiheadAttention(12, 2, batch_first=True)
    _, stats = module(*[torch.randn(2, 6, 12)] * 3)
    assert stats.entropy.mean() > before


def test_mixed_precision_has_gradients_as_exact_as_torchs() -> None:
    model, tokens = Attention().requires_grad_(), seeded(3, 2, 5, WIDTH)
    exact = gradients_of(twin := copy.deepcopy(model).double(), twin(tokens.double()).square().sum())
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients_of(model, model(tokens).square().sum())
        with attncap.capture(model):
            found = gradients_of(model, model(tokens).square().sum())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        allowed = 2 * (plain[name] - exact[name]).abs().max() + 2**-8 * exact[name].abs().max()
        assert (gradient - exact[name]).abs().max() <= allowed, name


def test_statistics_keep_no_graph_unless_they_are_asked_to() -> None:
    model = training_model("llama")
    with attncap.capture(model, keep="last") as cap:
        model(**BATCH)
    assert not any(tensor.requires_grad for stats in cap.stats.values() for _, tensor in stats.items())
    with attncap.capture(model, keep="last", differentiable=True) as cap:
        model(**BATCH)
    entropy = sum(stats.entropy.sum() for stats in cap.stats.values())
    found = gradients_of(model, entropy)

    twin = maps.eager(model)
    with maps.eager_calls(twin) as calls:
        twin(**BATCH)
    rows = BATCH["attention_mask"].bool()[:, None]
    expected = torch.zeros(())
    for (call,) in calls.values():
        logs = torch.where(call.prob > 0, call.prob, 1.0).log()
        expected = expected - ((call.prob * logs).sum(-1) * rows).sum()
    torch.testing.assert_close(entropy, expected)
    assert_same(found, gradients_of(twin, expected))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"differentiable": True}, ValueError, r'differentiable: expected keep="last" or "all" .* got keep="summary"'),
        ({"differentiable": True, "keep": "all", "importance": True}, ValueError, "got importance=True"),
        ({"importance": 1}, TypeError, r"importance: expected a bool, got int \(1\)"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attncap.capture(Attention(), **options)


# What is counted.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_rows_that_checkpointing_computes_once_more_are_counted_once(kind: str, reentrant: bool) -> None:
    model = training_model(kind)
    expected = gradients_of(model, loss_of(model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with attncap.capture(model, maps.FULL, tags=DUPLICATE) as cap:
        loss_of(model).backward()
    assert_same(collected(model), expected)
    assert_same_summary(cap, observed(model.eval(), tags=DUPLICATE))


class Checkpointed(nn.Module):
    """Two attentions, each computed once more in the backward."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            tokens = tokens + checkpoint(layer, tokens, use_reentrant=self.reentrant)
        return tokens


def test_padding_and_tags_need_not_be_known_when_a_layer_is_computed_once_more() -> None:
    model, tokens = Checkpointed(), seeded(4, 2, 5, WIDTH).requires_grad_()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tags = {"all": lambda batch: (batch["attention_mask"].long(), batch["attention_mask"].long())}
    expected = torch.autograd.grad(model(tokens, mask).square().sum(), tokens)
    with attncap.capture(model, maps.FULL, tags=tags, importance=True) as cap:
        found = torch.autograd.grad(model(tokens, mask).square().sum(), tokens)
    torch.testing.assert_close(found, expected, **CLOSE)
    for stat in ("entropy", "all", "importance"):
        assert (cap.count(stat) == 8).all(), stat


def test_importance_under_reentrant_checkpointing_counts_no_padding() -> None:
    """What is not told to the function that is run once more is not known to its backward."""
    model, tokens = Checkpointed(reentrant=True), seeded(4, 2, 5, WIDTH).requires_grad_()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    message = "importance: reentrant activation checkpointing runs layers.1 once more without its padding"
    with attncap.capture(model, importance=True) as cap:
        model(tokens).square().sum().backward()
        assert (cap.count("importance") == 10).all()
        with pytest.raises(UnsupportedError, match=message):
            model(tokens, mask).square().sum().backward()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_importance_is_the_same_under_reentrant_checkpointing(kind: str) -> None:
    """Transformers gives its layers the mask."""
    model = training_model(kind)
    with attncap.capture(model, importance=True) as plain:
        loss_of(model).backward()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with attncap.capture(model, importance=True) as cap:
        loss_of(model).backward()
    assert (cap.count("importance") == BATCH["attention_mask"].sum()).all()
    torch.testing.assert_close(cap.mean("importance"), plain.mean("importance"), **CLOSE)


def test_importance_of_cross_attention_is_the_same_under_reentrant_checkpointing() -> None:
    """As many rows as keys, of which the keys' padding is not the rows'."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = transformers.T5Model(transformers.T5Config(**sizes, dropout_rate=0.0)).train()
    batch = BATCH | {"decoder_input_ids": BATCH["input_ids"].flip(0)}

    def importance() -> tuple[Tensor, Tensor]:
        with attncap.capture(model, importance=True) as cap:
            model(**batch)[0].square().sum().backward()
        return cap.count("importance"), cap.mean("importance")

    counts, means = importance()
    model.activation_checkpointing_enable({"use_reentrant": True})
    found_counts, found_means = importance()
    assert torch.equal(found_counts, counts)
    torch.testing.assert_close(found_means, means, **CLOSE)


# Statistics in a loss, under checkpointing.


def entropy_gradients(model: Any, *, every_row: bool = False, **options: Any) -> dict[str, Tensor]:
    """Of a loss that the output and the entropies of all layers are part of."""
    with attncap.capture(model, keep="last", differentiable=True, **options) as cap:
        loss = loss_of(model)
        loss = loss + sum(stats.entropy.square().sum() for stats in cap.stats.values())
        return gradients_of(model, loss)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_statistics_under_checkpointing_have_the_gradients_that_they_have_without(kind: str) -> None:
    model = training_model(kind)
    expected = entropy_gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(entropy_gradients(model), expected)


def test_statistics_under_reentrant_checkpointing_are_refused_by_name() -> None:
    model = training_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with attncap.capture(model, keep="last", differentiable=True) as cap:
        loss = loss_of(model) + sum(stats.entropy.sum() for stats in cap.stats.values())
        with pytest.raises(
            UnsupportedError, match=r"differentiable: under reentrant .* of model\.layers\.1\.self_attn have no"
        ):
            loss.backward()


def test_statistics_that_depend_on_what_checkpointing_forgets_are_refused_by_name() -> None:
    model, tokens = Checkpointed(), seeded(4, 2, 5, WIDTH).requires_grad_()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    tags = {"all": lambda batch: (batch["attention_mask"].long(), batch["attention_mask"].long())}
    for options, lost in (({}, "padding"), ({"tags": tags}, "padding and tags")):
        with attncap.capture(model, keep="last", differentiable=True, **options) as cap:
            model(tokens, mask)
            entropy = cap.stats["layers.1"].entropy.sum()
            with pytest.raises(
                UnsupportedError, match=f"differentiable: .* runs layers.1 once more without its {lost},"
            ):
                entropy.backward()


def test_layers_that_a_forward_leaves_out_are_left_out_when_they_are_computed_once_more() -> None:
    model = training_model("llama")
    model.activation_checkpointing_enable()
    expected = gradients_of(model, loss_of(model))
    with attncap.capture(model, every=2) as cap:
        for _ in range(4):
            assert_same(gradients_of(model, loss_of(model)), expected)
    assert (cap.count("entropy") == 2 * 9).all()


def test_gradients_accumulate_over_batches() -> None:
    model, batches = training_model("llama"), [models.tokens(2, length, seed=length) for length in (5, 8)]
    for batch in batches:
        loss_of(model, batch).backward()
    expected = collected(model)
    model.zero_grad()
    with attncap.capture(model, importance=True) as cap:
        for batch in batches:
            loss_of(model, batch).backward()
    assert_same(collected(model), expected)
    assert (cap.count("entropy") == 26).all()
    assert (cap.count("importance") == 26).all()


# Under torch.compile. Inductor itself imports parts of torch.jit that warn of their age.


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("kind", "backend"), [("llama", "inductor"), ("gpt_oss", "aot_eager"), ("bert", "aot_eager")])
def test_a_compiled_model_trains_inside_a_capture(kind: str, backend: str) -> None:
    model = training_model(kind)
    with attncap.capture(model, maps.FULL, importance=True) as plain:
        expected = gradients_of(model, loss_of(model))
    graph = torch.compile(model, fullgraph=True, backend=backend)
    with attncap.capture(graph, maps.FULL, importance=True) as cap:
        found = gradients_of(model, loss_of(graph))
    assert_same(found, expected)
    assert_same_summary(cap, plain)


# Importance.


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_importance_is_the_derivative_by_a_gate_on_each_head(kind: str) -> None:
    model = training_model(kind)
    expected = head_importance(model, [BATCH], loss_of)
    with attncap.capture(model, StatSpec.none(), importance=True) as cap:
        loss_of(model).backward()
    torch.testing.assert_close(cap.mean("importance"), expected, **CLOSE)
    assert (cap.count("importance") == BATCH["attention_mask"].sum()).all()


def test_importance_of_chosen_heads_and_of_torch_modules() -> None:
    model, tokens = nn.Sequential(Attention(), Attention()), seeded(5, 2, 5, WIDTH).requires_grad_()
    with attncap.capture(model, importance=True) as whole:
        model(tokens).square().sum().backward()
    with attncap.capture(model, layers={"0": [1], "1": None}, importance=True) as part:
        model(tokens).square().sum().backward()
    assert (whole.count("importance") == 10).all()
    assert part.count("importance")[0].tolist() == [0, 10]
    torch.testing.assert_close(part.mean("importance")[0, 1], whole.mean("importance")[0, 1])


def test_no_importance_without_being_asked_for_or_without_a_backward() -> None:
    model, tokens = Attention(), seeded(6, 2, 5, WIDTH).requires_grad_()
    with attncap.capture(model) as cap:
        model(tokens).sum().backward()
    assert "importance" not in cap.accumulator.stats
    with attncap.capture(model, importance=True) as cap:
        model(tokens)
    with pytest.raises(ValueError, match=r"stat: expected one of .*, got 'importance'"):
        cap.mean("importance")
