"""Threads of the CPU kernels: they change no bit, none start on import, forks and callers side by side are safe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from attncap import _C, HeadStats, StatSpec, attention, attention_varlen

Result = tuple[torch.Tensor, HeadStats]


def dense(rows: int, keys: int, heads: int, groups: int, dtype: torch.dtype, causal: bool) -> Result:
    generator = torch.Generator().manual_seed(rows + keys)
    query = torch.randn(1, heads, rows, 16, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, groups, keys, 16, generator=generator).to(dtype)
    tags_q, tags_k = (torch.randint(0, 3, (1, 1, count), generator=generator) for count in (rows, keys))
    features = torch.randn(1, keys, 2, generator=generator)
    extras = {"query_tags": tags_q, "key_tags": tags_k, "key_features": features, "sink_logits": torch.ones(heads)}
    return attention(query, key, value, StatSpec.all(), causal=causal, impl="cpu", **extras)


def packed() -> Result:
    generator = torch.Generator().manual_seed(1)
    bounds_q, bounds_k = [0, 1, 4, 600, 600, 1300], [0, 1153, 1200, 1800, 1801, 2500]
    query = torch.randn(bounds_q[-1], 4, 16, generator=generator)
    key, value = torch.randn(2, bounds_k[-1], 2, 16, generator=generator)
    return attention_varlen(query, key, value, bounds_q, bounds_k, StatSpec.all(), causal=True, impl="cpu")


# A block of keys has 576 or 1152 of them; received mass is summed in several groups from 1024 rows on.
CALLS: dict[str, Callable[[], Result]] = {
    "one block of keys less one": lambda: dense(130, 1151, 2, 2, torch.float32, causal=False),
    "one block of keys and one": lambda: dense(130, 1153, 4, 2, torch.bfloat16, causal=False),
    "causal, grouped heads": lambda: dense(1100, 1500, 4, 2, torch.float32, causal=True),
    "three blocks of keys": lambda: dense(70, 2400, 3, 1, torch.float64, causal=False),
    "decoding": lambda: dense(1, 2400, 8, 2, torch.float32, causal=True),
    "decoding, several rows": lambda: dense(4, 2400, 8, 1, torch.float16, causal=True),
    "packed sequences": packed,
}


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(got: Result, want: Result) -> None:
    assert torch.equal(got[0], want[0])
    for (name, one), (_, other) in zip(got[1].items(), want[1].items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    torch.set_num_threads(1)
    alone = CALLS[name]()
    for threads in (2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert_same_bits(CALLS[name](), alone)


def test_callers_side_by_side_get_what_each_gets_alone() -> None:
    torch.set_num_threads(2)
    alone = {name: call() for name, call in CALLS.items()}
    with ThreadPoolExecutor(4) as pool:
        together = [(name, pool.submit(CALLS[name])) for _ in range(4) for name in CALLS]
    for name, future in together:
        assert_same_bits(future.result(), alone[name])


IMPORT = """
import os, torch
before = len(os.listdir("/proc/self/task"))
import attncap, attncap._C
print(len(os.listdir("/proc/self/task")) - before)
"""

FORK = """
import multiprocessing, torch
from attncap import StatSpec, attention

def call():
    return attention(query, key, value, StatSpec.all(), causal=True, impl="cpu")

def child(queue):
    torch.set_num_threads(2)
    out, stats = call()
    queue.put((out.tolist(), stats.received_mass.tolist()))

torch.set_num_threads(2)
torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 2, 300, 16)
{before}
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
out, received = queue.get(timeout=60)
process.join(60)
want_out, want = call()
print(process.exitcode == 0 and out == want_out.tolist() and received == want.received_mass.tolist())
"""


def printed_by(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_importing_the_kernels_starts_no_thread() -> None:
    assert printed_by(IMPORT) == "0"


@pytest.mark.parametrize("before", ["torch.ones(1 << 20).sum()", "call()"])
def test_a_forked_child_can_call(before: str) -> None:
    """Even where the parent has threads waiting, which torch's own functions would wait for in vain."""
    assert printed_by(FORK.format(before=before)) == "True"
