"""Heads switched off, what that costs, and how much the gradient says it would: against models changed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attncap
from attncap import StatSpec, UnsupportedError
from attncap.analysis import ablate, head_importance, leave_one_out, pruning_curve
from attncap.analysis.blocks import attention_blocks
from attncap.capture import Capture
from attncap.nn import MultiheadAttention
from tests import handmade

pytest.importorskip("transformers")

from tests import models

KINDS = ("bert", "gpt2", "llama", "modernbert")
HEADS = [(0, 1), (1, 0), (1, 3)]


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def with_weights_cut(model: Any, heads: list[tuple[int, int]]) -> Any:
    """A copy in which the output projection does not read these heads."""
    cut = copy.deepcopy(model)
    blocks = attention_blocks(cut)
    with torch.no_grad():
        for layer, head in heads:
            block = blocks[layer]
            rows = slice(head * block.value_dim, (head + 1) * block.value_dim)
            weight = block.out.weight
            (weight if type(block.out).__name__ == "Conv1D" else weight.T)[rows] = 0
    return cut


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_a_model_whose_output_projection_does_not_read_the_heads(kind):
    model, batch = models.text_model(kind), models.tokens(2, 9, 1, "right")
    before = output(model, batch)
    with ablate(model, HEADS):
        found = output(model, batch)
    torch.testing.assert_close(found, output(with_weights_cut(model, HEADS), batch))
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(output(model, batch), before)
    assert sum(hooks_of(model)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_is_the_mean_of_the_values_that_a_row_sees(kind):
    """The heads give what attention of scale 0 gives over the same keys and mask; the others are untouched."""
    model, batch = models.text_model(kind), models.tokens(2, 9, 1, "right")
    seen: list[tuple[Any, Tensor]] = []
    first = attention_blocks(model)[0].name
    watching = Capture(model, StatSpec(), layers=[first], watch=lambda _, call, out, stats: seen.append((call, out)))
    with torch.no_grad(), ablate(model, [(0, 1), (0, 2)], "uniform"), watching:
        model(**batch)
    ((call, out),) = seen
    expected, _ = attncap.attention(
        call.query, call.key, call.value, attn_mask=call.attn_mask, causal=call.causal, scale=0.0, window=call.window,
        query_offset=call.query_offset,
    )  # fmt: skip
    torch.testing.assert_close(out[:, 1:3], expected[:, 1:3])
    assert not torch.allclose(out[:, 0], expected[:, 0], atol=1e-3)
    assert sum(hooks_of(model)) == 0


def test_mean_puts_each_heads_mean_over_the_tokens_in_its_place():
    model = models.text_model("bert")
    batches = [models.tokens(3, 8, seed, "right") for seed in (1, 2)]
    block = attention_blocks(model)[1]
    given: list[Tensor] = []
    for batch in batches:
        handle = block.out.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        output(model, batch)
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    tokens = torch.cat([one[mask] for one, mask in zip(given, masks, strict=True)])
    mean = tokens.unflatten(-1, (block.heads, block.value_dim)).mean(0)[2]
    inside: list[Tensor] = []
    with ablate(model, [(block.name, 2)], "mean", batches=batches):
        handle = block.out.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
        output(model, batches[0])
    handle.remove()
    found = inside[0].unflatten(-1, (block.heads, block.value_dim))
    torch.testing.assert_close(found[:, :, 2], mean.expand(3, 8, -1))
    others = [0, 1, 3]
    original = given[0].unflatten(-1, (block.heads, block.value_dim))
    torch.testing.assert_close(found[:, :, others], original[:, :, others])


def torch_model(own: bool, batch_first: bool) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=batch_first).eval()
    if own:
        module = MultiheadAttention(12, 3, batch_first=batch_first)
        module.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = module.eval()
    nn.init.normal_(layer.self_attn.out_proj.bias)
    nn.init.normal_(layer.self_attn.in_proj_bias)
    return layer


@pytest.mark.parametrize("own", [False, True], ids=["torch", "attncap"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_modules_are_ablated_as_if_their_weights_were_changed(own, batch_first):
    """Inside nn.TransformerEncoderLayer, whose fused kernel would look at no module."""
    layer = torch_model(own, batch_first)
    hidden = torch.randn(4, 5, 12)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    cut, uniform = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        cut.self_attn.out_proj.weight[:, 4:8] = 0
        uniform.self_attn.in_proj_weight[4:8] = 0
        uniform.self_attn.in_proj_bias[4:8] = 0
        for how, changed in (("zero", cut), ("uniform", uniform)):
            with ablate(layer, [("self_attn", 1)], how):
                found = layer(hidden)
            torch.testing.assert_close(found, changed(hidden), atol=1e-5, rtol=1e-4)
            assert not torch.allclose(found, layer(hidden), atol=1e-3)
    assert sum(hooks_of(layer)) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert all(
        isinstance(one, nn.Parameter) for one in (layer.self_attn.in_proj_weight, layer.self_attn.out_proj.weight)
    )


def test_ablations_of_torchs_module_may_stand_inside_each_other():
    layer = torch_model(own=False, batch_first=True)
    hidden, weight = torch.randn(4, 5, 12), layer.self_attn.out_proj.weight
    with torch.no_grad(), ablate(layer, [(0, 0), (0, 2)]):
        expected = layer(hidden)
    with torch.no_grad(), ablate(layer, [(0, 0)]), ablate(layer, [(0, 2)]):
        torch.testing.assert_close(layer(hidden), expected)
    with ablate(layer, [(0, 1)]):
        importance = head_importance(layer, [hidden], lambda model, batch: model(batch).square().sum())
    assert importance[0, 1] == 0
    assert (importance[0, [0, 2]] > 0).all()
    assert layer.self_attn.out_proj.weight is weight


def test_nothing_is_left_behind_where_the_model_fails():
    layer = torch_model(own=False, batch_first=True)
    weight = layer.self_attn.out_proj.weight
    with pytest.raises((RuntimeError, AssertionError)), ablate(layer, [(0, 0)]):
        layer.self_attn(torch.ones(1, 2, 7), torch.ones(1, 2, 7), torch.ones(1, 2, 7))
    assert layer.self_attn.out_proj.weight is weight
    assert sum(hooks_of(layer)) == 0


def test_gradients_flow_through_an_ablated_model():
    layer = torch_model(own=False, batch_first=True)
    with ablate(layer, [(0, 1)]):
        layer(torch.randn(2, 5, 12)).square().sum().backward()
    gradient = layer.self_attn.out_proj.weight.grad
    assert gradient is not None
    assert (gradient[:, 4:8] == 0).all()
    assert (gradient[:, :4] != 0).any()


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    tokens = batch["input_ids"]
    out = model(**batch)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def induction_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of the second half, which follows from the first."""
    half = handmade.VOCABULARY
    return F.cross_entropy(model(tokens)[:, half:-1].flatten(0, 1), tokens[:, half + 1 :].flatten())


# Llama's normalisation rounds to float32 inside, so its differences need a larger step.
@pytest.mark.parametrize(("kind", "step", "within"), [("gpt2", 1e-5, 1e-6), ("llama", 3e-3, 3e-3)])
def test_importance_is_the_derivative_by_a_gate_on_each_token(kind, step, within):
    """Against central differences of the loss in float64, one gate at a time."""
    model = models.text_model(kind).double()
    batch = models.tokens(1, 5, 3)
    found = head_importance(model, [batch], loss_of)
    block = attention_blocks(model)[1]
    for head in range(2):
        slopes = []
        for token in range(5):
            losses = []
            for gate in (1 + step, 1 - step):

                def gated(_: Any, args: Any, gate: float = gate, token: int = token, head: int = head) -> Any:
                    heads = args[0].unflatten(-1, (block.heads, block.value_dim)).clone()
                    heads[:, token, head] *= gate
                    return (heads.flatten(-2),)

                handle = block.out.register_forward_pre_hook(gated)
                with torch.no_grad():
                    losses.append(float(loss_of(model, batch)))
                handle.remove()
            slopes.append((losses[0] - losses[1]) / (2 * step))
        expected = sum(abs(slope) for slope in slopes) / len(slopes)
        assert float(found[1, head]) == pytest.approx(expected, rel=within)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(hooks_of(model)) == 0


def test_importance_of_frozen_models_and_of_torchs_modules():
    layer = torch_model(own=False, batch_first=False).requires_grad_(False)
    hidden = torch.randn(4, 2, 12)
    found = head_importance(layer, [hidden], lambda model, batch: model(batch).square().sum())
    assert found.shape == (1, 3)
    assert (found > 0).all()


def test_padding_does_not_count_for_importance():
    model = models.text_model("bert")
    tokens = models.tokens(1, 6, 2)["input_ids"]
    padded = {"input_ids": F.pad(tokens, (0, 3)), "attention_mask": F.pad(torch.ones_like(tokens), (0, 3))}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch)[0][:, 0].square().sum()

    alone = head_importance(model, [{"input_ids": tokens}], loss)
    torch.testing.assert_close(head_importance(model, [padded], loss), alone, atol=1e-5, rtol=1e-4)


def test_the_induction_head_matters_and_goes_last():
    model = handmade.InductionModel()
    batches = [handmade.repeated(2, seed) for seed in (0, 1)]
    importance = head_importance(model, batches, induction_loss)
    assert importance.argmax() == 2  # layer 1 head 0
    curve = pruning_curve(model, batches, induction_loss, importance)
    assert [point.removed for point in curve] == [0, 1, 2, 3, 4]
    with torch.no_grad():
        whole = sum(float(induction_loss(model, batch)) for batch in batches) / 2
    assert curve[0].loss == pytest.approx(whole)
    assert curve[-1].newest == (handmade.INDUCTION,)
    assert curve[-1].loss > 2
    first_gone = pruning_curve(model, batches, induction_loss, [handmade.PREVIOUS], how="uniform")
    assert first_gone[1].loss > whole + 1


def test_steps_and_orders_of_pruning():
    model, batches = handmade.InductionModel(), [handmade.repeated(2, 0)]
    order = [(1, 0), (0, 0), (1, 1)]
    curve = pruning_curve(model, batches, induction_loss, order, steps=[0, 2])
    assert [point.newest for point in curve] == [(), ((1, 0), (0, 0))]
    ranked = pruning_curve(model, batches, induction_loss, torch.tensor([[3.0, torch.nan], [1.0, 2.0]]), how="mean")
    assert [point.newest for point in ranked] == [(), ((1, 0),), ((1, 1),), ((0, 0),)]
    with pytest.raises(ValueError, match="steps: expected rising numbers from 0 to 3"):
        pruning_curve(model, batches, induction_loss, order, steps=[2, 1])


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([(0, 4)], {}, "has the heads 0 to 3, got 4"),
        ([(2, 0)], {}, "expected a layer from 0 to 1, got 2"),
        ([("nowhere", 0)], {}, "expected a layer among"),
        ([(0, 0)], {"how": "half"}, "how: expected one of zero, mean, uniform"),
        ([(0, 0)], {"how": "mean"}, "batches: expected batches to take the mean over, got None"),
        ([(0, 0)], {"batches": []}, "batches: expected None"),
    ],
)
def test_wrong_arguments_are_named(heads, options, message):
    with pytest.raises(ValueError, match=message), ablate(models.text_model("bert"), heads, **options):
        pass


@pytest.mark.parametrize("model", [models.t5, lambda: models.text_model("gpt_oss")], ids=["t5", "gpt_oss"])
def test_uniform_is_refused_where_scores_do_not_come_from_the_query_alone(model):
    with (
        pytest.raises(UnsupportedError, match="do not come from the query alone"),
        ablate(model(), [(0, 0)], "uniform"),
    ):
        pass


def test_each_head_by_itself_costs_what_the_model_without_it_does():
    model, batches = models.text_model("gpt2"), [models.tokens(2, 9, seed) for seed in (1, 2)]

    def loss(one: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return one(**batch, labels=batch["input_ids"]).loss.detach()

    found = leave_one_out(model, batches, loss)
    whole = sum(loss(model, batch) for batch in batches) / 2
    for layer, head in HEADS:
        without = with_weights_cut(model, [(layer, head)])
        expected = sum(loss(without, batch) for batch in batches) / 2 - whole
        assert float(found[layer, head]) == pytest.approx(float(expected), abs=1e-5)
    assert found.shape == (2, 4)
