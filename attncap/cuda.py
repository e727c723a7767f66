"""Launcher of the CUDA kernels: what they serve, and one call described to them.

Nothing here waits for the device but the first call with packed sequences of some lengths, whose tables it copies: a
call that has run once can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attncap import _C
from attncap.device_tables import on_device
from attncap.native import problem_of
from attncap.types import HeadStats, StatSpec, UnsupportedError
from attncap.validation import Call, Extras, Options, Span

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
MOST_OFFSETS = 4
MOST_POSITION = 2**28
FEWEST_ROWS = 64  # of a head, for `auto`: what one warpgroup owns
CAPABILITY = (9, 0)
ALIGNMENT = 16  # bytes; what the tensor memory accelerator asks of addresses and strides


def lacks(query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras) -> str | None:
    """What keeps the kernels from serving a call, or None."""
    if query.dtype not in DTYPES:
        return f"it serves bfloat16 and float16, got {query.dtype}"
    dims = query.shape[-1], value.shape[-1]
    if dims[0] not in HEAD_DIMS or dims[0] != dims[1]:
        return f"it serves head dims of 64, 128 and 256, the same for values, got {dims[0]} and {dims[1]} (value)"
    for name in ("attn_mask", "query_tags", "key_features"):
        if getattr(extras, name) is not None:
            return f"it serves calls without {name}"
    if len(spec.offsets) > MOST_OFFSETS:
        return f"it serves up to {MOST_OFFSETS} offsets, got {len(spec.offsets)}"
    if max(_rows(query), _rows(key)) > MOST_POSITION:
        return f"it serves up to {MOST_POSITION} rows and keys, got {_rows(query)} and {_rows(key)}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if why := _lacks_of_layout(tensor):
            return f"{name}: {why}"
    return _lacks_of_device(query.device)


def suits(query: Tensor) -> bool:
    """Whether a call has rows enough to be worth it: few are better served where their keys are split."""
    return _rows(query) >= FEWEST_ROWS


def _rows(tensor: Tensor) -> int:
    """Rows of (B, H, N, D) tensors, or of packed (N, H, D) ones."""
    return tensor.shape[0] if tensor.dim() == 3 else tensor.shape[2]


def _lacks_of_layout(tensor: Tensor) -> str | None:
    if tensor.numel() == 0:
        return None
    steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if tensor.stride(-1) != 1 or 0 in steps or any(step * tensor.itemsize % ALIGNMENT for step in steps):
        got = tuple(tensor.stride())
        return f"it serves strides of multiples of {ALIGNMENT} bytes but 0, and of 1 in the last dimension, got {got}"
    # Where a compiled call's tensors will lie is not known yet.
    if not torch.compiler.is_compiling() and not _is_aligned(tensor):
        return f"it serves tensors that begin at a multiple of {ALIGNMENT} bytes, got one that does not"
    return None


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _lacks_of_device(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it serves tensors on a GPU of NVIDIA's, got {device}"
    return _lacks_of_gpu(device.index)


def _lacks_of_gpu(index: int | None) -> str | None:
    return _lacks_of_processor(index)


# What torch.compiler.assume_constant_result sets (and loads the compiler for): a compiled call asks once.
_lacks_of_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _lacks_of_processor(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != CAPABILITY:
        return f"it serves compute capability 9.0 (Hopper), got {major}.{minor}"
    lacking = _C.cuda_runtime_lacks()
    return f"the CUDA runtime that it was built with does not start: {lacking}" if lacking else None


def attention(call: Call, out: Tensor, stats: HeadStats, *, native: ModuleType = _C) -> None:
    """Fill `out` and `stats` of a call that lacks nothing.

    Args:
        out: (B, H, Q, E), strides as those of the inputs; stats: contiguous tensors of what the call asks for,
            received_mass being zero.
        native: the module that runs it; the tests' own runs the kernels on the CPU.
    """
    if call.query.numel() == 0 or call.key.numel() == 0:
        _fill_unseen(out, stats)
        return
    _check_offsets(call)
    call = _readable(call)
    device = call.query.device
    problem = problem_of(native, call, out, stats)
    launch = native.CudaCall()
    if device.type == "cuda":
        launch.device, launch.stream = device.index, torch.cuda.current_stream(device).cuda_stream
    launch.batch, _, launch.rows, _ = call.query.shape
    launch.keys = call.key.shape[2]
    tables = _add_tables(launch, call, native.cuda_tile_rows(problem), native.cuda_tile_keys(problem))
    workspace = torch.empty(native.cuda_workspace_bytes(problem, launch), dtype=torch.uint8, device=device)
    launch.workspace, launch.workspace_bytes = workspace.data_ptr(), workspace.numel()
    native.attention_cuda(problem, launch)
    del tables, workspace  # whose memory the kernels were given, in the order of the stream


def _check_offsets(call: Call) -> None:
    """Positions less keys stay within 32 bits."""
    far = max(abs(offset) for *_, offset in call.sequences)
    if far > MOST_POSITION:
        raise UnsupportedError(f"impl='cuda' serves query offsets within +-{MOST_POSITION}, got {far}")


def _fill_unseen(out: Tensor, stats: HeadStats) -> None:
    """No row sees a key."""
    out.zero_()
    for name, tensor in stats.items():
        tensor.fill_({"lse": -torch.inf, "max_logit": -torch.inf, "topk_index": -1}.get(name, 0))


def _readable(call: Call) -> Call:
    """The call as the kernels read it: a scale above 0, sink logits in float32.

    What a compiled program has put at an odd address is copied.
    """
    sinks, scale = call.extras.sink_logits, call.options.scale
    if sinks is not None:
        call = replace(call, extras=replace(call.extras, sink_logits=sinks.to(torch.float32).contiguous()))
    if scale <= 0:
        # The kernels know a row's largest score by its largest product.
        options = replace(call.options, scale=-scale or 1.0)
        call = replace(call, query=call.query.neg() if scale < 0 else torch.zeros_like(call.query), options=options)
    query, key, value = (
        tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in (call.query, call.key, call.value)
    )
    return replace(call, query=query, key=key, value=value)


def _add_tables(launch: Any, call: Call, tile_rows: int, tile_keys: int) -> tuple[Tensor, ...]:
    """Tell `launch` where the sequences of a packed call are; the tables must outlive it."""
    if not call.packed:
        return ()
    window = _window(call.options)
    tiles, key_tiles, sequences = _tables(tuple(call.sequences), window, tile_rows, tile_keys, call.query.device)
    launch.tiles, launch.tile_count = tiles.data_ptr(), len(tiles)
    launch.key_tiles, launch.key_tile_count = key_tiles.data_ptr(), len(key_tiles)
    launch.sequences = sequences.data_ptr()
    return tiles, key_tiles, sequences


def _window(options: Options) -> tuple[int, int]:
    """(left, right), the causal mask being right = 0; -1 = unlimited."""
    left, right = options.window
    return left, 0 if options.causal else right


@on_device
def _tables(
    sequences: tuple[Span, ...], window: tuple[int, int], tile_rows: int, tile_keys: int
) -> list[Sequence[tuple[int, ...]]]:
    """(tiles of rows, tiles of keys, sequences) as CudaCall has them."""
    left, right = window

    def keys_seen(span: Span, tile: int) -> int:
        _, _, rows, _, keys, offset = span
        first, last = tile * tile_rows, min((tile + 1) * tile_rows, rows) - 1
        begin = 0 if left < 0 else first + offset - left
        end = keys if right < 0 else last + offset + right + 1
        return max(0, min(end, keys) - max(begin, 0))

    def rows_that_see(span: Span, tile: int) -> int:
        _, _, rows, _, keys, offset = span
        first, last = tile * tile_keys, min((tile + 1) * tile_keys, keys) - 1
        begin = 0 if right < 0 else first - offset - right
        end = rows if left < 0 else last - offset + left + 1
        return max(0, min(end, rows) - max(begin, 0))

    of_rows = _most_work_first(sequences, [-(-span[2] // tile_rows) for span in sequences], keys_seen)
    of_keys = _most_work_first(sequences, [-(-span[4] // tile_keys) for span in sequences], rows_that_see)
    return [of_rows, of_keys, [span[1:] for span in sequences]]


def _most_work_first(
    sequences: tuple[Span, ...], counts: list[int], work: Callable[[Span, int], int]
) -> list[tuple[int, int]]:
    """(sequence, tile) of each tile."""
    table = [(index, tile) for index, count in enumerate(counts) for tile in range(count)]
    return sorted(table, key=lambda entry: work(sequences[entry[0]], entry[1]), reverse=True)
