"""The CPU kernel's own memory does not grow with the sequence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the process from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_65536_rows_with_all_statistics_take_at_most_64_mebibytes(dtype: str) -> None:
    program = PROGRAM.format(dtype=dtype)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 64
