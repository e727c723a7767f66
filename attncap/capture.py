"""`capture`: the statistics of every attention head of a model, while it runs as usual."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attncap.accumulate import Accumulator, Heads, counted_rows, row_values
from attncap.adapters import DECODE, PHASES, PREFILL, adapter_for, named_modules
from attncap.adapters.parallel import shard_of
from attncap.adapters.served import ServedCall
from attncap.annotations import Annotations, Annotator, FeatureFunction, TagFunction
from attncap.display import SmallMap, maps_html
from attncap.kept_stats import KEEP, KeptStats
from attncap.layers import LastRows, Layers, LayerSelection, Steps, is_backward_running, module_of
from attncap.moments import pick
from attncap.types import HeadStats, StatSpec
from attncap.validation import check_spec

Watcher = Callable[[str, ServedCall, Tensor, HeadStats], None]
"""Is given the name of the module, the call, its out (B, H, Q, E) and its statistics."""

IMPORTANCE = "importance"

# Root modules of the captures that are open, so that two on one model are refused.
_open_roots: list[nn.Module] = []
_open_lock = threading.Lock()


class Capture:
    """Captures the statistics of a model's attention heads; see `capture` for the arguments.

    Args:
        watch: is shown every call that is recorded, with its tensors; what it keeps is its own affair. Dropout is
            refused then: the out that is shown would not be the one that the model goes on with.

    Attributes:
        takes_dropout: see `adapters.Sink`.
        groups: names of the groups of the sequences of the next batches, one per sequence; None for one group "all".
        stats: module name -> HeadStats of its newest call (keep="last"), or the list of all of them (keep="all").
    """

    def __init__(
        self,
        model: nn.Module,
        spec: StatSpec = StatSpec(),  # noqa: B008 - frozen
        *,
        layers: Layers | None = None,
        tags: Mapping[str, TagFunction] | None = None,
        features: Mapping[str, FeatureFunction] | None = None,
        keep: str = "summary",
        queries: int | None = None,
        every: int = 1,
        importance: bool = False,
        differentiable: bool = False,
        histogram: bool = False,
        watch: Watcher | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _check_flags(keep, importance=importance, differentiable=differentiable)
        self.model = model
        self.spec = check_spec(spec)
        self._phases = {PREFILL: Accumulator(histogram=histogram)}
        self.groups: Sequence[str] | None = None
        self.stats: Mapping[str, Any] = KeptStats(keep)
        self._annotator = Annotator(tags, features)
        self._adapter = adapter_for(model)
        self._modules = dict(named_modules(model))
        self._selection = LayerSelection(layers, self._adapter.known_layers, self._modules)
        self._rows = LastRows(queries)
        self._steps = Steps(every)
        self._undo = ExitStack()
        self._lock = threading.Lock()  # several threads may run the model
        self._watcher = watch
        self.takes_dropout = watch is None
        self.differentiable = differentiable
        self.importance = importance
        self._told: dict[str, set[str]] = {}  # what was known of a module's calls
        self._heads: dict[str, tuple[Heads, list[int] | None]] = {}  # of the newest call of each module
        self._shares: dict[tuple[str, int, int], tuple[int, int]] = {}  # what `shard_of` said of a module's calls

    def __enter__(self) -> Capture:
        mine = set(self.model.modules())
        with _open_lock:
            if any(root in mine or self.model in set(root.modules()) for root in _open_roots):
                raise RuntimeError(
                    "capture: this model, or a part of it, is being captured already; close that one first"
                )
            _open_roots.append(self.model)
        with ExitStack() as undo:
            undo.callback(_open_roots.remove, self.model)
            undo.callback(self._shares.clear)
            self._steps.follow(undo, self.model)
            undo.enter_context(self._adapter.open(self))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)
        if error is None:
            self._selection.refuse_unused()

    def __reduce__(self) -> Any:
        """A model's hooks hold the capture, so that this is where a copy of a model that is captured ends."""
        raise TypeError("capture: a model can be neither copied nor pickled while it is captured, only outside")

    @property
    def accumulator(self) -> Accumulator:
        """The summary of everything captured so far; another one may be put in its place between two forwards.

        Once something was decoded it is put together from both phases whenever it is read.
        """
        if DECODE not in self._phases:
            return self._phases[PREFILL]
        whole = Accumulator(histogram=self._phases[PREFILL].histogram)
        for phase in PHASES:
            whole.merge(self._phases[phase])
        return whole

    @accumulator.setter
    def accumulator(self, accumulator: Accumulator) -> None:
        self._phases = {PREFILL: accumulator}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules captured so far, in order of execution."""
        return tuple(dict.fromkeys(module for phase in self._phases.values() for module in phase.modules))

    @property
    def complete_layers(self) -> tuple[nn.Module, ...]:
        """All modules that can call attention, captured or not; none where only running the model tells."""
        names = self._adapter.known_layers if self._adapter.complete else None
        return tuple(self._modules[name] for name in names or ())

    def mean(self, stat: str, phase: str | None = None) -> Tensor:
        """Mean of a statistic over all counted rows so far.

        Args:
            stat: a name as in heads.parquet: those of HeadStats, ``topk_mass``, ``max_prob``, ``relative_entropy``,
                ``offset_mass[-1]``, and the names given to tags and features.
            phase: "decode" for the calls with one query row while the model's cache held keys already, "prefill" for
                all others (also where a cache is given several rows at once), None for both.

        Returns:
            (layers, heads) float64 on the CPU; NaN where a layer has fewer heads or nothing was counted.

        Raises:
            ValueError: no such statistic was captured; the message names those that were. No such phase.
        """
        return self._table(stat, "mean", phase)

    def std(self, stat: str, phase: str | None = None) -> Tensor:
        """Standard deviation (the population's) over all counted rows so far; else as `mean`."""
        return self._table(stat, "std", phase)

    def count(self, stat: str, phase: str | None = None) -> Tensor:
        """How many rows of a statistic were counted so far: (layers, heads) int64; else as `mean`."""
        return self._table(stat, "count", phase)

    def _table(self, stat: str, field: str, phase: str | None) -> Tensor:
        """(layers, heads): the rows are those of `layers`, whichever of them ran in the phase."""
        whole = self.accumulator
        table = whole.table(stat, field)
        if phase is None:
            return table
        if phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)} or None, got {phase!r}")
        part = Accumulator(histogram=whole.histogram)
        for module, heads in zip(whole.modules, whole.heads, strict=True):
            part.expect(module, heads)
        if phase in self._phases:
            part.merge(self._phases[phase])
        if stat in part.stats:
            return part.table(stat, field)
        return torch.zeros_like(table) if field == "count" else torch.full_like(table, torch.nan)

    def _repr_html_(self) -> str:
        """What a notebook shows: a heat map of means for each statistic."""
        whole = self.accumulator
        maps = [SmallMap(stat, whole.table(stat).tolist()) for stat in whole.stats]
        heading = f"capture of {type(self.model).__name__}, {len(whole.modules)} layers"
        return maps_html(heading, "Means over all counted rows so far; rows are layers, columns heads.", maps)

    # What the adapter asks and tells: attncap.adapters.Sink.

    def selects(self, module: str) -> bool:
        """Whether the module's statistics are wanted."""
        return self._steps.wanted and self._selection.selects(module)

    def counted(self, query_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The rows that count of those that are tokens."""
        return self._rows.among(query_mask, query)

    def annotate(self, batch: Mapping[str, Any]) -> Annotations | None:
        """Tags and features of a batch; activation checkpointing runs parts of a model, which are given no batch."""
        wanted = self._annotator and self._steps.wanted and not is_backward_running()
        return self._annotator(batch) if wanted else None

    def record(
        self,
        module: str,
        stats: HeadStats,
        annotations: Annotations,
        seen_keys: Tensor | None,
        key_mask: Tensor | None,
        phase: str = PREFILL,
        *,
        width: int,
    ) -> None:
        """Take the statistics of one call; of several threads' calls one after another."""
        observed = stats
        if self.differentiable:
            observed = HeadStats(**{name: tensor.detach() for name, tensor in stats.items()})
        values = row_values(
            observed,
            self.spec,
            tag_names=annotations.tag_names,
            feature_names=annotations.feature_names,
            seen_keys=seen_keys,
        )
        counted = counted_rows(values, observed, seen_keys=seen_keys, key_mask=key_mask)
        heads = self._heads_of(module, stats.lse.shape[1], width)
        with self._lock:
            self._heads[module] = heads
            self._add(module, values, counted, heads, phase)
            assert isinstance(self.stats, KeptStats)
            self.stats.keep(module, stats)

    def record_gates(self, module: str, call: ServedCall, by_gate: Tensor) -> None:
        """Count abs(<dloss / dout_i, out_i>) of every row."""
        importance = by_gate.abs()
        rows = self.counted(call.query_mask, call.query)
        counted = torch.ones_like(importance, dtype=torch.bool) if rows is None else rows[:, None].expand_as(importance)
        with self._lock:
            self._add(module, {IMPORTANCE: importance}, {IMPORTANCE: counted}, self._heads[module], PREFILL)

    def _add(
        self,
        module: str,
        values: dict[str, Tensor],
        counted: dict[str, Tensor],
        among: tuple[Heads, list[int] | None],
        phase: str,
    ) -> None:
        """Add the rows of a call, (B, H, N) each, to the summary."""
        heads, places = among
        if places is not None:
            counted = {name: rows.expand_as(values[name]) for name, rows in counted.items()}
            values = {name: pick(value, places, 1) for name, value in values.items() if places}
            counted = {name: pick(rows, places, 1) for name, rows in counted.items() if places}
        if phase not in self._phases:
            self._phases[phase] = Accumulator(histogram=self._phases[PREFILL].histogram)
        self._phases[phase].expect(module, heads.total)
        self._phases[phase].add(module, values, counted, self.groups, heads=heads)

    def watch(self, module: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        """Show a call to who asked for it, and remember what its backward may no longer know."""
        if self.importance or self.differentiable:
            self._told.setdefault(call.name, set()).update(call.told)
        if self._watcher is not None:
            self._watcher(module, call, out, stats)

    def forgotten(self, call: ServedCall) -> str:
        """What the forward of a call knew that it does not when it is computed once more."""
        return " and ".join(sorted(self._told.get(call.name, set()) - call.told))

    def _heads_of(self, module: str, given: int, width: int) -> tuple[Heads, list[int] | None]:
        """The heads that count of those a call was given, so wide, and their places among them; None for all places.

        Where several processes share a module's heads, they are numbered through.
        """
        name = module_of(module)
        asked = (name, given, width)
        if asked not in self._shares:
            self._shares[asked] = shard_of(self._modules[name], given, width)
        place, parts = self._shares[asked]
        first, total = place * given, parts * given
        numbers = tuple(range(first, first + given))
        wanted = self._selection.heads_of(name, total)
        if wanted is None:
            return Heads(numbers, total), None
        numbers = tuple(number for number in wanted if number in numbers)
        return Heads(numbers, total), [number - first for number in numbers]


def capture(
    model: nn.Module,
    spec: StatSpec = StatSpec(),  # noqa: B008 - frozen
    *,
    layers: Layers | None = None,
    tags: Mapping[str, TagFunction] | None = None,
    features: Mapping[str, FeatureFunction] | None = None,
    keep: str = "summary",
    queries: int | None = None,
    every: int = 1,
    importance: bool = False,
    differentiable: bool = False,
) -> Capture:
    """Capture the statistics of every attention head while the model runs, without the N x N map.

    ::

        with attncap.capture(model) as cap, torch.no_grad():
            model(**batch)
        cap.mean("entropy")  # (layers, heads), nats

    Inside the block the model's attention is computed by attncap; afterwards everything is as it was, also after an
    exception. Results stay readable. The attention maps themselves are never made: with ``output_attentions=True`` the
    model gives none of them, and a warning says so. Padding is left out: rows whose entry in the 2-D
    ``attention_mask`` is 0 are not counted.

    In a torch module every call of ``F.scaled_dot_product_attention`` (or attncap's) is captured under the name of the
    innermost module whose forward makes it, and so are ``nn.MultiheadAttention`` and torch's transformer layers, off
    their fused kernels meanwhile. A second call in one forward of a module is ``name#1``, the next one ``name#2``. A
    module called several times sums up, but where it is used for self-attention and for cross-attention the one that
    came second has a name of its own, ``name:cross`` or ``name:self``. Padding is read from ``key_padding_mask``,
    ``src_key_padding_mask``, ``tgt_key_padding_mask`` (True is padding) and a bool or integer ``attention_mask`` (true
    is a token) among the arguments of the modules around the call, and from masks that depend on the key alone.
    ``nn.MultiheadAttention(..., need_weights=True)`` still gives the map it was asked for, which costs what it costs;
    a row that sees no key is 0 in it, not NaN. What ran but cannot be captured (a softmax multiplied by hand,
    ``flex_attention``, TorchScript) is named in one warning at the end of the block.

    Of a model that is spread over processes, each captures its own batch and its own heads: under a tensor-parallel
    plan these have their numbers in the whole module, and the others a count of 0; where the plan leaves the heads of
    a module together, every process counts all of them. ``cap.accumulator``, sent by
    ``to_bytes``, is put together by ``merge``. Modules have the names that they have without DDP's or FSDP's wrappers.

    Attention with dropout stays the model's own in training mode: its outputs, gradients and random numbers are those
    without a capture. Its statistics, those of the distribution before dropout, cost one more forward of the attention.

    While a model is trained a capture observes: the attention has its gradients, the statistics keep no graph, and rows
    that activation checkpointing computes once more are not counted twice. With it, run the backward inside the block.

    A model compiled by torch.compile is compiled once more for each time a capture is opened, so open one around many
    forwards; compiled parts are not looked through for attention written by hand. Inside a graph the masks of
    Transformers models are whole ones, N x N bool.

    Args:
        model: a Transformers model, or any torch module.
        spec: which statistics to capture.
        layers: names of attention modules, or their indices in order; None for all. The others keep the attention
            they had. A mapping of them to lists of heads, ``{"layers.3.attn": [0, 5], 4: None}``, sums up these heads
            alone (None for all of them): the others stand in tables with a count of 0.
        tags: name -> function of the batch (the arguments of the model's forward by name, or the dictionary that is
            its only one) that gives (query_tags, key_tags), integers (B, N) each: the statistic of that name is the
            probability on keys whose tag equals the query's. `attncap.tags` has some. A negative key tag matches
            nothing.
        features: name -> function of the batch that gives floats (B, N) or (B, N, F): the statistic of that name is
            their mean under p; with F > 1 they are called ``name[0]``, ``name[1]``, ...
        keep: "summary" keeps means and the like; "last" also the HeadStats of each module's newest call, "all" those
            of every call, in ``cap.stats``.
        queries: only the last so many tokens of each sequence count as query rows, in every call: ``received_mass`` is
            then what keys receive from an observation window, as SnapKV asks for it. None for all.
        every: of the forwards of `model` every n-th one is captured, from the first on; in those between, the model's
            own attention runs. What runs outside any forward of it (an encoder that `generate` calls) is captured.
        importance: count the statistic ``importance`` too, from the backwards that run: of each head the mean over
            tokens of abs(<dloss/dout_i, out_i>), which is the absolute derivative by a gate of 1 on what the head
            gives at token i (Michel et al. 2019). Where reentrant checkpointing hides padding that the forward knew
            of, the backward raises UnsupportedError, and an nn.MultiheadAttention with dropout the forward.
        differentiable: with `keep`, statistics in ``cap.stats`` carry gradients, so that a loss may contain them.
            Of activation checkpointing it takes what is not reentrant, where the checkpointed function is given the
            padding mask and there are no tags and features; the rest is refused by name, and so is a compiled graph.

    Returns:
        A `Capture`, to be used in a ``with`` statement. Used in several, it goes on counting.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
        UnsupportedError: the model's attention cannot be captured; the message says why. Also raised inside the
            block for dropout in a compiled graph.
        RuntimeError: the model is being captured already.
    """
    return Capture(
        model,
        spec,
        layers=layers,
        tags=tags,
        features=features,
        keep=keep,
        queries=queries,
        every=every,
        importance=importance,
        differentiable=differentiable,
    )


def _check_flags(keep: str, *, importance: bool, differentiable: bool) -> None:
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}, got {keep!r}")
    for name, flag in (("importance", importance), ("differentiable", differentiable)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__} ({flag!r})")
    if differentiable and (keep == "summary" or importance):
        given = "importance=True" if importance else 'keep="summary"'
        raise ValueError(f'differentiable: expected keep="last" or "all" and no importance, got {given}')
