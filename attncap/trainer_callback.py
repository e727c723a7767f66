"""`MonitorCallback`: a `Monitor` for Transformers' Trainer, whose numbers stand among those that it logs."""

from __future__ import annotations

from typing import Any

from attncap.extras import require
from attncap.monitor import Monitor

require("transformers", "large")

from transformers import Trainer, TrainerCallback  # noqa: E402 - where it is missing that is said first


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # Transformers comes without types
    """Watches the attention heads of the model that a Trainer trains.

    ::

        callback = MonitorCallback(every=10, above={"max_logit": 100.0})
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        trainer.state.log_history[0]["attention/entropy/model.layers.3.self_attn"]

    A step is one of the optimizer's, whatever it accumulates. Each time the Trainer logs, the numbers of the steps
    captured since it last did are added to what it logs, and forgotten. Alarms are looked for then. Callbacks before
    this one have seen the log already, and the Trainer puts its own there, which write for TensorBoard and others:
    ``callback.attach(trainer)`` in the place of ``callbacks=[callback]`` goes before them all.

    Where the training is taken up from a checkpoint the steps are numbered on. When it ends the model is left as it
    was, but not when it ends by an exception: then ``callback.monitor.close()`` does it, or the next training.

    Args:
        heads: log the numbers of single heads too.
        options: of the `Monitor`.

    Attributes:
        monitor: that of the newest training.
    """

    def __init__(self, *, heads: bool = False, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._heads = heads
        self._options = options
        self._is_new = False  # whether there are numbers that were not logged yet

    def attach(self, trainer: Trainer) -> None:
        """Become the first callback of a trainer."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Open a monitor of the model."""
        if self.monitor is not None:
            self.monitor.close()
        self.monitor = Monitor(model, **self._options)
        self.monitor.load_state_dict({"steps": state.global_step, "sums": []})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End a step of the monitor."""
        assert self.monitor is not None
        self._is_new |= self.monitor.step()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **others: Any) -> None:
        """Add what is new to the log."""
        if not self._is_new or self.monitor is None:
            return
        report = self.monitor.report(heads=self._heads)
        self.monitor.reset()
        self._is_new = False
        logs.update(report)
        state.log_history[-1].update(report)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leave the model as it was."""
        assert self.monitor is not None
        self.monitor.close()
