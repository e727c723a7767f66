"""What a capture could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def names_registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS) | set(AttentionMaskInterface._global_mapping)


def traces(model: nn.Module) -> tuple[Any, ...]:
    """Of a capture of plain modules."""
    hooks = [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_hooks_always_called",
        )
    ]
    return sum(hooks), torch._C._len_torch_function_stack(), torch.backends.mha.get_fastpath_enabled()
