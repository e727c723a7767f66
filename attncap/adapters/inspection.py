"""What can be told of a Transformers model without running it: its parts, and which of them attention goes through."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attncap.adapters import named_modules
from attncap.adapters.delegate import REGISTRY_ATTRIBUTE

_ATTENTION_NAME = re.compile("attention|attn", re.IGNORECASE)
_TORCH_CALLS = ("scaled_dot_product_attention", "multi_head_attention_forward")
_ATTENTION_CALLS = ("softmax", *_TORCH_CALLS)


def outermost_models(model: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models in a module that are not part of another one."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, PreTrainedModel) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration of a model, each once: its own, those inside it and those of the models inside it."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner = (getattr(config, name, None) for name in config.sub_configs)
            waiting += [sub_config for sub_config in inner if sub_config is not None]
    return list(found.values())


def calls_the_registry(kind: type) -> bool:
    """Whether a class's own code asks Transformers' registry for its attention function."""
    return any(REGISTRY_ATTRIBUTE in names for names in _names_used(kind))


def calls_torch(model: nn.Module) -> bool:
    """Whether a module, or one inside it, calls an attention function of torch, as far as its code tells."""
    return any(calls_torch_itself(module) for module in model.modules())


def calls_torch_itself(module: nn.Module) -> bool:
    """Whether a module's own code calls an attention function of torch."""
    forward = getattr(inspect.unwrap(module.forward), "__code__", None)  # it may not be that of the class
    code = [*_names_used(type(module)), *([] if forward is None else [forward.co_names])]
    return any(call in names for names in code for call in _TORCH_CALLS)


def escapes_the_registry(module: nn.Module) -> bool:
    """Whether a module computes attention by other means than the registry, or might."""
    kind = type(module)
    if is_foreign(module):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, PreTrainedModel):
        return not module._can_set_attn_implementation()
    if not _ATTENTION_NAME.search(kind.__name__) or calls_the_registry(kind):
        return False
    return any(call in names for names in _names_used(kind) for call in _ATTENTION_CALLS)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's forward is written by neither torch nor Transformers: then it may be anything."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    written = inspect.unwrap(type(module).forward)
    forward = inspect.unwrap(module.forward)  # torch.compile and hooks of Accelerate wrap it
    if getattr(forward, "__func__", forward) is not written:
        return True
    return not str(written.__module__).startswith(("torch.", "transformers."))


def has_other_parts(model: nn.Module) -> bool:
    """Whether some of a model's modules compute attention by other means than the registry, or might."""
    return any(escapes_the_registry(module) for _, module in named_modules(model))


def _names_used(kind: type) -> Iterator[tuple[str, ...]]:
    """The global and attribute names in each method of a class, inherited ones included, overridden ones not."""
    overridden: set[str] = set()
    for parent in kind.__mro__:
        if parent in (PreTrainedModel, nn.Module):  # PreTrainedModel only checks names with the registry
            return
        for name, attribute in vars(parent).items():
            code = getattr(inspect.unwrap(attribute), "__code__", None) if callable(attribute) else None
            if code is not None and name not in overridden:
                yield code.co_names
                if "super" not in code.co_names:
                    overridden.add(name)
