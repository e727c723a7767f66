"""`Monitor`: what the attention heads of a model do while it is trained, at a price per step that can be chosen.

L layers   H heads
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from attncap.accumulate import Heads
from attncap.adapters import named_modules
from attncap.adapters.served import ServedCall
from attncap.annotations import Annotations, FeatureFunction, TagFunction
from attncap.capture import Capture
from attncap.layers import Layers, checked_count
from attncap.monitor.alarms import SILENT, Alarm, Alarms, OnAlarm
from attncap.monitor.head_sums import COUNT, HIGH, NONFINITE, TOTAL, HeadSums
from attncap.monitor.processes import Processes
from attncap.types import HeadStats, StatSpec

MAXIMUM = "max_logit"  # of the other statistics the mean over rows is of interest


class Writer(Protocol):
    """What `Monitor.write` writes to: TensorBoard's SummaryWriter is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one number."""


class Monitor:
    """Watches the attention heads of a model while it is trained.

    ::

        monitor = attncap.Monitor(model, every=50, below={"entropy": 0.1}, above={"max_logit": 100.0})
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor.step():  # this step was captured
                log(monitor.report())  # {"attention/entropy/model.layers.3.self_attn/head.5": 2.31, ...}
                monitor.reset()
        monitor.close()  # or use it in a `with` statement

    Every `every`-th step is captured, from the first on: attention is then attncap's, equal to the model's own up to
    rounding. In the others nothing of attncap touches the model. A step may have several forwards (gradient
    accumulation); what activation checkpointing computes once more counts once, for which the backward has to run
    before `step`.

    Attention with dropout stays the model's own in captured steps too: its statistics, those of the distribution before
    dropout, then cost one more forward of the attention and no backward. Such an attention is refused in a compiled
    graph, and its importance in an nn.MultiheadAttention.

    Of every head, over the rows of the captured steps since the last `reset`, there is the largest score, ``max_logit``
    = max_i max_j s_ij, and the mean over rows of every other statistic: ``entropy`` (nats), ``sink_mass`` (probability)
    and what else `spec` asks for, under the names of `Capture.mean`. Rows that are not finite are left out and counted
    under ``nonfinite``.

    Nothing waits for the device until `report`, and `tensors` does not either. With torch.distributed all processes of
    `process_group` must call either of them at the same steps: everything then travels in one all-reduce.

    A forward in evaluation mode (``model.eval()``) is not counted and keeps the model's own attention, so that
    evaluations may lie between steps. Once the model ran inside a graph of torch.compile the capture stays open, for
    opening it would compile again; the steps between then run a graph of their own, with the model's attention.

    Args:
        model: a Transformers model, or any torch module, wrapped by DDP, FSDP or torch.compile or not.
        spec: which statistics to capture.
        every: which steps are captured: 0, `every`, 2 * `every`, ...
        below, above: statistic -> threshold: heads beyond it are alarms, seen by `report`. Rows that are not finite are
            an alarm always, and so is a step that was to be captured and was not, seen by `step`.
        on_alarm: "warn" (the first process does, of numbers that all have), "raise", or a function that is called
            with every `Alarm`, on every process. What it raises comes out of `report` or `step`.
        layers, tags, features, importance: as `capture` takes them.
        evaluation: count forwards in evaluation mode too.
        process_group: whose processes' sums are put together; None for all of torch.distributed, if it is in use.

    Attributes:
        steps: how many steps have ended.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
        UnsupportedError: the model's attention cannot be captured; the message says why.
        RuntimeError: the model is being captured already.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: StatSpec = StatSpec(topk=0, diagonal=None),  # noqa: B008 - frozen
        *,
        every: int = 1,
        below: Mapping[str, float] | None = None,
        above: Mapping[str, float] | None = None,
        on_alarm: OnAlarm = "warn",
        layers: Layers | None = None,
        tags: Mapping[str, TagFunction] | None = None,
        features: Mapping[str, FeatureFunction] | None = None,
        importance: bool = False,
        evaluation: bool = False,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._every = checked_count("every", every)
        self._alarms = Alarms(below, above, on_alarm)
        bare = named_modules(model)[0][1]
        chosen = {"layers": layers, "tags": tags, "features": features, "importance": importance}
        self._tap = _Tap(bare, spec, evaluation, **chosen)
        self._processes = Processes(process_group)
        self.steps = 0
        self._watches = False
        self._tap_is_open = False
        self.open()

    def __enter__(self) -> Monitor:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watches = False
        self._tap.wanted = False
        if self._tap_is_open:
            self._tap_is_open = False
            self._tap.__exit__(kind, error, trace)

    def open(self) -> None:
        """Watch the model; a new monitor does so already."""
        self._watches = True
        self._aim()

    def close(self) -> None:
        """Leave the model as it was. Results stay readable, and `open` goes on."""
        self.__exit__(None, None, None)

    def _aim(self) -> None:
        """Open or close the capture for the step that begins."""
        wanted = self._watches and self.steps % self._every == 0
        self._tap.wanted, self._tap.calls = wanted, 0
        stays = self._watches and self._tap.compiled
        if wanted and not self._tap_is_open:
            self._tap.__enter__()
            self._tap_is_open = True
        elif self._tap_is_open and not (wanted or stays):
            self._tap_is_open = False
            self._tap.__exit__(None, None, None)

    def step(self) -> bool:
        """End a step: call it after the optimizer's. Gives whether the step was captured.

        Raises:
            RuntimeError: the monitor is closed.
            AlarmError: the step was to be captured, no call was, and on_alarm="raise".
        """
        if not self._watches:
            raise RuntimeError("step: the monitor is closed; open it, or use it in a with statement")
        captured, calls = self._tap.wanted, self._tap.calls
        self.steps += 1
        self._aim()
        if captured and not calls:
            self._alarms.give([Alarm(SILENT, self.steps)])
        return captured

    def reset(self) -> None:
        """Forget what was counted; `steps` goes on."""
        self._tap.sums = HeadSums()

    def tensors(self) -> dict[str, Tensor]:
        """Statistic -> (layers, heads) float64 on the model's device, of all processes; nothing waits for the device.

        ``max_logit`` is the largest of all rows, the others are means over rows, ``nonfinite`` counts the rows left
        out. NaN where nothing was counted and where a layer has fewer heads. Layers are in the order of `layers`. No
        alarm is looked for.
        """
        sums = HeadSums.unpacked(*self._processes.packed(self._tap.sums, self._device(), waits=False))
        values, lost = _results(sums)
        return values | _most(lost)

    def report(self, *, heads: bool = True) -> dict[str, float]:
        """The numbers of `tensors` as a plain dictionary, once alarms have been looked for. Waits for the device.

        Empty where nothing was captured since the last `reset`.

        Args:
            heads: also those of single heads, ``attention/entropy/model.layers.3.self_attn/head.5``, and not only
                those of layers, ``attention/entropy/model.layers.3.self_attn``: means over the heads, the largest
                ``max_logit``, the sum of ``nonfinite``.

        Raises:
            AlarmError: with on_alarm="raise". What a function given as `on_alarm` raises.
            ValueError: a threshold is of a statistic that was not captured.
        """
        layout, *vectors = self._processes.packed(self._tap.sums, self._device(), waits=True)
        both, size = torch.cat(vectors).cpu(), len(vectors[0])
        added, highest = both[:size], both[size:]
        if not added.any():
            return {}
        sums = HeadSums.unpacked(layout, added, highest)
        values, lost = _results(sums)
        alarms = self._alarms.in_tables(sums.modules, values, lost, self.steps)
        self._alarms.give(alarms, warns=self._processes.is_first)
        return _named(sums, values | _most(lost), heads)

    def write(self, writer: Writer, *, heads: bool = True) -> dict[str, float]:
        """Give the numbers of `report` to a writer as scalars at `steps`, TensorBoard's SummaryWriter for instance.

        With torch.distributed every process calls it; those that do not write call `report`.

        Raises:
            TypeError: the writer has no add_scalar.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: expected an add_scalar method, as SummaryWriter has, got {type(writer).__name__}")
        report = self.report(heads=heads)
        for name, number in report.items():
            writer.add_scalar(name, number, self.steps)
        return report

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules of the newest results: the rows of `tensors`."""
        return tuple(dict.fromkeys(module for module, _, _ in self._processes.layout(self._tap.sums)))

    def state_dict(self) -> dict[str, Any]:
        """What was counted here, and `steps`: numbers, lists and tensors. Waits for the device.

        Each process has its own; where only one process saves, call `reset` before.
        """
        return {"steps": self.steps, "sums": self._tap.sums.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, in the place of what was counted here."""
        self.steps = state["steps"]
        self._tap.sums = HeadSums.of_state(state["sums"])
        self._aim()

    def _device(self) -> torch.device:
        """Of the sums, or where there are none, of the model."""
        found = self._tap.sums.device
        if found is None:
            found = next((parameter.device for parameter in self._tap.model.parameters()), torch.device("cpu"))
        return found


class _Tap(Capture):
    """A capture that can be switched off while it is open, and sums up in the form that processes put together.

    Args:
        model: without a wrapper of torch.compile, so that a graph may ask whether it is in training mode.
    """

    def __init__(self, model: nn.Module, spec: StatSpec, evaluation: bool, **options: Any) -> None:
        super().__init__(model, spec, **options)
        self.sums = HeadSums()
        self.wanted = True
        self.calls = 0  # captured since the step began
        self.compiled = False  # whether a forward ran in a graph
        self._evaluation = evaluation

    def _counts(self) -> bool:
        return self.wanted and (self._evaluation or self.model.training)

    def selects(self, module: str) -> bool:
        """Whether the module's statistics are wanted."""
        if torch.compiler.is_compiling():
            self.compiled = True
        return self._counts() and super().selects(module)

    def annotate(self, batch: Mapping[str, Any]) -> Annotations | None:
        """Tags and features of a batch."""
        return super().annotate(batch) if self._counts() else None

    def watch(self, module: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        """See a call that was recorded."""
        super().watch(module, call, out, stats)
        self.calls += 1

    def _add(
        self,
        module: str,
        values: dict[str, Tensor],
        counted: dict[str, Tensor],
        among: tuple[Heads, list[int] | None],
        phase: str,
    ) -> None:
        self.sums.add(module, values, counted, *among)


def _results(sums: HeadSums) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(statistic -> (L, H) numbers, statistic -> (L, H) rows that were not finite)."""
    values, lost = {}, {}
    for stat in sums.stats:
        table = sums.table(stat)
        count, high = table[:, COUNT], table[:, HIGH]
        values[stat] = high.where(count > 0, torch.nan) if stat == MAXIMUM else table[:, TOTAL] / count
        lost[stat] = table[:, NONFINITE]
    return values, lost


def _most(lost: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each head the rows of the statistic that lost most of them."""
    return {"nonfinite": torch.stack(list(lost.values())).amax(0)} if lost else {}


def _named(sums: HeadSums, values: Mapping[str, Tensor], heads: bool) -> dict[str, float]:
    """The numbers of layers, and of heads if they are wanted, under their names."""
    widths = {module: width for module, _, width in sums.layout}
    report = {}
    for stat, table in values.items():
        for layer, row in zip(sums.modules, table, strict=True):
            name, numbers = f"attention/{stat}/{layer}", row[: widths[layer]]
            report[name] = float(numbers.sum()) if stat == "nonfinite" else _of_layer(stat, numbers)
            if heads:
                report |= {f"{name}/head.{head}": number for head, number in enumerate(numbers.tolist())}
    return report


def _of_layer(stat: str, numbers: Tensor) -> float:
    known = numbers[~numbers.isnan()]
    if not len(known):
        return float("nan")
    return float(known.max() if stat == MAXIMUM else known.mean())
