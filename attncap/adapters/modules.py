"""Plain torch modules: the attention functions of torch, and attncap's, called in their forwards.

B batch  H query heads  G key/value heads  Q query rows  K keys  D head dimension
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncap.adapters import DECODE, PREFILL, Sink, named_modules
from attncap.adapters.compiled import room_to_compile
from attncap.adapters.fastpath import follow_padded_rows
from attncap.adapters.frames import Frame, Frames, cached_keys, padding_of_rows
from attncap.adapters.intercept import Interception
from attncap.adapters.operator import gradients_of, number_of, observe, served
from attncap.adapters.served import ServedCall, check_dropout, computed, fitting, tokens_of_mask
from attncap.heads_call import Attend, HeadsCall
from attncap.layers import is_backward_running
from attncap.mha import multi_head_attention, weights_of
from attncap.sdpa import attend_of_thread, recording, sdpa_by, unrecorded
from attncap.types import UnsupportedError

_HAND_WRITTEN = "multiplies a softmax itself, where F.scaled_dot_product_attention would be seen"
_SILENT = "ran without an attention call that can be seen"
_TORCHSCRIPT = "is TorchScript, inside which no call can be seen"
_NESTED = "works on nested tensors"

# Names of the arguments of torch's functions, in order.
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MULTI_HEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class ModuleAdapter:
    """Names each call after the innermost module whose forward made it.

    Args:
        model: its modules are followed.
        hosts: modules inside some of whose calls another adapter serves, of which it tells with `note_call`; their
            arguments, and not the model's, are then the batch of tags and features.
    """

    known_layers: tuple[str, ...] | None = None
    complete = False

    def __init__(self, model: nn.Module, *, hosts: Collection[nn.Module] = ()) -> None:
        modules = named_modules(model)
        self._scripts = _scripts(modules)
        self._model = modules[0][1]
        if isinstance(self._model, torch.jit.ScriptModule):
            raise UnsupportedError(f"model: {type(self._model).__name__} {_TORCHSCRIPT}")
        self._hosts = hosts
        followed = [pair for pair in modules if not isinstance(pair[1], torch.jit.ScriptModule)]
        self._frames = Frames(followed, self._enter, self._leave)
        self._number = number_of(self)
        self._sink: Sink | None = None
        self._crosses: dict[str, bool] = {}  # whether the first call of that name was a cross-attention
        self._escapes: dict[str, str] = {}  # module -> why it was not captured
        self._warned: set[str] = set()
        self._calls = self._missed = 0
        self._lock = threading.Lock()  # several threads may run the model
        self._threads = threading.local()

    @contextmanager
    def open(self, sink: Sink) -> Iterator[None]:
        """See `Adapter.open`."""
        self._sink, self._calls, self._missed = sink, 0, 0
        self._escapes = dict.fromkeys(self._scripts, _TORCHSCRIPT)
        with ExitStack() as undo:
            self._frames.follow(undo)
            follow_padded_rows(undo, self._model)
            if not self._hosts:
                undo.callback(self._model.register_forward_hook(self._refuse_silence).remove)
            undo.enter_context(room_to_compile())
            undo.enter_context(self._serving())
            yield
        self._warn()

    @property
    def is_running(self) -> bool:
        """Whether this thread runs a module of the model."""
        return len(self._frames.running) > 0

    def note_call(self) -> None:
        """Another adapter served an attention call of the running modules."""
        self._calls += 1
        running = self._frames.running
        for frame in running:
            frame.served = True
        if running:
            running[-1].elsewhere = True

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """See and serve the calls of this thread."""
        before = getattr(self._threads, "serving", False)
        self._threads.serving = True
        try:
            with recording(self), Interception(self):
                yield
        finally:
            self._threads.serving = before

    # What `Frames` tells.

    def _enter(self, frame: Frame, arguments: dict[str, Any]) -> None:
        assert self._sink is not None
        if isinstance(frame.module, _FUSED):
            _refuse_nested(frame, arguments)
        running = self._frames.running
        outermost = len(running) == 1
        if outermost if not self._hosts else frame.module in self._hosts:
            frame.annotations = self._sink.annotate(arguments)
        if not any(one.cached for one in running):
            frame.cached = 0 if torch.compiler.is_compiling() else cached_keys(arguments)
        # Modes belong to a thread, and a backward runs without them: a forward in another thread than the capture's
        # gets its own, and so does what activation checkpointing runs once more.
        serving = getattr(self._threads, "serving", False) and not is_backward_running()
        if outermost and not torch.compiler.is_compiling() and not serving:
            self._threads.visit = ExitStack()
            self._threads.visit.enter_context(self._serving())

    def _leave(self, frame: Frame) -> None:
        running = self._frames.running
        outermost = len(running) == 1
        if torch.compiler.is_compiling():
            return
        inside = any(_is_attention(other.module) for other in running[:-1])
        if _is_attention(frame.module) and not (inside or frame.served or frame.failed):
            self._escapes.setdefault(frame.name, _SILENT)
        visit: ExitStack | None = getattr(self._threads, "visit", None)
        if outermost and visit is not None:
            self._threads.visit = None
            visit.close()

    def _refuse_silence(self, module: nn.Module, _args: Any, _result: Any) -> None:
        if not torch.compiler.is_compiling() and not self._calls:
            escapes = "".join(f"; {name} {reason}" for name, reason in self._escapes.items())
            raise UnsupportedError(
                f"model: {type(module).__name__} made no attention call that attncap can see; a plain torch module is "
                "captured where it calls torch's or attncap's scaled_dot_product_attention, or holds an "
                f"nn.MultiheadAttention{escapes}"
            )

    def _warn(self) -> None:
        """Name what ran without being captured, each module once."""
        fresh = {name: reason for name, reason in self._escapes.items() if name not in self._warned}
        self._warned.update(fresh)
        named = [f"{name} {reason}" for name, reason in fresh.items()]
        if self._missed and not self._calls:
            named.append(f"attention calls outside the forward of any module of the model ({self._missed})")
        if named:
            warnings.warn(f"not captured: {'; '.join(named)}", stacklevel=6)

    # What `Interception` tells.

    def serve_sdpa(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `intercept.Server`."""
        frame = self._frames.running[-1]
        if not self._selects(frame):
            return original(*args, **kwargs)
        if any(isinstance(one, Tensor) and one.is_nested for one in (*args, *kwargs.values())):
            self._escape(_NESTED)
            return original(*args, **kwargs)
        given = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
        if not self._drops(frame, given.get("dropout_p", 0.0)):
            return sdpa_by(self.attend, *args, **kwargs)
        out = original(*args, **kwargs)
        sdpa_by(self._beside(out), **(given | {"dropout_p": 0.0}))
        return out

    def serve_multi_head(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """See `intercept.Server`."""
        frame = self._frames.running[-1]
        if not self._selects(frame):
            return F.multi_head_attention_forward(*args, **kwargs)
        given = {**dict(zip(_MULTI_HEAD, args, strict=False)), **kwargs}
        if given.get("training", True) and self._drops(frame, given["dropout_p"]):
            return self._drop_inside(frame, given)
        out, _, call = multi_head_attention(self._attend_heads, *args, **kwargs)
        if not given.get("need_weights", True):
            return out, None
        weights = weights_of(call, average=given.get("average_attn_weights", True))
        return out, weights if out.dim() == 3 else weights[0]

    def _drops(self, frame: Frame, dropout: float) -> bool:
        """Whether a call has dropout, so that it is left to the model; refused where dropout is."""
        assert self._sink is not None
        check_dropout(frame.name, dropout, self._sink)
        return bool(dropout)

    def _drop_inside(self, frame: Frame, given: Mapping[str, Any]) -> Any:
        """What torch's function gives, whose heads cannot be seen: they are computed once more beside it."""
        assert self._sink is not None
        if self._sink.importance:
            raise UnsupportedError(
                f"importance: {frame.name} has dropout {given['dropout_p']} inside torch's function, where its heads "
                "cannot be seen; set it to 0, or capture without importance"
            )
        out, weights = F.multi_head_attention_forward(**given)
        beside = self._beside(out)
        with gradients_of(self._sink):
            multi_head_attention(lambda call: (beside(call), None), **{**given, "training": False})
        return out, weights

    def _beside(self, out: Tensor) -> Attend:
        """Takes the statistics of a call whose `out` the model's own attention gave; gives no numbers."""

        def attend(call: HeadsCall) -> Tensor:
            assert self._sink is not None
            rows = call.query.shape[:3]
            observe(self, self._placed(call), self._sink, out, lambda by_row: by_row.reshape(rows))
            return call.query.new_empty(*rows, call.value.shape[-1])

        return attend

    def saw_other_attention(self, function: str) -> None:
        """See `intercept.Server`."""
        self._escape(f"calls {function}, which cannot be captured")

    def saw_softmax(self, shape: tuple[int, ...]) -> None:
        """See `intercept.Server`."""
        if len(shape) >= 3:
            for frame in self._frames.running:
                frame.softmax = shape[-2:]

    def saw_product(self, shape: tuple[int, ...]) -> None:
        """See `intercept.Server`."""
        frame = self._frames.running[-1]
        # The map itself, or transposed: softmax(S) V and V^T softmax(S)^T.
        if not frame.elsewhere and len(shape) >= 3 and frame.softmax in (shape[-2:], shape[:-3:-1]):
            self._escape(_HAND_WRITTEN)

    def missed_call(self) -> None:
        """See `intercept.Server`."""
        if not torch.compiler.is_compiling() and attend_of_thread() is None:
            self._missed += 1

    def _escape(self, reason: str) -> None:
        self._escapes[self._frames.running[-1].name] = reason
        for frame in self._frames.running:
            frame.served = True  # it is named already

    # The calls.

    def _selects(self, frame: Frame) -> bool:
        """Whether the calls of a module are wanted; either way it made one."""
        assert self._sink is not None
        for outer in self._frames.running:
            outer.served = True
        if not torch.compiler.is_compiling():
            self._calls += 1
        return self._sink.selects(frame.name)

    def attend(self, call: HeadsCall) -> Tensor:
        """See `attncap.heads_call.Attend`."""
        if not self._selects(self._frames.running[-1]):
            return unrecorded(call)
        assert self._sink is not None
        with torch._C.DisableTorchFunction():
            return served(self, self._number, self._placed(call), self._sink)

    def _placed(self, call: HeadsCall) -> ServedCall:
        """The next call of the innermost running module, with what the modules around it know of its tokens."""
        running = self._frames.running
        frame = running[-1]
        crosses = frame.looks_elsewhere if call.crosses is None else call.crosses
        query_mask, key_mask = self._tokens(call, crosses=crosses)
        annotations = next((one.annotations for one in reversed(running) if one.annotations is not None), None)
        cached = max(one.cached for one in running)
        number, frame.calls = frame.calls, frame.calls + 1
        return ServedCall(
            name=f"{frame.name}#{number}" if number else frame.name,
            crosses=crosses,
            query=call.query,
            key=call.key,
            value=call.value,
            attn_mask=call.attn_mask,
            causal=call.causal,
            scale=call.scale,
            query_mask=None if query_mask is None else query_mask.to(call.query.device),
            key_mask=None if key_mask is None else key_mask.to(call.query.device),
            padded=query_mask is not None,
            annotations=fitting(annotations, frame.name, call.query, call.key),
            # Where the rows stand; but torch's causal mask starts at 0 whatever was cached.
            query_offset=0 if call.causal or crosses else cached,
            phase=DECODE if cached and call.query.shape[2] == 1 else PREFILL,
        )

    def _tokens(self, call: HeadsCall, *, crosses: bool) -> tuple[Tensor | None, Tensor | None]:
        """(B, Q) and (B, K) bool, False for padding; None where nothing is known of it."""
        batch, rows, keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
        key_mask = tokens_of_mask(call.attn_mask, batch, keys) if call.key_mask is None else call.key_mask
        query_mask = padding_of_rows(self._frames.running, batch, rows, crosses=crosses)
        if crosses or rows != keys:
            return query_mask, key_mask
        return key_mask if query_mask is None else query_mask, query_mask if key_mask is None else key_mask

    def _attend_heads(self, call: HeadsCall) -> tuple[Tensor, None]:
        if torch.compiler.is_compiling():  # where tensors cannot be compared, the module's arguments can
            call = replace(call, crosses=self._frames.running[-1].looks_elsewhere)
        return self.attend(call), None

    def serve(self, call: ServedCall) -> tuple[Tensor, Tensor]:
        """See `operator.Server`."""
        assert self._sink is not None
        out, lse, record = computed(call, self._sink)
        with self._lock:
            self._calls += 1
            name = self._name_of(call)
        record(name)
        return out, lse

    @property
    def wants_gates(self) -> bool:
        """See `operator.Server`."""
        return self._sink is not None and self._sink.importance

    def saw_gates(self, call: ServedCall, by_gate: Tensor) -> None:
        """See `operator.Server`."""
        assert self._sink is not None
        self._sink.record_gates(self._name_of(call), call, by_gate)

    def _name_of(self, call: ServedCall) -> str:
        """A module whose calls of one number are now of one kind, now of the other, has both apart."""
        if self._crosses.setdefault(call.name, call.crosses) == call.crosses:
            return call.name
        return f"{call.name}:cross" if call.crosses else f"{call.name}:self"


def _refuse_nested(frame: Frame, arguments: Mapping[str, Any]) -> None:
    """torch's modules take nested tensors in their fused kernels alone, which no capture can look into."""
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise UnsupportedError(
                f"{name}: {frame.name} was given a nested tensor, which attncap does not read; give a padded one with "
                "a key padding mask"
            )


def _scripts(modules: list[tuple[str, nn.Module]]) -> list[str]:
    """Names of the TorchScript modules that are not inside another one."""
    names = [name for name, module in modules if isinstance(module, torch.jit.ScriptModule)]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _is_attention(module: nn.Module) -> bool:
    """Whether a module's class is called an attention; torch's own do not compute one without a call."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
