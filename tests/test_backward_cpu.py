"""The C++ backward: the formula of gradients.py on every set of instructions, equal bits on any number of threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attncap import _C, StatSpec, attention, attention_varlen, cpu, gradients
from tests.budget import assert_matches_float64
from tests.cases import Case, Sizes, random_case
from tests.derivatives import assert_gradients_match_float64, gradients_of, outputs_of

EACH_ISA = pytest.mark.parametrize("isa", _C.instruction_sets())
# Keys are taken in slabs of about 512 KiB of sums, rows in blocks of 64 and, of few heads, in groups of 4 blocks.
LONG = Sizes(batches=(1, 2), groups=(1, 2), heads_of_group=(1, 2), rows=(1, 3, 63, 65, 300), longest=320)

TILED = Sizes(dims=(32, 64, 96), value_dims=(32, 48, 64), rows=(15, 16, 64, 100, 150), longest=200)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def by_formula(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The gradients that gradients.py gives after the forward of the kernels."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "backward", gradients.attention)
        return gradients_of(case, "cpu")


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, want in wanted.items():
        size = float(want.abs().max()) if want.numel() else 0.0
        allowed = tolerance * max(1.0, size)
        torch.testing.assert_close(
            found[name], want, atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@EACH_ISA
@pytest.mark.parametrize("seed", range(100, 112))
def test_random_calls_follow_the_formula(isa: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    case = random_case(seed, dtype=torch.float64, sizes=LONG)
    assert_close(gradients_of(case, "cpu"), by_formula(case, monkeypatch), 1e-12)


@EACH_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_on_every_set_of_instructions(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    for seed in range(200, 206):
        assert_gradients_match_float64(random_case(seed).as_dtype(dtype), "cpu")


@EACH_ISA
@pytest.mark.parametrize("seed", range(301, 317))
def test_bfloat16_calls_that_are_multiplied_by_whole_tiles(
    isa: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head dims of 32 and its multiples, on rows and keys that fill tiles of 16 and do not."""
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    case = random_case(seed, sizes=TILED).as_dtype(torch.bfloat16)
    out, stats = attention(case.query, case.key, case.value, case.spec, impl="cpu", **case.kwargs)
    assert_matches_float64(out, stats, case)
    assert_gradients_match_float64(case, "cpu")
    # Of the output alone: probabilities and derivatives by scores are rounded for the products that follow.
    assert_gradients_match_float64(case, "cpu", names=["out"], roundings=1)


def long_case(dtype: torch.dtype, **kwargs: Any) -> Case:
    """Several slabs of keys and several groups of rows."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 700, 64).to(dtype), torch.randn(1, 1, 1500, 64).to(dtype)
    value = torch.randn(1, 1, 1500, 48).to(dtype)
    return Case(query, key, value, StatSpec.all(offsets=(-1, 2)), kwargs)


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal, grouped heads": {"causal": True},
    "window": {"window": (100, 20), "softcap": 5.0},
    "features": {"key_features": torch.linspace(-1, 1, 3000).view(1, 1500, 2), "sink_logits": torch.ones(2)},
    "mask of every row": {"attn_mask": torch.linspace(-2, 2, 700 * 1500).sin().view(700, 1500)},
    "mask of the keys": {"attn_mask": torch.linspace(-2, 2, 1500)},
    "mask of the rows": {"attn_mask": torch.linspace(-2, 2, 1400).view(2, 700, 1), "causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_slabs_of_keys_and_groups_of_rows_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = long_case(torch.float64, **OPTIONS[name])
    found = gradients_of(case, "cpu")
    # The differences between the sums' orders are those of thousands of terms.
    assert_close(found, by_formula(case, monkeypatch), 2e-11)
    assert "attn_mask" not in case.kwargs or found["attn_mask"].shape == case.kwargs["attn_mask"].shape


def packed() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bounds_q, bounds_k = [0, 1, 4, 600, 600, 1300], [0, 1153, 1200, 1800, 1801, 2500]
    shapes = {"query": (bounds_q[-1], 4, 16), "key": (bounds_k[-1], 2, 16), "value": (bounds_k[-1], 2, 8)}
    leaves = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    out, stats = attention_varlen(
        **leaves, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, spec=StatSpec.all(), causal=True, impl="cpu"
    )
    loss = sum(tensor.square().sum() for tensor in outputs_of(out, stats).values())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


CALLS: dict[str, Callable[[], dict[str, Tensor]]] = {
    name: lambda options=options: gradients_of(long_case(torch.float32, **options), "cpu")
    for name, options in OPTIONS.items()
}
CALLS |= {
    "bfloat16": lambda: gradients_of(long_case(torch.bfloat16, causal=True), "cpu"),
    "few rows of heads that share keys": lambda: gradients_of(random_case(7, sizes=Sizes(rows=(3,))), "cpu"),
    "packed sequences": packed,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    torch.set_num_threads(1)
    alone = CALLS[name]()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for one, gradient in CALLS[name]().items():
            assert torch.equal(gradient, alone[one]), one


@EACH_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_do_not_crash(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in ("query", "key", "value"):
            case = random_case(30, sizes=Sizes(rows=(70,))).as_dtype(dtype)
            getattr(case, place)[..., ::3, :] = bad
            found = gradients_of(case, "cpu")
            assert found["query"].shape == case.query.shape


def test_what_only_some_gradients_need_is_what_all_give() -> None:
    case = long_case(torch.float32, causal=True, attn_mask=torch.linspace(-2, 2, 1500))
    tensors = {"query": case.query, "key": case.key, "value": case.value, "attn_mask": case.kwargs["attn_mask"]}

    def found(*wanted: str) -> dict[str, Tensor]:
        given = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        out, stats = attention(**given, spec=case.spec, causal=True, impl="cpu")
        loss = out.square().sum() + stats.entropy.square().sum() + stats.max_logit.sum()
        return dict(zip(wanted, torch.autograd.grad(loss, [given[name] for name in wanted]), strict=True))

    together = found(*tensors)
    for name, gradient in together.items():
        torch.testing.assert_close(found(name)[name], gradient, atol=1e-4, rtol=1e-5)


FORK = """
import multiprocessing, torch
from attncap import StatSpec, attention

torch.set_num_threads(1)
torch.manual_seed(0)
query = torch.randn(1, 2, 300, 16, requires_grad=True)

def call():
    out, stats = attention(query, query, query, StatSpec.all(), causal=True, impl="cpu")
    return torch.autograd.grad(out.sum() + stats.entropy.sum(), query)[0].tolist()

def child(queue):
    torch.set_num_threads(2)
    queue.put(call())

want = call()
torch.set_num_threads(2)
call()
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
found = queue.get(timeout=60)
process.join(60)
print(process.exitcode == 0 and found == want)
"""


def test_a_forked_child_can_call() -> None:
    """Even where the parent has threads waiting."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
