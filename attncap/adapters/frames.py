"""Which module of a model is running, and with which arguments: followed by hooks, per thread.

B batch  Q query rows  K keys
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attncap.annotations import Annotations

PADDING = ("tgt_key_padding_mask", "src_key_padding_mask", "key_padding_mask", "attention_mask")
"""Arguments that say which tokens are padding: True is padding, and a token in `attention_mask`."""

# Arguments that hold the tokens to look at, where they are others than those that look.
_CONTEXT = ("context", "memory", "encoder_hidden_states", "encoder_output", "encoder_outputs", "key_value_states")


class Signature:
    """The names of a forward's arguments, read once."""

    def __init__(self, module: nn.Module) -> None:
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):  # a forward without a readable signature
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(one.name for one in parameters if one.kind in positional)
        self.names = frozenset(one.name for one in parameters)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name; those left to their defaults are not there."""
        # More arguments than names: the forward takes *args, or says itself what is wrong.
        arguments = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        if len(arguments) == 1:  # a forward that takes its batch as one dictionary
            (only,) = arguments.values()
            return dict(only) if isinstance(only, dict) else arguments
        return arguments


class Frame:
    """One running forward."""

    def __init__(self, module: nn.Module, name: str, signature: Signature, arguments: Mapping[str, Any]) -> None:
        self.module = module
        self.name = name
        self.calls = 0  # attention calls made in it, not counting those in modules inside
        self.served = False  # whether it, or a module inside, made a call that was seen
        self.failed = False  # whether it ended with an exception
        self.elsewhere = False  # whether another adapter serves its own calls
        self.softmax: tuple[int, ...] | None = None  # (Q, K) of the newest softmax in it or inside
        self.masks = {name: arguments.get(name) for name in PADDING if name in signature.names or name in arguments}
        self.annotations: Annotations | None = None  # of the batch, where this module was given it
        self.cached = 0  # how many keys its cache held when it began, of the outermost module that was given one
        self.looks_elsewhere = _looks_elsewhere(module, name, signature, arguments)


def _looks_elsewhere(module: nn.Module, name: str, signature: Signature, arguments: Mapping[str, Any]) -> bool:
    """Whether a module's arguments, or else its names, say that it attends to other tokens than its own."""
    query, key = arguments.get("query"), arguments.get("key")
    if query is not None and key is not None:
        return query is not key
    if any(one in signature.names for one in _CONTEXT):
        first = next(iter(arguments.values()), None)
        return any(arguments.get(one) is not None and arguments[one] is not first for one in _CONTEXT)
    return "cross" in name.rpartition(".")[2].lower() or "cross" in type(module).__name__.lower()


class Frames:
    """The running modules of one model, innermost last; each thread has its own.

    Args:
        modules: (name, module) of the model and all modules in it.
        entered: called with a frame and its arguments when it starts.
        left: called with a frame when it ends, also on an exception. In both the frame is the last one running.
    """

    def __init__(
        self,
        modules: list[tuple[str, nn.Module]],
        entered: Callable[[Frame, dict[str, Any]], None],
        left: Callable[[Frame], None],
    ) -> None:
        self._modules = modules
        self._entered, self._left = entered, left
        self._of_thread = threading.local()

    @property
    def running(self) -> list[Frame]:
        """Those of this thread."""
        running: list[Frame] | None = getattr(self._of_thread, "running", None)
        if running is None:
            running = []
            self._of_thread.running = running
        return running

    def follow(self, undo: ExitStack) -> None:
        """Register the hooks; `undo` takes them off."""
        for name, module in self._modules:
            self._follow(undo, module, name)
        undo.callback(self.running.clear)

    def _follow(self, undo: ExitStack, module: nn.Module, name: str) -> None:
        signature = Signature(module)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = signature.bind(args, kwargs)
            frame = Frame(module, name, signature, arguments)
            running = self.running
            # An interrupt leaves frames behind, for torch runs no hook then.
            if running and running[0].module is module:
                running.clear()
            running.append(frame)
            self._entered(frame, arguments)

        def leave(module: nn.Module, _args: Any, result: Any) -> None:
            running = self.running
            # A hook of someone else may have raised before `enter` ran: then there is nothing to leave.
            if any(frame.module is module for frame in running):
                while running[-1].module is not module:
                    running.pop()
                # So torch calls the hook then. A graph is not to look at the result: torch warns of its gradient.
                running[-1].failed = not torch.compiler.is_compiling() and result is None
                self._left(running[-1])
                running.pop()

        undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(leave, always_call=True).remove)


def cached_keys(arguments: Mapping[str, Any]) -> int:
    """How many keys the cache holds that a forward was given; 0 without one."""
    length = getattr(arguments.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())


def padding_of_rows(running: list[Frame], batch: int, rows: int, *, crosses: bool) -> Tensor | None:
    """(B, Q) bool, False for padding, from the arguments of the running modules; None where none of them tells.

    The innermost module that tells is believed. In a decoder layer the rows are those of the target, in an encoder
    layer those of the source, whatever the modules around them were given for the other side.
    """
    side = ""
    for frame in reversed(running):
        if not side:
            side = next((one for one in ("tgt", "src") if f"{one}_key_padding_mask" in frame.masks), "")
        padding = [
            frame.masks.get(f"{side}_key_padding_mask"),
            None if crosses else frame.masks.get("key_padding_mask"),
        ]
        for mask in padding:
            found = tokens_in(mask, batch, rows, marks_padding=True)
            if found is not None:
                return found
        if side != "tgt":
            found = tokens_in(frame.masks.get("attention_mask"), batch, rows, marks_padding=False)
            if found is not None:
                return found
    return None


def tokens_in(mask: Any, batch: int, length: int, *, marks_padding: bool) -> Tensor | None:
    """(B, length) bool, True for tokens, of a padding mask; None where it is none of this shape.

    Args:
        marks_padding: bool masks are True for padding, floating ones -inf; otherwise bool or integer masks are true
            for tokens, and floating ones are not masks of tokens.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (1, 2):
        return None
    mask = mask[None] if mask.dim() == 1 else mask
    if tuple(mask.shape) != (batch, length):
        return None
    if mask.is_floating_point():
        return mask.isneginf().logical_not() if marks_padding else None
    tokens: Tensor = mask.logical_not() if marks_padding else mask.bool()
    return tokens
