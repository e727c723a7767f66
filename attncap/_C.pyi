"""The compiled kernels; see csrc/bindings.cpp."""

from collections.abc import Sequence as Rows

source_hash: str  # of csrc/, as it was compiled
cuda_compiler: str  # what compiled the CUDA kernels, and for which architectures; "" without them
cuda_hash: str  # of the CUDA kernels' part of it and their compiler; "" without them
cuda_lacks: str  # why there are no CUDA kernels; "" with them

class Array:
    def __init__(self, data: int, dtype: str, strides: Rows[int]) -> None: ...

class Sequence:
    def __init__(self, batch: int, row0: int, rows: int, key0: int, keys: int, offset: int) -> None: ...

class Problem:
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    sequences: list[Sequence]
    threads: int
    scale: float
    softcap: float
    causal: bool
    window_left: int
    window_right: int
    entropy: bool
    max: bool
    distance: bool
    collision: bool
    received: bool
    sink: int
    diagonal: int
    topk: int
    offsets: list[int]
    tags: int
    features: int

class Upstream: ...
class Gradients: ...

class Moments:
    def __init__(
        self, count: int, nonfinite: int, mean: int, m2: int, low: int, high: int, histogram: int, bins: int
    ) -> None: ...

class RowValues:
    def __init__(self, values: Array, counted: Array, moments: Rows[Moments], is_signed: bool) -> None: ...

def attention(problem: Problem) -> None: ...
def backward(problem: Problem, upstream: Upstream, gradients: Gradients) -> None: ...
def add_rows(statistics: Rows[RowValues], batch: int, rows: int, heads: Rows[int]) -> None: ...
def fma_rate(seconds: float) -> float: ...
def cuda_runtime_lacks() -> str: ...  # with CUDA kernels only
def instruction_sets() -> list[str]: ...
