"""The compiled kernels; see csrc/bindings.cpp."""

from collections.abc import Sequence as Rows

source_hash: str  # of csrc/, as it was compiled

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

class RowValues:
    def __init__(self, values: Array, counted: Array, histograms: Rows[int], bins: int, is_signed: bool) -> None: ...

def attention(problem: Problem) -> None: ...
def summarise(
    statistics: Rows[RowValues], batch: int, rows: int, heads: Rows[int], integers: int, floats: int
) -> None: ...
def fma_rate(seconds: float) -> float: ...
def instruction_sets() -> list[str]: ...
