"""`MonitorCallback`: a `Monitor` for Transformers' Trainer, whose numbers stand among those that it logs."""

from __future__ import annotations

from typing import Any

from attncap.extras import require
from attncap.monitor.monitor import Monitor

require("transformers", "large")

from transformers import DefaultFlowCallback, Trainer, TrainerCallback  # noqa: E402 - where it is missing that is said first


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # Transformers comes without types
    """Watches the attention heads of the model that a Trainer trains.

    ::

        callback = MonitorCallback(every=10, above={"max_logit": 100.0})
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.train()
        trainer.state.log_history[0]["attention/entropy/model.layers.3.self_attn"]

    A step is one of the optimizer's, whatever it accumulates. Each time the training logs, the numbers of the steps
    captured since it last did are added to what it logs, and forgotten. Alarms are looked for then. Callbacks before
    this one have seen the log already, and the Trainer puts its own there, which write for TensorBoard and others:
    ``callback.attach(trainer)`` in the place of ``callbacks=[callback]`` goes before them.

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
        self._is_new = False  # whether steps were captured since the last report
        self._report: dict[str, float] = {}  # for the log that comes next

    def attach(self, trainer: Trainer) -> None:
        """Become a callback of a trainer, right after that which decides when to log."""
        callbacks = trainer.callback_handler.callbacks
        deciding = [place for place, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback)]
        callbacks.insert(deciding[0] + 1 if deciding else 0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        """Open a monitor of the model."""
        if self.monitor is not None:
            self.monitor.close()
        self._is_new, self._report = False, {}
        self.monitor = Monitor(model, **self._options)
        self.monitor.load_state_dict({"steps": state.global_step, "sums": []})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End a step of the monitor."""
        assert self.monitor is not None
        self._is_new |= self.monitor.step()
        self._look(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A Trainer that logs once an epoch decides so now."""
        self._look(control)

    def _look(self, control: Any) -> None:
        """Read the numbers where a log comes next: all processes of a training do that at the same steps."""
        assert self.monitor is not None
        if control.should_log and self._is_new:
            self._report = self.monitor.report(heads=self._heads)
            self.monitor.reset()
            self._is_new = False

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **others: Any) -> None:
        """Add what is new to the log."""
        logs.update(self._report)
        state.log_history[-1].update(self._report)
        self._report = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leave the model as it was."""
        assert self.monitor is not None
        self.monitor.close()
