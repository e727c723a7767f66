"""Transformers models: inside a capture their attention goes through attncap, by the library's own registries.

B batch  H query heads  Q query rows  K keys  D head dimension
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from attncap.adapters import DECODE, PREFILL, Sink, named_modules
from attncap.adapters.compiled import room_to_compile
from attncap.adapters.delegate import delegate, eager_parameters
from attncap.adapters.frames import Signature, cached_keys
from attncap.adapters.inspection import calls_the_registry, configurations
from attncap.adapters.masks import LazyMask, MaskTerms, only_keys, terms_of, whole_mask
from attncap.adapters.operator import number_of, observe, served
from attncap.adapters.served import ServedCall, check_dropout, computed, fitting
from attncap.annotations import Annotations
from attncap.types import UnsupportedError

# Names that hold "flash", "sdpa" or "flex_attention", or a slash, mean something to Transformers.
_NAME = "attncap"


@dataclass
class _Running:
    """A Transformers model whose forward is running."""

    model: nn.Module
    batch: Mapping[str, Any]
    cached: int = 0  # how many keys its cache held before this forward
    annotations: Annotations | None = None  # of the batch, where no other one runs around it

    @property
    def length(self) -> int:
        """How many tokens it was given; 0 where it takes no tokens."""
        given = (self.batch.get(name) for name in ("inputs_embeds", "input_ids"))
        return next((tokens.shape[1] for tokens in given if isinstance(tokens, Tensor)), 0)


class _OfThread(threading.local):
    """What runs in one thread; several may run the model."""

    def __init__(self) -> None:
        self.running: list[_Running] = []  # innermost last


class TransformersAdapter:
    """Captures every attention call that goes through Transformers' attention registry, and nothing else.

    Raises:
        UnsupportedError: the model's attention does not go through it.
    """

    complete = True

    def __init__(self, root: nn.Module, models: list[PreTrainedModel]) -> None:
        self._names = {module: name for name, module in named_modules(root)}
        self._models = models
        for model in models:
            if not model._can_set_attn_implementation():
                raise UnsupportedError(
                    f"model: the attention of {type(model).__name__} does not go through Transformers' "
                    "AttentionInterface, so attncap cannot capture it"
                )
        self.known_layers: tuple[str, ...] | None = tuple(
            name for module, name in self._names.items() if calls_the_registry(type(module))
        )
        if not self.known_layers:
            kinds = ", ".join(type(model).__name__ for model in models)
            raise UnsupportedError(f"model: {kinds} has no module that calls Transformers' AttentionInterface")
        # What the modules' own eager attention takes, read before anything is compiled.
        taken: Callable[[Any], frozenset[str]] = eager_parameters
        self._taken = {name: taken(type(module)) | {"block_indices"} for module, name in self._names.items()}
        self._sink: Sink | None = None
        self._number = number_of(self)
        self._signatures = {module: Signature(module) for module in self._names if isinstance(module, PreTrainedModel)}
        self._previous: dict[int, str] = {}  # id of a configuration -> its own implementation
        self._of_thread = _OfThread()
        self._crossing: dict[str, bool] = {}  # of a module's newest call that no checkpointing ran once more
        self._called = False
        self._warned = False

    @contextmanager
    def open(self, sink: Sink) -> Iterator[None]:
        """See `Adapter.open`."""
        self._sink, self._called = sink, False
        with ExitStack() as undo:
            name = _register(undo, self._attend, self._make_mask)
            for model in self._models:
                self._switch(undo, model, name)
                for module in model.modules():
                    if isinstance(module, PreTrainedModel):
                        undo.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                        undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)
                undo.callback(model.register_forward_hook(self._refuse_silence).remove)
            undo.callback(self._running.clear)
            undo.enter_context(room_to_compile())
            yield

    @property
    def _running(self) -> list[_Running]:
        """The models whose forwards this thread runs."""
        return self._of_thread.running

    def _switch(self, undo: ExitStack, model: PreTrainedModel, name: str) -> None:
        """Set the implementation of a model and put back each configuration's own value afterwards."""
        for config in configurations(model):
            before = config._attn_implementation_internal
            if str(before).startswith(_NAME):
                raise RuntimeError(
                    f"capture: the configuration of {type(model).__name__} is shared with a model that is being "
                    "captured already; give each model a copy of its own"
                )
            self._previous[id(config)] = before
            undo.callback(setattr, config, "_attn_implementation_internal", before)
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise UnsupportedError(f"model: {type(model).__name__} refuses another attention: {error}") from error
        # Some releases leave out submodels whose configuration is a copy of the model's own.
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
                module.config._attn_implementation_internal = name
        if model.config._attn_implementation != name:
            raise UnsupportedError(f"model: {type(model).__name__} did not take another attention implementation")

    # Hooks: which model is running, with which arguments.

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = self._signatures[module].bind(args, kwargs)
        # An interrupt leaves models behind, for torch runs no hook then.
        if self._running and self._running[0].model is module:
            self._running.clear()
        self._running.append(_Running(module, batch, cached_keys(batch)))
        if not self._warned and _wants_maps(module, batch):
            self._warned = True
            warnings.warn(
                "output_attentions: inside a capture the attention maps are never made, so the model gives none; "
                "run it outside the capture for them",
                stacklevel=2,
            )
        if len(self._running) == 1:
            assert self._sink is not None
            self._running[0].annotations = self._sink.annotate(batch)

    def _leave(self, module: nn.Module, _args: Any, _result: Any) -> None:
        # A hook of someone else may have raised before `_enter` ran: then there is nothing to leave.
        if any(entry.model is module for entry in self._running):
            while self._running.pop().model is not module:
                pass

    def _refuse_silence(self, module: nn.Module, _args: Any, _result: Any) -> None:
        if not self._called:
            raise UnsupportedError(
                f"model: the forward of {type(module).__name__} made no call of Transformers' AttentionInterface, so "
                "nothing was captured"
            )

    # The mask and the attention function.

    def _make_mask(self, **request: Any) -> Tensor:
        additive = self._previous.get(id(request.get("config"))) == "eager"
        return whole_mask(request, additive) if torch.compiler.is_compiling() else LazyMask(request, additive)

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        indices: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B,H,Q,D), key and value (B,G,K,D) -> (out (B,Q,H,D) contiguous, None)."""
        assert self._sink is not None
        name = self._names.get(module)
        if name is not None:
            self._called = True  # a number would be a graph's constant, and every forward compiled anew
        if indices is not None:
            attention_mask = only_keys(attention_mask, indices, key.shape[2])
        # A module without a name belongs to another model of the same configuration.
        given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap}
        given |= {"s_aux": s_aux, "position_bias": position_bias, "cache": cache, **others}
        own = partial(delegate, self._previous_of(module), module, query, key, value, attention_mask, given)
        if name is None or not self._sink.selects(name):
            return own()
        check_dropout(name, dropout, self._sink)
        if cache is not None:
            raise UnsupportedError(f"cache: {name} uses a paged cache, which attncap does not read")
        _refuse_unknown(name, self._taken[name], others)
        if query.shape[0] != key.shape[0]:  # learned queries of batch 1
            query = query.expand(key.shape[0], -1, -1, -1)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        running = self._running[-1] if self._running else _Running(module, {})
        annotations = self._running[0].annotations if self._running else None
        terms = terms_of(attention_mask, query, key, is_causal=causal, cached=running.cached, length=running.length)
        tokens = self._token_rows(name, terms, attention_mask, query, key)
        call = ServedCall(
            name=name,
            crosses=False,
            query=query,
            key=key,
            value=value,
            attn_mask=terms.attn_mask if position_bias is None else _biased(position_bias, terms.attn_mask),
            causal=terms.causal,
            scale=scaling,
            query_mask=_both(terms.row_mask, tokens),
            padded=tokens is not None,
            key_mask=self._key_mask(terms, attention_mask, query, key),
            annotations=fitting(annotations, name, query, key),
            query_offset=terms.query_offset,
            window=terms.window,
            softcap=softcap,
            sink_logits=s_aux,
            seen_keys=terms.seen_keys,
            phase=DECODE if running.cached and query.shape[2] == 1 else PREFILL,
        )
        if dropout:
            with torch._C.DisableTorchFunction():  # another adapter is not to see it too
                out, weights = own()
            observe(self, call, self._sink, out, lambda rows_BQH: rows_BQH.transpose(1, 2))
            return out, weights
        out = served(self, self._number, call, self._sink)
        return out.transpose(1, 2).contiguous(), None

    def serve(self, call: ServedCall) -> tuple[Tensor, Tensor]:
        """See `operator.Server`."""
        assert self._sink is not None
        out, lse, record = computed(call, self._sink)
        record(call.name)
        return out, lse

    @property
    def wants_gates(self) -> bool:
        """See `operator.Server`."""
        return self._sink is not None and self._sink.importance

    def saw_gates(self, call: ServedCall, by_gate: Tensor) -> None:
        """See `operator.Server`."""
        assert self._sink is not None
        self._sink.record_gates(call.name, call, by_gate)

    def _previous_of(self, module: nn.Module) -> str:
        """The implementation that a module would use without the capture."""
        config = getattr(module, "config", None)
        return self._previous.get(id(config)) or self._previous[id(self._models[0].config)]

    def _token_rows(
        self, name: str, terms: MaskTerms, mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """(B, Q) bool: rows that are tokens; None where nothing says that some are not."""
        rows, keys = query.shape[2], key.shape[2]
        if isinstance(mask, LazyMask) and terms.row_mask is not None:
            return terms.row_mask
        crosses = self._crosses(name)
        # The mask's own padding comes first: audio models are given one entry per sample, not per frame.
        if isinstance(mask, LazyMask) and terms.key_mask is not None and rows == keys and not crosses:
            return terms.key_mask
        given = self._argument("attention_mask")
        if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[0] != query.shape[0]:
            return None
        # While decoding the mask has the total length: the rows are its last ones.
        fits = given.shape[1] >= rows if crosses else given.shape[1] in (rows, keys)
        return given[:, given.shape[1] - rows :].to(query.device, torch.bool) if fits else None

    def _crosses(self, name: str) -> bool:
        """Whether the model around a module was given another sequence to look at, as far as the module's keys tell.

        What activation checkpointing runs once more is as its forward was.
        """
        crosses = self._argument("encoder_hidden_states") is not None
        if torch.compiler.is_compiling():
            return crosses
        if self._running:
            self._crossing[name] = crosses
        return self._crossing.get(name, False)

    def _key_mask(self, terms: MaskTerms, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """(B, K) bool: keys that are tokens; None where nothing says that some are not."""
        tokens = self._token_keys(terms, mask, key)
        filled, keys = terms.query_offset + query.shape[2], key.shape[2]
        if not terms.causal or filled >= keys:
            return tokens
        places = (torch.arange(keys, device=key.device) < filled).expand(key.shape[0], -1)  # of a static cache
        return places if tokens is None else tokens & places

    def _token_keys(self, terms: MaskTerms, mask: Tensor | None, key: Tensor) -> Tensor | None:
        if terms.key_mask is not None:
            return terms.key_mask
        if torch.compiler.is_compiling() and mask is not None and mask.dtype == torch.bool:
            return mask.any(2).any(1)  # the whole mask that a graph has in the place of a `LazyMask`
        given = self._argument("attention_mask")
        if self._argument("encoder_hidden_states") is not None or not isinstance(given, Tensor):
            return None
        fits = given.dim() == 2 and tuple(given.shape) == (key.shape[0], key.shape[2])
        return given.to(key.device, torch.bool) if fits else None

    def _argument(self, name: str) -> Any:
        """An argument of the innermost running model's forward."""
        return self._running[-1].batch.get(name) if self._running else None


def _wants_maps(module: nn.Module, batch: Mapping[str, Any]) -> bool:
    asked = batch.get("output_attentions")
    return bool(getattr(module.config, "output_attentions", False) if asked is None else asked)


def _refuse_unknown(name: str, taken: Collection[str], others: Mapping[str, Any]) -> None:
    """Refuse what the model's own eager attention would take and this one would ignore."""
    for argument, value in others.items():
        if argument in taken and value is not None:
            raise UnsupportedError(f"{argument}: {name} gives its attention {argument!r}, which attncap does not know")


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Rows of both masks."""
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _biased(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """An additive mask from T5's (1, H, Q, K) bias and a bool or additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return position_bias + mask


def _register(undo: ExitStack, function: Any, mask_function: Any) -> str:
    """Register the attention and the mask function under one name, which is free again when `undo` closes."""
    name, number = _NAME, 1
    while name in ALL_ATTENTION_FUNCTIONS:
        number += 1
        name = f"{_NAME}_{number}"
    for interface, registered in ((AttentionInterface, function), (AttentionMaskInterface, mask_function)):
        interface.register(name, registered)
        undo.callback(interface._global_mapping.pop, name, None)
    return name
