"""The launcher of the CUDA kernels: what it serves, how a call comes to them and which backward follows."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import attncap
from attncap import (
    _C,
    HeadStats,
    StatSpec,
    UnsupportedError,
    attention,
    attention_varlen,
    cuda,
    dispatch,
    plan,
    qualification,
)
from attncap.validation import Extras
from tests.budget import assert_matches_float64
from tests.cases import Case
from tests.derivatives import assert_gradients_match_float64
from tests.test_ops import record_calls

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton interpreted


def qkv(dim: int = 64, dtype: torch.dtype = torch.bfloat16, *, rows: int = 3, keys: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(dim)
    key, value = torch.randn(2, 1, 2, keys, dim).to(dtype)
    return torch.randn(1, 4, rows, dim).to(dtype), key, value


def test_available_only_where_it_is_built_and_a_gpu_is_there(monkeypatch):
    assert attncap.available_impls()["cuda"] != "yes" or torch.cuda.is_available()
    monkeypatch.setattr(_C, "cuda_lacks", "nvcc was not found")
    assert attncap.available_impls()["cuda"] == "attncap is built without CUDA kernels: nvcc was not found"
    monkeypatch.setattr(_C, "cuda_lacks", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attncap.available_impls()["cuda"] == "torch sees no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attncap.available_impls()["cuda"] == "yes"


def test_what_is_built_says_of_what():
    assert bool(_C.cuda_lacks) != bool(_C.cuda_hash)
    assert qualification.HASHES["cuda"]() == _C.cuda_hash


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, got torch.float32"),
        ({"dim": 80}, "head dims of 64, 128 and 256, the same for values, got 80 and 80"),
        ({"value_dim": 32}, r"got 64 and 32 \(value\)"),
        ({"attn_mask": torch.ones(5, dtype=torch.bool)}, "calls without attn_mask"),
        ({"query_tags": torch.zeros(1, 1, 3).int(), "key_tags": torch.zeros(1, 1, 5).int()}, "without query_tags"),
        ({"key_features": torch.zeros(1, 5, 2)}, "calls without key_features"),
        ({"spec": StatSpec(offsets=(1, 2, 3, 4, 5))}, "up to 4 offsets, got 5"),
    ],
)
@pytest.mark.usefixtures("cuda_model")
def test_what_it_does_not_serve_it_says(change: dict[str, Any], why: str) -> None:
    query, key, value = qkv(change.pop("dim", 64), change.pop("dtype", torch.bfloat16))
    value = value[..., : change.pop("value_dim", None)]
    with pytest.raises(UnsupportedError, match=f"impl='cuda' cannot serve this call: .*{why}"):
        attention(query, key, value, change.pop("spec", StatSpec()), impl="cuda", **change)


@pytest.mark.usefixtures("cuda_model")
def test_layouts_that_it_does_not_serve() -> None:
    query, key, value = qkv()
    odd = torch.zeros(1, 2, 5, 66, dtype=torch.bfloat16)
    layouts = {
        "0": key[:, :1].expand(1, 2, 5, 64),
        "of 1 in the last dimension": key.transpose(2, 3).contiguous().transpose(2, 3),
        "multiples of 16 bytes": odd[..., :64],
        "begin at a multiple of 16 bytes": torch.zeros(2 * 5 * 64 + 1).bfloat16()[1:].view(1, 2, 5, 64),
    }
    for why, wrong in layouts.items():
        with pytest.raises(UnsupportedError, match=f"key: .*{why}"):
            attention(query, wrong, value, impl="cuda")
    one_head = key[:, :1].as_strided((1, 1, 5, 64), (7, 3, 64, 1))  # strides of dimensions of one do not matter
    attention(query, one_head, value[:, :1], impl="cuda")


def test_devices_that_it_does_not_serve(monkeypatch):
    assert "a GPU of NVIDIA's, got cpu" in str(cuda.lacks(*qkv(), StatSpec(), Extras()))
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    monkeypatch.setattr(cuda, "_lacks_of_processor", cuda._lacks_of_processor.__wrapped__)
    assert cuda._lacks_of_device(gpu) == "it serves compute capability 9.0 (Hopper), got 8.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    monkeypatch.setattr(_C, "cuda_runtime_lacks", lambda: "driver is too old", raising=False)
    assert str(cuda._lacks_of_device(gpu)).endswith("does not start: driver is too old")
    monkeypatch.setattr(_C, "cuda_runtime_lacks", lambda: "", raising=False)
    assert cuda._lacks_of_device(gpu) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in str(cuda._lacks_of_device(gpu))


def test_compiled_calls_ask_for_the_processor_once(monkeypatch):
    asked = []
    monkeypatch.setattr(cuda, "_lacks_of_processor", lambda index: asked.append(index))

    @torch.compile(backend="eager", fullgraph=True)
    def served(tensor: Tensor) -> Tensor:
        return tensor + (1 if cuda._lacks_of_gpu(3) is None else 2)

    assert [served(torch.zeros(())).item() for _ in range(2)] == [1, 1]
    assert asked == [3]


class TestAuto:
    """Which kernels `auto` takes on a GPU, here in the place of the CPU."""

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, cuda_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "_OF_DEVICE", {"cpu": ("triton", "cuda")})
        monkeypatch.setattr(qualification, "gpu_name", lambda _index: "A GPU")
        dispatch._warn_of_unqualified.cache_clear()

    def test_takes_cuda_where_it_is_qualified_and_serves(self, monkeypatch):
        runs = {"triton": {qualification.SPEED: {"64": 300.0}}, "cuda": {qualification.SPEED: {"64": 500.0}}}
        monkeypatch.setattr(qualification, "qualified_run", lambda impl, _gpu: runs[impl])
        query, key, value = (tensor.half() for tensor in qkv())
        many = query.repeat(1, 1, 32, 1)
        attention(many, key, value)
        assert attncap.last_impl() == "cuda"
        attention(many, key, value, attn_mask=torch.ones(5, dtype=torch.bool))
        assert attncap.last_impl() == "triton"
        attention(query, key, value)  # whose few rows Triton splits the keys for
        assert attncap.last_impl() == "triton"

    def test_a_scan_is_planned_for_documents_and_not_for_single_tokens(self, monkeypatch):
        runs = {"triton": {qualification.SPEED: {"64": 300.0}}, "cuda": {qualification.SPEED: {"64": 500.0}}}
        monkeypatch.setattr(qualification, "qualified_run", lambda impl, _gpu: runs[impl])
        model = SimpleNamespace(config=SimpleNamespace(head_dim=64))
        work = SimpleNamespace(loaded=SimpleNamespace(model=model, heads=2), device="cpu", spec=StatSpec())
        assert plan._implementation(work, torch.float16) == "cuda"

    @pytest.mark.filterwarnings("ignore:attncap takes kernels that are not qualified")
    def test_leaves_cuda_alone_where_it_is_not(self):
        attention(*(tensor.half() for tensor in qkv()))
        assert attncap.last_impl() == "triton"


@pytest.mark.usefixtures("cuda_model")
def test_offsets_past_what_positions_hold() -> None:
    with pytest.raises(UnsupportedError, match="query offsets within"):
        attention(*qkv(), impl="cuda", query_offset=2**29)


@pytest.mark.usefixtures("cuda_model")
def test_a_call_without_batch_entries_gives_empty_tensors() -> None:
    out, stats = attention(*torch.zeros(3, 0, 2, 4, 64, dtype=torch.float16), StatSpec.all(), impl="cuda")
    assert out.shape == (0, 2, 4, 64)
    assert stats.received_mass is not None
    assert stats.received_mass.shape == (0, 2, 4)


@pytest.mark.usefixtures("cuda_model")
def test_sinks_of_any_type_and_stride() -> None:
    sinks = torch.tensor([0.5, 9.0, -torch.inf, 9.0, 2.0, 9.0, 1.0], dtype=torch.float64)[::2]
    case = Case(*qkv(), StatSpec.all(), {"sink_logits": sinks, "causal": True})
    out, stats = attention(case.query, case.key, case.value, case.spec, impl="cuda", **case.kwargs)
    assert_matches_float64(out, stats, case, roundings=2)


def spans(*rows_and_keys: tuple[int, int]) -> tuple[tuple[int, int, int, int, int, int], ...]:
    return tuple((0, 0, rows, 0, keys, keys - rows) for rows, keys in rows_and_keys)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (50, 0), (10, 10)])
def test_tables_of_packed_calls_begin_with_the_most_work(window):
    sequences = spans((300, 300), (0, 40), (40, 0), (5, 700))
    tiles, key_tiles, table = cuda._tables(sequences, window, 128, 256, torch.device("cpu"))
    assert sorted(map(tuple, tiles.tolist())) == [(0, 0), (0, 1), (0, 2), (2, 0), (3, 0)]
    assert sorted(map(tuple, key_tiles.tolist())) == [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (3, 2)]
    assert table.tolist() == [list(span[1:]) for span in sequences]

    def seen(span: Any, first_row: int, rows: int, first_key: int, keys: int) -> Tensor:
        _, _, all_rows, _, all_keys, offset = span
        position = torch.arange(first_row, min(first_row + rows, all_rows))[:, None] + offset
        key = torch.arange(first_key, min(first_key + keys, all_keys))[None]
        left, right = window
        return ((left < 0) | (key >= position - left)) & ((right < 0) | (key <= position + right))

    of_rows = [int(seen(sequences[s], 128 * t, 128, 0, 10**6).any(0).sum()) for s, t in tiles.tolist()]
    of_keys = [int(seen(sequences[s], 0, 10**6, 256 * t, 256).any(1).sum()) for s, t in key_tiles.tolist()]
    assert of_rows == sorted(of_rows, reverse=True)
    assert of_keys == sorted(of_keys, reverse=True)


@pytest.mark.usefixtures("cuda_model")
def test_compiled_calls_keep_out_and_statistics() -> None:
    """Also where the compiled program puts a tensor at an address that the hardware does not load from."""

    def step(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, HeadStats]:
        out, stats = attention(query, key, value, StatSpec.all(topk=2), causal=True, impl="cuda")
        return out * 1, stats

    query, key, value = qkv()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain_out, plain = step(query, key, value)
    shifted = torch.zeros(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape).copy_(key)
    for given in (key, shifted):
        out, stats = compiled(query, given, value)
        torch.testing.assert_close(out, plain_out)
        for (name, got), (_, want) in zip(stats.items(), plain.items(), strict=True):
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("cuda_model")
def test_opcheck_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = qkv()
    packed_qkv = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    with monkeypatch.context() as patch:
        dense, packed = record_calls(patch, "attention"), record_calls(patch, "attention_varlen")
        attention(query, key, value, impl="cuda")
        attention_varlen(*packed_qkv, [0, 2, 3], [0, 3, 5], impl="cuda")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.attncap.attention.default, dense[0], test_utils=tests)
    torch.library.opcheck(torch.ops.attncap.attention_varlen.default, packed[0], test_utils=tests)


@pytest.mark.parametrize("triton", ["there", "absent"])
@pytest.mark.usefixtures("cuda_model")
def test_backward_by_triton_or_by_torch(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(*qkv(dtype=torch.float16), StatSpec(topk=0, received=True), {"causal": True})
    if triton == "absent":
        monkeypatch.setattr(dispatch, "_triton_availability", lambda: "it is not installed")
    else:
        pytest.importorskip("triton")
    assert_gradients_match_float64(case, "cuda", roundings=8)
