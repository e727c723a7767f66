"""What analyses say where they are not given batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from attncap import analysis
from tests import models

BATCH = models.tokens(1, 6, 1)


def no_loss(model: nn.Module, batch: Any) -> float:
    raise AssertionError("the model is not to be run")


RUNS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "mixing_ratio": analysis.mixing_ratio,
    "head_distances": analysis.head_distances,
    "output_weight": analysis.output_weight,
    "focus_drift": lambda model, batches: analysis.focus_drift(model, batches, [BATCH], analysis.token_trigger([1])),
    "head_importance": lambda model, batches: analysis.head_importance(model, batches, no_loss),
    "leave_one_out": lambda model, batches: analysis.leave_one_out(model, batches, no_loss),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("batches", [BATCH, BATCH["input_ids"], None], ids=["batch", "tensor", "none"])
def test_what_is_no_list_of_batches_is_refused_by_name(name: str, batches: Any) -> None:
    with pytest.raises(TypeError, match=r"(batches|clean): expected several of them, as in \[batch\], got"):
        RUNS[name](models.text_model("bert"), batches)


@pytest.mark.parametrize("name", ["head_importance", "leave_one_out"])
def test_batches_that_run_several_times_are_no_iterator(name: str) -> None:
    with pytest.raises(TypeError, match="batches: expected a list, to be run several times, got list_iterator"):
        RUNS[name](models.text_model("bert"), iter([BATCH]))
