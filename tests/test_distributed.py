"""`capture` of models that are spread over processes: two of them, by gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

import attncap
from attncap.accumulate import Accumulator
from tests import maps, models
from tests.two_processes import WORLD, found_by

# What each process does; the results are compared in the test, by name.
KINDS = ("ddp", "ddp_inside", "fsdp1", "fsdp2", "tensor", "tensor_heads", "tensor_gathered", "transformers_plan")
TRAINED = ("ddp", "fsdp2")
HAS_PLAN = hasattr(PreTrainedModel, "_resolve_parallel_plans")


def batches() -> list[dict[str, Tensor]]:
    return [models.tokens(2, 7, seed=1, padding="right"), models.tokens(3, 5, seed=2, padding="left")]


def llama() -> Any:
    return models.text_model("llama")


def run(target: Any, called: Any, batch: dict[str, Tensor], **options: Any) -> tuple[attncap.Capture, Tensor]:
    with torch.no_grad(), attncap.Capture(target, maps.FULL, histogram=True, **options) as cap:
        return cap, called(**batch).logits


def train(target: Any, called: Any, batch: dict[str, Tensor]) -> tuple[attncap.Capture, dict[str, Tensor]]:
    """The capture of one step with activation checkpointing, and the gradients it leaves, whole."""
    model = getattr(called, "module", called)
    model.train().activation_checkpointing_enable()
    with attncap.Capture(target, maps.FULL, histogram=True, importance=True) as cap:
        called(**batch).logits.double().square().mean().backward()
    whole = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        whole[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return cap, whole


def wrapped(kind: str, mesh: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(the module to capture, the module to call, options of the capture)."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel

    model, options = llama(), {}
    if kind in ("ddp", "ddp_inside"):
        outer = DistributedDataParallel(model)
        return (outer if kind == "ddp" else model), outer, options
    if kind == "fsdp1":
        outer = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        return outer, outer, options
    if kind == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer.self_attn.q_proj, mesh=mesh)  # is sharded again when the attention is called
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind in ("tensor", "tensor_heads", "tensor_gathered"):
        attention = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
        if kind == "tensor_gathered":  # as in the plans of models that normalise all heads at once
            attention = {f"{name}_proj": ColwiseParallel(output_layouts=Replicate()) for name in "qkv"}
            attention |= {"o_proj": RowwiseParallel(input_layouts=Replicate())}
        for layer in model.model.layers:
            parallelize_module(layer.self_attn, mesh, attention)
        if kind == "tensor_heads":
            options = {"layers": {0: [0, 3], 1: [2]}}
    else:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        plan = model._resolve_parallel_plans(DistributedConfig(tp_size=WORLD))[0]
        apply_tensor_parallelism(model, mesh, plan)
    return model, model, options


def work(rank: int) -> dict[str, Any]:
    """One process: captures every kind of model, with a batch of its own where batches are spread."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    found = {}
    for kind in KINDS:
        if kind == "transformers_plan" and not HAS_PLAN:
            continue
        target, called, options = wrapped(kind, mesh)
        batch = batches()[0 if "tensor" in kind or "plan" in kind else rank]
        cap, logits = run(target, called, batch, **options)
        found[kind] = (cap.layers, cap.accumulator.to_bytes(), logits)
    for kind in TRAINED:
        target, called, _ = wrapped(kind, mesh)
        cap, gradients = train(target, called, batches()[rank])
        found[f"{kind}_trained"] = (cap.layers, cap.accumulator.to_bytes(), gradients)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What each process found."""
    return found_by(work)


def merged(found: list[dict[str, Any]], kind: str) -> Accumulator:
    whole = Accumulator(histogram=True)
    for one in found:
        whole.merge(Accumulator.from_bytes(one[kind][1]))
    return whole


def assert_tables_match(found: Accumulator, expected: Accumulator) -> None:
    assert found.modules == expected.modules
    assert found.stats == expected.stats
    for stat in expected.stats:
        for field in ("count", "mean", "std", "min", "max", "p50"):
            one, other = found.table(stat, field), expected.table(stat, field)
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4 if field != "p50" else 2e-2, equal_nan=True)


@pytest.mark.parametrize("kind", ["ddp", "ddp_inside", "fsdp1", "fsdp2"])
def test_each_process_captures_its_own_batch_and_they_merge(found: list[dict[str, Any]], kind: str) -> None:
    model, expected = llama(), Accumulator(histogram=True)
    for rank, batch in enumerate(batches()):
        cap, logits = run(model, model, batch)
        layers, _, got = found[rank][kind]
        assert layers == cap.layers == ("model.layers.0.self_attn", "model.layers.1.self_attn")
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)
        expected.merge(cap.accumulator)
    assert_tables_match(merged(found, kind), expected)


@pytest.mark.parametrize("kind", ["tensor", "transformers_plan"])
def test_heads_of_a_tensor_parallel_plan_have_their_numbers_in_the_whole(
    found: list[dict[str, Any]], kind: str
) -> None:
    if kind not in found[0]:
        pytest.skip("this release of Transformers does not resolve its plans by itself")
    model = llama()
    cap, logits = run(model, model, batches()[0])
    for rank in range(WORLD):
        layers, data, got = found[rank][kind]
        assert layers == cap.layers
        torch.testing.assert_close(got, logits, atol=2e-5, rtol=1e-4)
        counted = Accumulator.from_bytes(data).table("entropy", "count") > 0
        assert counted.tolist() == [[head // 2 == rank for head in range(4)]] * 2
    assert_tables_match(merged(found, kind), cap.accumulator)


def test_heads_of_a_tensor_parallel_plan_are_selected_by_these_numbers(found: list[dict[str, Any]]) -> None:
    model = llama()
    cap, _ = run(model, model, batches()[0], layers={0: [0, 3], 1: [2]})
    assert_tables_match(merged(found, "tensor_heads"), cap.accumulator)


def test_heads_that_a_plan_leaves_together_are_captured_by_every_process(found: list[dict[str, Any]]) -> None:
    model = llama()
    cap, logits = run(model, model, batches()[0])
    for rank in range(WORLD):
        _, data, got = found[rank]["tensor_gathered"]
        torch.testing.assert_close(got, logits, atol=2e-5, rtol=1e-4)
        assert_tables_match(Accumulator.from_bytes(data), cap.accumulator)


@pytest.mark.parametrize("kind", TRAINED)
def test_processes_that_train_together_count_once_and_have_the_gradients_of_both(
    found: list[dict[str, Any]], kind: str
) -> None:
    """What is reduced between them is the mean over processes."""
    expected, total = Accumulator(histogram=True), {}
    for batch in batches():
        model = llama()
        cap, gradients = train(model, model, batch)
        expected.merge(cap.accumulator)
        total = {name: total.get(name, 0) + gradient / WORLD for name, gradient in gradients.items()}
    for one in found:
        gradients = one[f"{kind}_trained"][2]
        assert gradients.keys() == total.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, total[name], atol=1e-6, rtol=1e-4)
    whole = merged(found, f"{kind}_trained")
    assert "importance" in whole.stats
    assert_tables_match(whole, expected)
