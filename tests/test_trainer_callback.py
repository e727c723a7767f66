"""`MonitorCallback`: the heads of a model that Transformers' Trainer trains, among what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import attncap
from attncap import AlarmError
from attncap.monitor.trainer_callback import MonitorCallback
from tests import models
from tests.trainable import SPEC, scalars

pytest.importorskip("accelerate")

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (16, 8))]
ENTROPY = "attention/entropy/model.layers.1.self_attn"


class StepsSeen(TrainerCallback):  # type: ignore[misc]
    """Notes which attention the model has while a step runs."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Note it."""
        self.names.append(model.config._attn_implementation)


def trainer_in(folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 2,
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.0,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**options, **changes})
    model = models.text_model("llama").train()
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer: Any, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def test_what_the_trainer_logs_has_the_heads_in_it(tmp_path: Path) -> None:
    trainer, callback, seen = trainer_in(tmp_path, eval_strategy="steps", eval_steps=1), MonitorCallback(), StepsSeen()
    trainer.add_callback(callback)
    trainer.add_callback(seen)
    given: list[Tensor] = []
    handle = trainer.model.register_forward_pre_hook(
        lambda module, _args, kwargs: given.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    trainer.train()
    handle.remove()
    assert len(given) == 8  # two micro-batches a step
    assert set(logged(trainer, ENTROPY)) == {2, 4}
    assert set(logged(trainer, "eval_loss")) == {1, 2, 3, 4}
    for step, found in logged(trainer, ENTROPY).items():
        with torch.no_grad(), attncap.capture(trainer.model, SPEC) as cap:
            for tokens in given[2 * step - 4 : 2 * step]:
                trainer.model(input_ids=tokens)
        assert found == pytest.approx(float(cap.mean("entropy")[1].mean()), rel=1e-5)
    assert trainer.model.config._attn_implementation == "sdpa"
    assert callback.monitor is not None
    assert callback.monitor.steps == 4
    assert not any("head." in name for entry in trainer.state.log_history for name in entry)


def test_a_trainer_that_logs_once_an_epoch_logs_them_too(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=2)
    trainer.add_callback(MonitorCallback(every=3))
    trainer.train()
    assert set(logged(trainer, ENTROPY)) == {4, 8}


def test_every_nth_step_of_the_optimizer_is_captured(tmp_path: Path) -> None:
    trainer, seen = trainer_in(tmp_path, logging_steps=1), StepsSeen()
    trainer.add_callback(MonitorCallback(every=3, spec=SPEC, heads=True))
    trainer.add_callback(seen)
    trainer.train()
    assert [name != "sdpa" for name in seen.names] == [True, False, False, True]
    assert set(logged(trainer, f"{ENTROPY}/head.3")) == {1, 4}


def test_attached_it_reaches_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    trainer = trainer_in(tmp_path, report_to="tensorboard")
    MonitorCallback().attach(trainer)
    trainer.train()
    written = scalars(tmp_path)
    wanted = logged(trainer, ENTROPY)
    assert set(wanted) == {2, 4}
    for step, number in wanted.items():
        assert written[f"train/{ENTROPY}", step] == pytest.approx(number, rel=1e-6)


def test_an_alarm_ends_the_training_and_the_next_one_begins_afresh(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    callback = MonitorCallback(below={"entropy": 9.0}, on_alarm="raise")
    trainer.add_callback(callback)
    for _ in range(2):
        with pytest.raises(AlarmError, match=r"at step 2: model\.layers\.0\.self_attn head 0: entropy is .* below 9"):
            trainer.train()
    assert callback.monitor is not None
    callback.monitor.close()
    assert trainer.model.config._attn_implementation == "sdpa"


def test_steps_are_numbered_on_where_training_is_taken_up_again(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=False)
    first.train()
    second, seen = trainer_in(tmp_path, max_steps=6), StepsSeen()
    second.add_callback(MonitorCallback(every=4))
    second.add_callback(seen)
    second.train(resume_from_checkpoint=True)
    assert [name != "sdpa" for name in seen.names] == [False, False, True, False]  # steps 2 to 5
