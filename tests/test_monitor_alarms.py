"""Alarms of a `Monitor`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attncap import Alarm, AlarmError, AlarmWarning, Monitor
from tests.trainable import SPEC, Net, batch, scaled, train_step


def test_alarms_name_layer_head_number_and_threshold() -> None:
    model = scaled(Net(), 1, 2, by=100.0)
    alarms: list[Alarm] = []
    thresholds: dict[str, Any] = {"below": {"entropy": 0.5}, "above": {"max_logit": 50.0}}
    with Monitor(model, SPEC, on_alarm=alarms.append, **thresholds) as monitor:
        train_step(model, batch(0))
        monitor.step()
        assert alarms == []
        report = monitor.report()
    assert [(alarm.kind, alarm.stat, alarm.layer, alarm.head, alarm.threshold, alarm.step) for alarm in alarms] == [
        ("below", "entropy", "layers.1", 2, 0.5, 1),
        ("above", "max_logit", "layers.1", 2, 50.0, 1),
    ]
    highest = report["attention/max_logit/layers.1/head.2"]
    assert alarms[1].value == highest
    assert str(alarms[1]) == f"layers.1 head 2: max_logit is {highest:.6g}, above 50"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_an_alarm_without_being_asked_for(value: float) -> None:
    model = scaled(Net(), 0, 1, by=value)
    with Monitor(model, SPEC, on_alarm="raise") as monitor:
        with torch.no_grad():
            model(batch(0))
        monitor.step()
        with pytest.raises(AlarmError, match=r"layers\.0 head 1: \w+ is not finite in 18 rows") as error:
            monitor.report()
    first = error.value.alarms[0]
    assert (first.kind, first.layer, first.head, first.value) == ("nonfinite", "layers.0", 1, 18.0)
    assert monitor.tensors()["nonfinite"][0].tolist() == [0, 18, 0, 0]


def test_alarms_warn_where_nothing_else_is_said() -> None:
    model = scaled(Net(), 1, 2, by=100.0)
    with Monitor(model, SPEC, above={"max_logit": 50.0}) as monitor:
        train_step(model, batch(0))
        monitor.step()
        with pytest.warns(AlarmWarning, match=r"at step 1: layers\.1 head 2: max_logit is \d+\.\d+, above 50") as told:
            assert monitor.report()
    assert told[0].filename == __file__


def test_a_warning_lists_a_few_and_counts_the_rest() -> None:
    model = Net()
    with Monitor(model, SPEC, below={"entropy": 9.0, "sink_mass": 9.0}) as monitor:
        train_step(model, batch(0))
        monitor.step()
        with pytest.warns(AlarmWarning, match="and 8 more$"):
            monitor.report()


def test_what_a_function_raises_comes_out() -> None:
    def fail(alarm: Alarm) -> None:
        raise KeyError(alarm.layer)

    model = Net()
    with Monitor(model, SPEC, below={"entropy": 9.0}, on_alarm=fail) as monitor:
        train_step(model, batch(0))
        monitor.step()
        with pytest.raises(KeyError, match=r"layers\.0"):
            monitor.report()
        with pytest.raises(KeyError, match=r"layers\.0"):  # and nothing is lost by it
            monitor.report()


def test_a_step_in_which_nothing_was_captured_says_so() -> None:
    model, alarms = Net(), []
    with Monitor(model, SPEC, every=2, on_alarm=alarms.append) as monitor:
        train_step(model, batch(0))
        monitor.step()
        monitor.step()  # was not to be captured
        train_step(model.eval(), batch(0))
        assert alarms == []
        monitor.step()
    assert [(alarm.kind, alarm.step) for alarm in alarms] == [("silent", 3)]
    for action, raised in (("warn", pytest.warns), ("raise", pytest.raises)):
        kind: Any = AlarmWarning if action == "warn" else AlarmError
        with Monitor(model, SPEC, on_alarm=action) as monitor:
            with raised(kind, match="step 1 ended without a captured attention call"):
                monitor.step()
            assert monitor.steps == 1


def test_a_threshold_that_could_never_be_passed_is_refused() -> None:
    model = Net()
    with Monitor(model, SPEC, below={"entropie": 1.0}) as monitor:
        train_step(model, batch(0))
        monitor.step()
        with pytest.raises(ValueError, match=r"below: expected statistics among lse, max_logit, entropy.*'entropie'"):
            monitor.report()
