"""How a capture reaches the attention calls of a model: one adapter per family of models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from attncap.annotations import Annotations
from attncap.types import HeadStats, StatSpec

if TYPE_CHECKING:
    from attncap.adapters.served import ServedCall

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)
"""What a call did: decode = one query row while the model's cache held keys already; prefill = everything else."""

# Where torch.compile, FSDP and activation checkpointing keep the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Sink(Protocol):
    """What an adapter tells about the calls it sees."""

    spec: StatSpec
    differentiable: bool
    """Whether torch's autograd is to find its way through the statistics too."""
    importance: bool
    """Whether `record_gates` is to be called by the backwards that run."""
    takes_dropout: bool
    """Whether calls with dropout are left to the model's own attention and watched beside it, or refused."""

    def selects(self, module: str) -> bool:
        """Whether the statistics of this module are wanted."""

    def counted(self, query_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """(B, Q) bool: rows that count of those that are tokens by `query_mask`; None for all. query (B, H, Q, D)."""

    def annotate(self, batch: Mapping[str, Any]) -> Annotations | None:
        """Tags and features of a batch; None where there are none."""

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
        """Take the statistics of one call; `seen_keys` and `key_mask` are those of `accumulate.counted_rows`.

        Args:
            width: of the output of one head.
        """

    def record_gates(self, module: str, call: ServedCall, by_gate: Tensor) -> None:
        """Take what the backward of one call knows: <dloss / dout_i, out_i> of every row, (B, H, Q)."""

    def watch(self, module: str, call: ServedCall, out: Tensor, stats: HeadStats) -> None:
        """See the tensors of a call that was recorded; out (B, H, Q, E)."""

    def forgotten(self, call: ServedCall) -> str:
        """What the forward of a call knew that it does not when it is computed once more; "" if nothing."""


class Adapter(Protocol):
    """One model, made ready to tell a sink about its attention calls."""

    known_layers: tuple[str, ...] | None
    """Names of the attention modules, in order of definition; None where only running the model tells."""

    complete: bool
    """Whether no other module can make an attention call."""

    def open(self, sink: Sink) -> AbstractContextManager[None]:
        """Tell `sink` about every attention call made inside the block; everything is undone after it."""


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model and all modules in it; the model itself goes by the name of its class.

    Modules wrapped by torch.compile, DistributedDataParallel, FSDP or activation checkpointing stand for themselves,
    under the names of the bare model.
    """
    found, hidden = [], set()
    for name, module in model.named_modules():  # parents come before their children
        inside = _wrapped_by(module)
        if inside is not None:
            hidden.add(f"{name}.{inside}" if name else inside)
            continue
        parts = name.split(".")
        bare = ".".join(part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in hidden)
        found.append((bare or type(module).__name__, module))
    return found


def _wrapped_by(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module that it wraps; None for other modules."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    return next((name for name in _WRAPPED if name in module._modules), None)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        UnsupportedError: the model's attention cannot be captured; the message says why.
    """
    # A Transformers model can only exist where transformers was imported already.
    if "transformers" in sys.modules:
        from attncap.adapters import inspection, transformers

        hosts = inspection.outermost_models(model)
        registered = [host for host in hosts if host._can_set_attn_implementation()]
        if hosts and registered == hosts and not inspection.has_other_parts(model):
            return transformers.TransformersAdapter(model, hosts)
        # Without either of the two nothing could be captured, which this says.
        for host in hosts:
            if host not in registered and not host._supports_sdpa and not inspection.calls_torch(host):
                return transformers.TransformersAdapter(model, [host])
        if registered:
            from attncap.adapters.composed import ComposedAdapter

            return ComposedAdapter(model, registered)
    from attncap.adapters.modules import ModuleAdapter

    return ModuleAdapter(model)
