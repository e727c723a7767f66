"""Models spread over processes: which of a module's heads this process computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from attncap.types import UnsupportedError


def shard_of(module: nn.Module, heads: int, width: int) -> tuple[int, int]:
    """(place, parts) of the heads that this process computes, of an attention module whose forward is running.

    A tensor-parallel plan (`parallelize_module`, or a `tp_plan` of Transformers) gives each process those rows of the
    projections that belong to its heads: a DTensor that is sharded along its first dimension. Those which FSDP
    shards are whole while their module runs. (0, 1) where every process has all heads, also where a plan has the
    projections put together again before the attention (`colwise_gather_output`).

    Args:
        heads: how many of them a call of the module has here, whose outputs are so `width` wide.
    """
    sharded = list(_sharded(module))
    # The projection of the outputs takes those of all heads of the module.
    if any(side == 1 and parameter.shape[1] == heads * width for parameter, side, _, _ in sharded):
        return 0, 1
    for parameter, side, place, parts in sharded:
        if side == 0:
            if parameter.shape[0] % parts:
                raise UnsupportedError(
                    f"model: the {parameter.shape[0]} rows of a projection of {type(module).__name__} are not divided "
                    f"evenly among {parts} processes"
                )
            return place, parts
    return 0, 1


def _sharded(module: nn.Module) -> Iterator[tuple[Tensor, int, int, int]]:
    """(weight, the dimension it is sharded along, this process' place, parts) of the maps in a module."""
    tensor = sys.modules.get("torch.distributed.tensor")  # there where something was sharded
    if tensor is None:
        return
    for part in module.modules():
        if part is not module and _is_fsdp(part):  # by itself, so that it may be sharded again already
            continue
        for parameter in part.parameters(recurse=False):
            if isinstance(parameter, tensor.DTensor) and parameter.dim() == 2:
                mesh = parameter.device_mesh
                for axis, placement in enumerate(parameter.placements):
                    if placement.is_shard():
                        yield parameter, placement.dim, mesh.get_local_rank(axis), mesh.size(axis)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
