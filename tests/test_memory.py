"""The CPU kernels' own memory does not grow with the sequence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORWARD = """
import torch
from attncap import StatSpec, attention

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(2)
length = 65536
query, key, value = torch.randn(3, 1, 1, length, 8).to(torch.{dtype})
tags = torch.randint(0, 9, (1, 1, length))
extras = dict(causal=True, query_tags=tags, key_tags=tags, key_features=torch.randn(1, length, 2))
attention(query[:, :, :70], key[:, :, :70], value[:, :, :70], StatSpec.all())
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = peak()
out, stats = attention(query, key, value, StatSpec.all(), **extras)
outputs = out.nbytes + sum(tensor.nbytes for _, tensor in stats.items())
print((peak() - before - outputs) / 2**20)
"""


BACKWARD = """
import torch
from attncap import StatSpec, attention

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(2)

def taken(length):
    leaves = [torch.randn(1, 1, length, 8).to(torch.{dtype}).requires_grad_() for _ in range(3)]
    out, stats = attention(*leaves, StatSpec.all(), causal=True, impl="cpu")
    outputs = [out, *(tensor for name, tensor in stats.items() if name != "topk_index")]
    given = [torch.ones_like(tensor) for tensor in outputs]
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = peak()
    found = torch.autograd.grad(outputs, leaves, given)
    return (peak() - before - sum(tensor.nbytes for tensor in found)) / 2**20

taken(70)
print(taken(32768))
"""


def mebibytes_of(program: str) -> float:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the process from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_65536_rows_with_all_statistics_take_at_most_64_mebibytes(dtype: str) -> None:
    assert mebibytes_of(FORWARD.format(dtype=dtype)) < 64


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the process from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backward_of_32768_rows_through_all_statistics_takes_at_most_64_mebibytes(dtype: str) -> None:
    assert mebibytes_of(BACKWARD.format(dtype=dtype)) < 64
