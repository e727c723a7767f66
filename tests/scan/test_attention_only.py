"""Forwards that end with the last attention module: nothing that is counted is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attncap import attention_only
from attncap.attention_only import AttentionOnly
from attncap.capture import Capture, capture
from attncap.options import ScanOptions
from attncap.store import Run
from tests.models import text_model, tokens
from tests.runs import contents
from tests.scan.scans import run_scan


class Wrapped(nn.Module):
    """A module of code that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = text_model("bert")

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


class Forwards:
    """Runs a model on batches, and counts how many of its forwards came to their end."""

    def __init__(self, model: nn.Module, cap: Capture) -> None:
        self.run, self.whole = AttentionOnly(model, cap.complete_layers), 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.whole += 1

    def __call__(self, *seeds: int) -> int:
        """How many of these forwards were whole ones."""
        before = self.whole
        with torch.inference_mode():
            for seed in seeds:
                self.run(**tokens(2, 9, seed, "right"))
        return self.whole - before


@contextmanager
def forwards_of(model: nn.Module) -> Iterator[tuple[Forwards, Capture]]:
    with capture(model) as cap:
        forwards = Forwards(model, cap)
        with forwards.run.open():
            yield forwards, cap


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gemma2"])
def test_only_the_first_forward_is_a_whole_one(kind: str) -> None:
    model = text_model(kind)
    with forwards_of(model) as (forwards, cap):
        assert forwards(0, 1, 2, 3) == 1
    whole = text_model(kind)
    with capture(whole) as expected, torch.inference_mode():
        for seed in range(4):
            whole(**tokens(2, 9, seed, "right"))
    assert cap.layers == expected.layers
    assert cap.accumulator.to_bytes() == expected.accumulator.to_bytes()
    batch = tokens(2, 9, 5, "right")
    with torch.inference_mode():  # the model is as it was
        torch.testing.assert_close(model(**batch)[0], whole(**batch)[0], rtol=0, atol=0)


@pytest.mark.parametrize("what", ["shared layers", "unknown code", "hooks of Accelerate"])
def test_forwards_of_which_the_end_is_not_certain_are_whole(what: str) -> None:
    model: nn.Module = text_model("albert" if what == "shared layers" else "bert")
    if what == "unknown code":
        model = Wrapped()
    if what == "hooks of Accelerate":
        model.encoder.layer[1]._hf_hook = object()  # type: ignore[union-attr, index]
    with forwards_of(model) as (forwards, cap):
        assert forwards(0, 1, 2) == 3
    assert cap.layers


def test_a_layer_that_runs_twice_or_never_makes_the_forward_a_whole_one() -> None:
    model: Any = text_model("bert")
    first, last = model.encoder.layer
    with forwards_of(model) as (forwards, cap):
        assert forwards(0, 1) == 1
        model.encoder.layer = nn.ModuleList([first, first, last])
        assert forwards(2, 3) == 2
        model.encoder.layer = nn.ModuleList([first])
        assert forwards(4, 5) == 2
        model.encoder.layer = nn.ModuleList([first, last])
        assert forwards(6, 7) == 1
    rows = [int(tokens(2, 9, seed, "right")["attention_mask"].sum()) for seed in range(8)]
    assert cap.count("entropy")[:, 0].tolist() == [sum(rows) + rows[2] + rows[3], sum(rows) - rows[4] - rows[5]]


def test_a_failure_is_not_taken_for_the_end() -> None:
    model: Any = text_model("bert")
    with forwards_of(model) as (forwards, _):
        assert forwards(0, 1) == 1
        with pytest.raises(ValueError, match="specify"), torch.inference_mode():
            forwards.run()
        assert forwards(2) == 0


def test_a_scan_has_the_bytes_of_one_with_whole_forwards(
    folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_only, "_is_fixed", lambda _model: False)
    run_scan(folder, tmp_path / "run", options=ScanOptions(workers=2))
    assert contents(tmp_path / "run") == contents(finished.path)
