"""`Monitor`: the heads of a model while it is trained, every n-th step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attncap
from attncap import Monitor
from tests import models
from tests.traces import hooks
from tests.trainable import HEADS, SPEC, WIDTH, Net, batch, captured, scalars, train_step


def assert_holds(monitor: Monitor, cap: attncap.Capture, **tolerance: float) -> None:
    """The monitor counted what the capture did."""
    tensors = monitor.tensors()
    assert monitor.layers == cap.layers
    assert set(tensors) == {*cap.accumulator.stats, "nonfinite"}
    for stat in cap.accumulator.stats:
        wanted = cap.accumulator.table("max_logit", "max") if stat == "max_logit" else cap.mean(stat)
        torch.testing.assert_close(tensors[stat], wanted, equal_nan=True, **(tolerance or {"atol": 1e-7, "rtol": 1e-6}))


# Which steps.


def test_every_nth_step_is_captured_and_the_others_run_untouched() -> None:
    model, touched = Net(), []
    with Monitor(model, SPEC, every=3) as monitor:
        for step in range(7):
            touched.append(hooks(model) > 0)
            train_step(model, batch(step))
            assert monitor.step() == (step % 3 == 0)
    assert touched == [True, False, False, True, False, False, True]
    assert hooks(model) == 0
    assert monitor.steps == 7
    assert_holds(monitor, captured(model, batch(0), batch(3), batch(6)))


def test_transformers_models_keep_their_attention_in_the_other_steps() -> None:
    model, given = models.text_model("llama").train(), models.tokens(2, 7, seed=1, padding="left")
    names = []
    with Monitor(model, SPEC, every=2) as monitor:
        for _ in range(3):
            names.append(model.config._attn_implementation)
            model(**given).logits.square().mean().backward()
            monitor.step()
    assert names[1] == model.config._attn_implementation == "sdpa"
    assert names[0] != "sdpa"
    with torch.no_grad(), attncap.capture(model, SPEC) as cap:
        model(**given)
    assert_holds(monitor, cap)


def test_gradients_are_those_without_a_monitor() -> None:
    model, twin = Net(), Net()
    with Monitor(model, SPEC) as monitor:
        train_step(model, batch(0))
        monitor.step()
    train_step(twin, batch(0))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_accumulated_forwards_are_one_step() -> None:
    model = Net()
    with Monitor(model, SPEC, every=2) as monitor:
        for micro in range(3):
            train_step(model, batch(micro))
        monitor.step()
        train_step(model, batch(7))
        monitor.step()
    assert_holds(monitor, captured(model, batch(0), batch(1), batch(2)))


def test_reset_forgets_what_was_counted_and_the_steps_go_on() -> None:
    model = Net()
    with Monitor(model, SPEC, every=2) as monitor:
        for step in range(3):
            train_step(model, batch(step))
            monitor.step()
            if step < 2:
                monitor.reset()
                assert monitor.report() == {}
                assert monitor.tensors() == {}
        assert monitor.steps == 3
    assert_holds(monitor, captured(model, batch(2)))


def test_forwards_in_evaluation_mode_are_not_counted_unless_asked_for() -> None:
    model = Net()
    for evaluation in (False, True):
        with Monitor(model, SPEC, evaluation=evaluation) as monitor:
            train_step(model, batch(0))
            model.eval()
            with torch.no_grad():
                plain = model(batch(1))
            model.train()
            monitor.step()
        assert_holds(monitor, captured(model, batch(0), *([batch(1)] if evaluation else [])))
        torch.testing.assert_close(plain, model(batch(1)))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_what_activation_checkpointing_runs_once_more_counts_once(kind: str) -> None:
    model = Net(checkpointing=kind)
    given = batch(0).requires_grad_()
    with Monitor(model, SPEC) as monitor:
        train_step(model, given)
        monitor.step()
    assert_holds(monitor, captured(Net(), batch(0)))


def test_autocast() -> None:
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        with Monitor(model, SPEC) as monitor:
            train_step(model, batch(0))
            monitor.step()
        cap = captured(model, batch(0))
    assert_holds(monitor, cap, atol=1e-5, rtol=1e-5)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_tags_and_chosen_layers_and_heads() -> None:
    model, given = models.text_model("llama").train(), models.tokens(2, 12, seed=1)
    options: dict[str, Any] = {"layers": {1: [2, 0]}, "tags": {"duplicate": attncap.tags.duplicate}}
    with Monitor(model, SPEC, **options) as monitor:
        model(**given).logits.mean().backward()
        monitor.step()
    with torch.no_grad(), attncap.capture(model, SPEC, **options) as cap:
        model(**given)
    assert_holds(monitor, cap)
    assert monitor.tensors()["duplicate"].isnan().tolist() == [[False, True, False, True]]


def test_importance_comes_from_the_backwards_of_captured_steps() -> None:
    model = Net()
    with Monitor(model, SPEC, every=2, importance=True) as monitor:
        for step in range(3):
            train_step(model, batch(step))
            monitor.step()
    with attncap.capture(Net(), SPEC, importance=True) as cap:
        for step in (0, 2):
            train_step(cap.model, batch(step))
    assert_holds(monitor, cap)
    assert float(monitor.tensors()["importance"].min()) > 0


# torch.compile.


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_a_compiled_model_gets_one_graph_for_steps_that_are_captured_and_one_for_the_others(kind: str) -> None:
    model: Any = Net() if kind == "plain" else models.text_model("llama").train()
    given = {"hidden": batch(0)} if kind == "plain" else models.tokens(2, 7, seed=1)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    graph = torch.compile(model, backend=backend, fullgraph=True)
    with Monitor(graph, SPEC, every=2) as monitor:
        for _ in range(6):
            out = graph(**given)
            (out if kind == "plain" else out.logits).square().mean().backward()
            assert monitor.step() == (monitor.steps % 2 == 1)
        assert len(graphs) == 2
    assert hooks(model) == 0
    with torch.no_grad(), attncap.capture(model, SPEC) as cap:
        model(**given)
    assert_holds(monitor, cap, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# What is reported.


def test_the_report_names_layers_and_heads() -> None:
    model = Net()
    with Monitor(model, SPEC) as monitor:
        train_step(model, batch(0))
        monitor.step()
    report, cap = monitor.report(), captured(model, batch(0))
    stats = (*cap.accumulator.stats, "nonfinite")
    layers = ["layers.0", "layers.1"]
    assert set(monitor.report(heads=False)) == {f"attention/{stat}/{layer}" for stat in stats for layer in layers}
    assert len(report) == len(stats) * len(layers) * (1 + HEADS)
    assert all(type(number) is float for number in report.values())
    entropy, highest = cap.mean("entropy"), cap.accumulator.table("max_logit", "max")
    assert report["attention/entropy/layers.1/head.3"] == pytest.approx(float(entropy[1, 3]), rel=1e-6)
    assert report["attention/entropy/layers.1"] == pytest.approx(float(entropy[1].mean()), rel=1e-6)
    assert report["attention/max_logit/layers.0/head.2"] == float(highest[0, 2])
    assert report["attention/max_logit/layers.0"] == float(highest[0].max())
    assert report["attention/nonfinite/layers.0"] == 0.0


class NoWaiting(TorchDispatchMode):
    """Refuses operators for which the device is waited for."""

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_nothing_waits_for_the_device_before_a_report(kind: str) -> None:
    model: Any = Net() if kind == "plain" else models.text_model("llama").train()
    given = {"hidden": batch(0)} if kind == "plain" else models.tokens(2, 7, seed=1, padding="left")
    with Monitor(model, SPEC, layers=["layers.1"] if kind == "plain" else None) as monitor:
        with NoWaiting():
            for _ in range(2):
                out = model(**given)
                (out if kind == "plain" else out.logits).square().mean().backward()
                monitor.step()
            monitor.tensors()
        with NoWaiting(), pytest.raises(AssertionError):
            monitor.report()


def test_tensorboard_is_written(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboardX")
    model, writer = Net(), tensorboard.SummaryWriter(str(tmp_path))
    wanted = {}
    with Monitor(model, SPEC, every=2) as monitor:
        for step in range(3):
            train_step(model, batch(step))
            if monitor.step():
                wanted |= {(name, step + 1): number for name, number in monitor.write(writer).items()}
                monitor.reset()
    writer.close()
    assert len(wanted) == 2 * 7 * 2 * (1 + HEADS)
    assert scalars(tmp_path) == pytest.approx(wanted, rel=1e-6)


def test_what_cannot_be_written_to_is_refused() -> None:
    with Monitor(Net(), SPEC) as monitor, pytest.raises(TypeError, match="writer: expected an add_scalar method"):
        monitor.write([])  # type: ignore[arg-type]


def test_it_goes_on_from_its_state(tmp_path: Path) -> None:
    model = Net()
    with Monitor(model, SPEC, every=2) as first:
        for step in range(2):
            train_step(model, batch(step))
            first.step()
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    with Monitor(model, SPEC, every=2) as second:
        second.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        for step in range(2, 4):
            train_step(model, batch(step))
            assert second.step() == (step == 2)
    assert second.steps == 4
    assert_holds(second, captured(model, batch(0), batch(2)))


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every: expected an int"),
        ({"below": ["entropy"]}, TypeError, "below: expected a mapping of statistics to numbers, got list"),
        ({"above": {"max_logit": "100"}}, TypeError, r"above\['max_logit'\]: expected a number, got '100'"),
        ({"below": {"entropy": float("nan")}}, ValueError, r"below\['entropy'\]: expected a number, got one that is"),
        ({"on_alarm": "ring"}, ValueError, 'on_alarm: expected "warn", "raise" or a function'),
        ({"spec": None}, TypeError, "spec"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Monitor(**{"model": Net(), **arguments})


def test_a_closed_monitor_does_not_step_in_silence_and_can_go_on() -> None:
    model = Net()
    monitor = Monitor(model, SPEC, every=2)
    train_step(model, batch(0))
    monitor.step()
    monitor.close()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="step: the monitor is closed"):
        monitor.step()
    assert_holds(monitor, captured(model, batch(0)))
    with monitor:
        monitor.step()
        train_step(model, batch(2))
        monitor.step()
    assert_holds(monitor, captured(model, batch(0), batch(2)))


def test_an_exception_in_a_step_leaves_the_model_as_it_was() -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="shape"), Monitor(model, SPEC):
        model(torch.zeros(2, 3, WIDTH + 1))
    assert hooks(model) == 0


def test_a_model_that_is_captured_already_is_refused() -> None:
    model = Net()
    with Monitor(model, SPEC), pytest.raises(RuntimeError, match="being captured already"), attncap.capture(model):
        pass
