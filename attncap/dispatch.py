"""Which implementation serves a call, and why not the others."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from attncap import qualification
from attncap.types import StatSpec, UnsupportedError
from attncap.validation import Extras

IMPLS = ("reference", "cpu", "triton", "cuda")
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_last_impl: str | None = None


def available_impls() -> dict[str, str]:
    """Name of each implementation -> "yes", or why it cannot run here."""
    return {name: _availability(name) for name in IMPLS}


def last_impl() -> str | None:
    """Name of the implementation that served the newest eager call in this process; None before the first."""
    return _last_impl


def kernel_hash() -> str | None:
    """Names the sources that the compiled kernels were made of; None where they are not built."""
    if _availability("cpu") != "yes":
        return None
    from attncap import _C

    return _C.source_hash


def choose(impl: Any, query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras) -> str:
    """The implementation for a call of checked arguments. One asked for by name never falls back: it serves or raises.

    Raises:
        TypeError, ValueError: `impl` is not one of the names.
        UnsupportedError: it cannot serve here; the message says what it lacks.
    """
    global _last_impl
    if not isinstance(impl, str):
        raise TypeError(f"impl: expected a name, got {type(impl).__name__}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)} or auto, got {impl!r}")
    if impl == "auto":
        chosen = _automatic(query, key, value, spec, extras)
    else:
        chosen, why = impl, lacks(impl, query, key, value, spec, extras)
        if why is not None:
            raise UnsupportedError(f"impl={impl!r} cannot serve this call: {why}")
    if not torch.compiler.is_compiling():
        _last_impl = chosen
    return chosen


def _automatic(query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras) -> str:
    """The C++ kernels on the CPU, the fastest qualified ones on a GPU, where they serve; else the reference."""
    device = query.device.type
    lacking = {name: lacks(name, query, key, value, spec, extras) for name in _OF_DEVICE.get(device, ())}
    serving = tuple(name for name, why in lacking.items() if why is None)
    if not serving:
        if not torch.compiler.is_compiling():
            _warn_of_reference(next(iter(lacking.values()), None) or f"it has no kernels for {device}")
        return "reference"
    head_dim = max(query.shape[-1], value.shape[-1])
    suiting = tuple(name for name in serving if _suits(name, query)) or serving
    return serving[0] if serving == ("cpu",) else _on_gpu(suiting, query.device.index, head_dim)


def _suits(impl: str, query: Tensor) -> bool:
    """Whether an implementation that serves a call is made for calls like it."""
    if impl != "cuda":
        return True
    from attncap import cuda

    return cuda.suits(query)


def _on_gpu(serving: tuple[str, ...], index: int | None, head_dim: int) -> str:
    """The fastest of those that serve the call and are qualified; else the first, with a warning."""
    fastest = qualification.fastest(serving, index)
    if fastest:
        return next((name for largest, name in fastest if head_dim <= largest), fastest[-1][1])
    if not torch.compiler.is_compiling():
        _warn_of_unqualified(serving[0], index)
    return serving[0]


@functools.cache
def _warn_of_reference(why: str) -> None:
    """Once for each reason: what runs is right, but slow and as large as the map."""
    warnings.warn(f"attncap computes with the slow reference, which holds the N x N map, for {why}", stacklevel=5)


@functools.cache
def _warn_of_unqualified(impl: str, index: int | None) -> None:
    """Once for each GPU on which nobody has proved and timed these kernels."""
    why = qualification.lacks(impl, qualification.gpu_name(index))
    warnings.warn(f"attncap takes kernels that are not qualified here: {why}; see `attncap doctor`", stacklevel=6)


def lacks(impl: str, query: Tensor, key: Tensor, value: Tensor, spec: StatSpec, extras: Extras) -> str | None:
    """What keeps an implementation from serving a call, or None."""
    availability = _availability(impl)
    if availability != "yes":
        return availability
    if impl == "cpu" and query.device.type != "cpu":
        return f"it serves tensors on the cpu, got {query.device}"
    if impl == "triton":
        from attncap_kernels import call as triton_call

        return triton_call.lacks(query, value)
    if impl == "cuda":
        from attncap import cuda

        return cuda.lacks(query, key, value, spec, extras)
    return None


def _availability(impl: str) -> str:
    known = {"cpu": _cpu_availability, "triton": _triton_availability, "cuda": _cuda_availability}
    return known[impl]() if impl in known else "yes"


def _cpu_availability() -> str:
    try:
        from attncap import _C  # noqa: F401
    except ModuleNotFoundError:
        return "the C++ extension attncap._C is not built; reinstall attncap with a C++17 compiler"
    except ImportError as error:
        return f"the C++ extension attncap._C does not load: {error}"
    return "yes"


def _triton_availability() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    try:
        from attncap_kernels import launch, plans  # noqa: F401
    except ImportError as error:
        return f"the Triton kernels do not import: {error}"
    if not torch.cuda.is_available() and not plans.INTERPRETED:
        return "torch sees no GPU here (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    return "yes"


def _cuda_availability() -> str:
    availability = _cpu_availability()
    if availability != "yes":
        return availability
    from attncap import _C

    if _C.cuda_lacks:
        return f"attncap is built without CUDA kernels: {_C.cuda_lacks}"
    return "yes" if torch.cuda.is_available() else "torch sees no GPU here"
