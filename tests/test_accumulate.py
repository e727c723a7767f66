"""The accumulator against numpy, and its promise of equal bits."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from attncap import StatSpec, attention, histogram
from attncap.accumulate import Accumulator, Heads, counted_rows, row_values

HEADS = 3
SIGNED = "max_logit"
UNSIGNED = "entropy"


def rows(batch: int, length: int, seed: int, *, heads: int = HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(heads, 1, generator=generator))
    signed = scale * torch.randn(batch, heads, length, generator=generator) + 1000.0
    unsigned = scale * torch.rand(batch, heads, length, generator=generator)
    zeros = torch.rand(unsigned.shape, generator=generator) < 0.2
    unsigned = torch.where(zeros, torch.where(signed > 1000, 0.0, -0.0), unsigned)
    return {SIGNED: signed, UNSIGNED: unsigned}


def right_padded(batch: int, length: int, seed: int) -> Tensor:
    lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(length) < lengths[:, None])[:, None]


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 100])
def test_the_summary_is_that_of_numpy_over_all_counted_rows(length: int) -> None:
    values, counted = rows(5, length, seed=length), right_padded(5, length, seed=length)
    accumulator = Accumulator(histogram=True)
    accumulator.add("layer", values, counted)
    for name, value in values.items():
        for head in range(HEADS):
            kept = value[:, head][counted[:, 0]].double().numpy()
            assert accumulator.table(name, "count")[0, head] == kept.size
            wanted = {"mean": kept.mean(), "std": kept.std(), "min": kept.min(), "max": kept.max()}
            for field, expected in wanted.items():
                found = accumulator.table(name, field)[0, head].item()
                assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), (name, field)


def feed(values: dict[str, Tensor], counted: Tensor, batch_size: int, groups: list[str] | None) -> bytes:
    accumulator = Accumulator(histogram=True)
    for start in range(0, counted.shape[0], batch_size):
        part = slice(start, start + batch_size)
        some = {name: value[part] for name, value in values.items()}
        accumulator.add("layer", some, counted[part], None if groups is None else groups[part])
    return accumulator.to_bytes()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 9),
    length=st.integers(1, 70),
    batch_size=st.integers(1, 9),
    padding=st.integers(0, 70),
    grouped=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_batch_size_and_right_padding_change_no_bit(
    batch: int, length: int, batch_size: int, padding: int, grouped: bool, seed: int
) -> None:
    values, counted = rows(batch, length, seed), right_padded(batch, length, seed)
    groups = [f"group {place % 2}" for place in range(batch)] if grouped else None
    whole = feed(values, counted, batch, groups)
    padded = {name: torch.nn.functional.pad(value, (0, padding), value=torch.nan) for name, value in values.items()}
    assert feed(padded, torch.nn.functional.pad(counted, (0, padding)), batch_size, groups) == whole


def test_the_number_of_threads_changes_no_bit() -> None:
    values, counted = rows(16, 512, seed=5), right_padded(16, 512, seed=5)
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(feed(values, counted, 16, None))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch's operators sum up what the compiled sums would serve."""
    monkeypatch.setattr("attncap.row_sums_cpu.serves", lambda _: False)


def test_chunking_by_memory_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    in_torch(monkeypatch)
    values, counted = rows(4, 50, seed=6), right_padded(4, 50, seed=6)
    whole = feed(values, counted, 4, None)
    monkeypatch.setattr("attncap.row_sums._CHUNK", 1)
    assert feed(values, counted, 4, None) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 64, 100])
def test_the_compiled_sums_have_the_bits_of_torch(
    length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: value.to(dtype) for name, value in rows(5, length, seed=length).items()}
    generator = torch.Generator().manual_seed(length)
    for value in values.values():
        value *= torch.exp2(torch.randint(-24, 24, value.shape, generator=generator))  # off the grid of bins, too
        value *= torch.where(torch.rand(value.shape, generator=generator) < 0.3, -1.0, 1.0)
        for odd in (torch.nan, torch.inf, -torch.inf):
            value[torch.rand(value.shape, generator=generator) < 0.05] = odd
    strided = {name: torch.stack([value, -value], dim=-1)[..., 0] for name, value in values.items()}
    counted = torch.rand(5, HEADS, length, generator=generator) < 0.8
    groups = ["b", "a", "b", "c", "a"]

    def everything(given: dict[str, Tensor]) -> list[bytes]:
        some = Heads(numbers=(4, 0, 2), total=6)
        found = []
        for histogram_kept in (True, False):
            for names, heads in ((groups, None), (None, some)):
                accumulator = Accumulator(histogram=histogram_kept)
                accumulator.add("layer", given, counted, names, heads=heads)
                accumulator.add("layer", given, dict.fromkeys(given, counted[:, :1]), names, heads=heads)
                found.append(accumulator.to_bytes())
        return found

    compiled = everything(values)
    assert everything(strided) == compiled
    in_torch(monkeypatch)
    assert everything(values) == compiled


def test_left_padding_gives_the_same_summary_up_to_rounding() -> None:
    values, counted = rows(4, 33, seed=7), right_padded(4, 33, seed=7)
    plain, flipped = Accumulator(histogram=True), Accumulator(histogram=True)
    plain.add("layer", values, counted)
    flipped.add("layer", {name: value.flip(-1) for name, value in values.items()}, counted.flip(-1))
    for one, other in zip(plain.rows(), flipped.rows(), strict=True):
        assert astuple(one)[:6] == astuple(other)[:6]
        assert astuple(other)[6:] == pytest.approx(astuple(one)[6:], rel=1e-12)


def test_large_offsets_lose_no_variance() -> None:
    values = torch.randn(3, 1, 1000, generator=torch.Generator().manual_seed(8)).double() * 1e-3 + 1e6
    accumulator = Accumulator()
    accumulator.add("layer", {"lse": values}, torch.ones(3, 1, 1000, dtype=torch.bool))
    assert accumulator.table("lse", "std").item() == pytest.approx(values.numpy().std(), rel=1e-6)


def test_a_non_finite_value_is_left_out_of_its_statistic_alone_and_reported() -> None:
    values, counted = rows(2, 8, seed=9), torch.ones(2, 1, 8, dtype=torch.bool)
    values[SIGNED][1, 2, 3], values[SIGNED][0, 2, 1], values[SIGNED][0, 1, 1] = torch.nan, torch.inf, -torch.inf
    accumulator = Accumulator(histogram=True)
    accumulator.add("layer", values, counted)
    assert accumulator.table(SIGNED, "nonfinite").tolist() == [[0, 1, 2]]
    assert accumulator.table(SIGNED, "count").tolist() == [[16, 15, 14]]
    assert accumulator.table(UNSIGNED, "count").tolist() == [[16, 16, 16]]
    assert accumulator.table(SIGNED, "mean").isfinite().all()
    assert accumulator.table(SIGNED, "p95").isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300),
    spread=st.floats(0.01, 8.0),
    zeros=st.floats(0.0, 1.0),
    signed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantiles_keep_the_error_bound_of_the_docstring(
    size: int, spread: float, zeros: float, signed: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    sample = np.exp(spread * generator.standard_normal(size)).astype(np.float32).clip(0, 65535)
    sample = np.where(generator.random(size) < zeros, 0.0, sample)
    if signed:
        sample = sample * generator.choice([-1.0, 1.0], size)
    accumulator = Accumulator(histogram=True)
    name = SIGNED if signed else UNSIGNED
    accumulator.add("layer", {name: torch.tensor(sample)[None, None]}, torch.ones(1, 1, size, dtype=torch.bool))
    ordered = np.sort(sample)
    for field, probability in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        rank = probability * (size - 1)
        beside = max(abs(ordered[int(np.floor(rank))]), abs(ordered[int(np.ceil(rank))]))
        bound = beside * histogram.RELATIVE_ERROR + histogram.SMALLEST
        found = accumulator.table(name, field).item()
        assert abs(found - np.quantile(sample, probability)) <= bound * (1 + 1e-6)


def test_every_value_lies_within_the_edges_of_its_bin() -> None:
    generator = torch.Generator().manual_seed(10)
    magnitudes = torch.exp(11 * (2 * torch.rand(20000, generator=generator) - 1)).clamp(histogram.SMALLEST, 65535)
    values = magnitudes * torch.where(torch.rand(20000, generator=generator) < 0.5, -1.0, 1.0)
    low, high = histogram.bin_edges(signed=True)
    index = histogram.bin_index(values, signed=True).numpy()
    assert (low[index] <= values.numpy()).all()
    assert (values.numpy() <= high[index]).all()
    assert (np.diff(low) >= 0).all()
    assert len(low) == histogram.bin_count(signed=True)


def test_values_off_the_grid_go_to_the_nearest_bin() -> None:
    values = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e9, -1e9])
    last = histogram.SIDE_BINS
    assert histogram.bin_index(values, signed=False).tolist() == [0, 0, 0, 0, last, 0]
    assert histogram.bin_index(values, signed=True).tolist() == [last, last, last, last, 2 * last, 0]


def test_merging_is_adding_up_to_rounding_and_keeps_the_order_of_modules() -> None:
    counted = torch.ones(3, 1, 20, dtype=torch.bool)
    first, second, both = Accumulator(True), Accumulator(True), Accumulator(True)
    for accumulator, seed in ((first, 1), (second, 2)):
        accumulator.add(f"only {seed}", rows(3, 20, seed), counted)
        accumulator.add("shared", rows(3, 20, seed), counted, ["a", "b", "a"])
    for seed in (1, 2):
        both.add("shared", rows(3, 20, seed), counted, ["a", "b", "a"])
    kept = second.to_bytes()
    first.merge(second)
    assert first.modules == ("only 1", "shared", "only 2")
    assert second.to_bytes() == kept
    found = [astuple(row)[3:] for row in first.rows() if row.module == "shared"]
    expected = [astuple(row)[3:] for row in both.rows()]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    np.testing.assert_allclose(
        np.array([row[3:] for row in found]), np.array([row[3:] for row in expected]), rtol=1e-12
    )


def test_merging_into_an_empty_accumulator_is_a_copy() -> None:
    full, empty = Accumulator(True), Accumulator(True)
    full.add("layer", rows(3, 20, 3), right_padded(3, 20, 3), ["b", "a", "b"])
    empty.merge(full)
    assert empty.to_bytes() == full.to_bytes()


def test_bytes_round_trip_and_damage_is_noticed() -> None:
    accumulator = Accumulator(histogram=True)
    accumulator.add("encoder.läyer.0", rows(3, 20, 4), right_padded(3, 20, 4), ["b", "a", "b"])
    accumulator.add("encoder.layer.1", rows(3, 20, 5, heads=5), right_padded(3, 20, 5))
    data = accumulator.to_bytes()
    again = Accumulator.from_bytes(data)
    assert again.to_bytes() == data
    np.testing.assert_equal([astuple(row) for row in again.rows()], [astuple(row) for row in accumulator.rows()])
    again.add("encoder.layer.1", rows(3, 20, 5, heads=5), right_padded(3, 20, 5))  # it goes on from there
    for place in (0, 40, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="data"):
            Accumulator.from_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="data"):
        Accumulator.from_bytes(data[:-1])


def test_layers_with_fewer_heads_are_padded_with_nan() -> None:
    accumulator = Accumulator()
    counted = torch.ones(2, 1, 4, dtype=torch.bool)
    accumulator.add("wide", rows(2, 4, 1, heads=4), counted)
    accumulator.add("narrow", rows(2, 4, 1, heads=2), counted)
    assert accumulator.table("entropy").isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert accumulator.table("entropy", "count").tolist() == [[8] * 4, [8, 8, 0, 0]]


def test_a_statistic_that_counted_nothing_is_nan() -> None:
    accumulator = Accumulator(histogram=True)
    accumulator.add("layer", rows(1, 4, 1), torch.zeros(1, 1, 4, dtype=torch.bool))
    for row in accumulator.rows():
        assert row.count == 0
        assert np.isnan(astuple(row)[6:]).all()


def test_mistakes_are_named() -> None:
    accumulator = Accumulator()
    counted = torch.ones(2, 1, 4, dtype=torch.bool)
    accumulator.add("layer", rows(2, 4, 1), counted)
    with pytest.raises(ValueError, match="groups: expected 2"):
        accumulator.add("layer", rows(2, 4, 1), counted, ["one"])
    with pytest.raises(ValueError, match="3 heads before, got 5"):
        accumulator.add("layer", rows(2, 4, 1, heads=5), counted)
    with pytest.raises(ValueError, match="entropy"):
        accumulator.table("entropie")
    with pytest.raises(ValueError, match="histogram=True"):
        accumulator.table("entropy", "p50")
    with pytest.raises(ValueError, match="histogram"):
        accumulator.merge(Accumulator(histogram=True))


def test_running_sums_outlive_inference_mode() -> None:
    accumulator = Accumulator(histogram=True)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            accumulator.add("layer", rows(2, 4, 1), torch.ones(2, 1, 4, dtype=torch.bool), ["a", "b"])
    assert accumulator.table("entropy", "count", "a").tolist() == [[12, 12, 12]]


def test_adding_reads_no_value_so_that_it_never_waits_for_a_device() -> None:
    accumulator = Accumulator(histogram=True)
    values, counted = rows(4, 8, seed=12), right_padded(4, 8, seed=12)
    # A fake tensor has no values: whatever would read one on the host raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in values.items()}
        accumulator.add("layer", fake, mode.from_tensor(counted))
        accumulator.add("layer", fake, mode.from_tensor(counted), ["a", "b", "a", "c"])
        with pytest.raises(DataDependentOutputException):
            fake[SIGNED].sum().item()
    assert accumulator.groups == ("a", "all", "b", "c")


def test_a_batch_without_sequences_or_rows_counts_nothing() -> None:
    accumulator = Accumulator(histogram=True)
    accumulator.add("layer", rows(0, 4, 1), torch.zeros(0, 1, 4, dtype=torch.bool))
    assert accumulator.modules == ()
    accumulator.add("layer", rows(2, 0, 1), torch.zeros(2, 1, 0, dtype=torch.bool))
    assert accumulator.table("entropy", "count").tolist() == [[0] * HEADS]
    assert accumulator.table("entropy", "min").isnan().all()


def test_row_values_have_the_names_of_the_table_and_sum_what_they_say() -> None:
    generator = torch.Generator().manual_seed(11)
    query, key, value = (torch.randn(2, HEADS, 6, 4, generator=generator) for _ in range(3))
    spec = StatSpec.all(topk=3, offsets=(-1, 2))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    _, stats = attention(
        query, key, value, spec, causal=True, query_mask=mask, attn_mask=mask[:, None, None],
        query_tags=torch.zeros(1, 2, 6, dtype=torch.int64), key_tags=torch.arange(6)[None, None].expand(1, 2, 6) // 2,
        key_features=torch.randn(2, 6, 2, generator=generator),
    )  # fmt: skip
    seen = torch.arange(1, 7)[None, None].expand(2, 1, 6)
    values = row_values(stats, spec, tag_names=["mine"], feature_names=["norm[0]", "norm[1]"], seen_keys=seen)
    assert set(values) == {
        "lse", "max_logit", "entropy", "collision", "sink_mass", "diagonal_mass", "distance", "received_mass",
        "offset_mass[-1]", "offset_mass[2]", "topk_mass", "max_prob", "relative_entropy", "mine", "norm[0]", "norm[1]",
    }  # fmt: skip
    assert stats.topk_prob is not None
    assert stats.entropy is not None
    assert stats.tag_mass is not None
    torch.testing.assert_close(values["topk_mass"], stats.topk_prob.sum(-1))
    torch.testing.assert_close(values["mine"], stats.tag_mass[..., 0])
    torch.testing.assert_close(values["max_prob"], stats.topk_prob[..., 0])
    torch.testing.assert_close(values["relative_entropy"][..., 1:], stats.entropy[..., 1:] / torch.arange(2, 7).log())

    counted = counted_rows(values, stats, seen_keys=seen, key_mask=mask)
    accumulator = Accumulator()
    accumulator.add("layer", values, counted)
    assert accumulator.table("entropy", "count").tolist() == [[10] * HEADS]
    assert accumulator.table("relative_entropy", "count").tolist() == [[8] * HEADS]  # row 0 sees one key
    assert accumulator.table("received_mass", "count").tolist() == [[10] * HEADS]
    assert accumulator.table("received_mass").sum().item() == pytest.approx(HEADS, rel=1e-5)
