"""Every implementation against the float64 reference, and the reference against plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import attncap
from attncap import _C, StatSpec, attention, attention_varlen
from tests.budget import assert_matches_float64, difference, worst
from tests.cases import Case, Sizes, random_case

IMPLS = ["cpu"] if attncap.available_impls()["cpu"] == "yes" else []
# Interpreted, hence slow: test_triton.py has its random calls. numpy warns of what a GPU computes without a word.
TRITON = pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))
ALL = ["reference", *IMPLS, TRITON]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def loops(case: Case) -> dict[str, Any]:
    """The formulas of the design, row by row in Python floats; keyed (batch, head, row)."""
    query, key, value = (tensor.double() for tensor in (case.query, case.key, case.value))
    options, spec = case.kwargs, case.spec
    batch, heads, rows, dim = query.shape
    keys = key.shape[2]
    offset = keys - rows if options["query_offset"] is None else options["query_offset"]
    scale = 1 / math.sqrt(dim) if options["scale"] is None else options["scale"]
    left, right = options["window"] or (-1, -1)
    mask = options["attn_mask"]
    mask = None if mask is None else mask.expand(batch, heads, rows, keys)
    result: dict[str, Any] = {"received": {}}
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // key.shape[1])
            for i in range(rows):
                position = i + offset
                scores: dict[int, float] = {}
                for j in range(keys):
                    bias = 0.0
                    if mask is not None:
                        entry = mask[b, h, i, j].item()
                        bias = (0.0 if entry else -math.inf) if isinstance(entry, bool) else entry
                    hidden = bias == -math.inf
                    hidden |= options["causal"] and j > position
                    hidden |= left >= 0 and j < position - left
                    hidden |= right >= 0 and j > position + right
                    if hidden:
                        continue
                    score = scale * float(query[b, h, i] @ key[b, group, j])
                    if options["softcap"]:
                        score = options["softcap"] * math.tanh(score / options["softcap"])
                    scores[j] = score + bias
                result[b, h, i] = row_statistics(scores, position, value[b, group], spec, case, (b, h, i))
                counted = options.get("query_mask") is None or bool(options["query_mask"][b, i])
                for j, p in result[b, h, i]["prob"].items():
                    total = result["received"].get((b, h, j), 0.0)
                    result["received"][b, h, j] = total + (p if counted else 0.0)
    return result


def row_statistics(
    scores: dict[int, float],
    position: int,
    value: torch.Tensor,
    spec: StatSpec,
    case: Case,
    where: tuple[int, int, int],
) -> dict[str, Any]:
    b, h, i = where
    sinks = case.kwargs.get("sink_logits")
    sink = -math.inf if sinks is None else float(sinks[h])
    if not scores:
        return {"prob": {}, "lse": -math.inf, "max_logit": -math.inf, "entropy": 0.0, "null_mass": 0.0, "out": None}
    peak = max(scores.values())
    lse = math.log(math.fsum(math.exp(s - peak) for s in [*scores.values(), sink])) + peak
    prob = {j: math.exp(s - lse) for j, s in scores.items()}
    null = math.exp(sink - lse)
    stats: dict[str, Any] = {"prob": prob, "lse": lse, "max_logit": max(scores.values()), "null_mass": null}
    stats["entropy"] = -math.fsum(p * math.log(p) for p in [*prob.values(), null] if p > 0)
    stats["out"] = sum(p * value[j] for j, p in prob.items())
    stats["collision"] = math.fsum(p * p for p in prob.values())
    stats["distance"] = math.fsum(p * abs(position - j) for j, p in prob.items())
    stats["sink_mass"] = math.fsum(p for j, p in prob.items() if j < spec.sink)
    if spec.diagonal is not None:
        stats["diagonal_mass"] = math.fsum(p for j, p in prob.items() if abs(j - position) <= spec.diagonal)
    stats["offset_mass"] = [prob.get(position + o, 0.0) for o in spec.offsets]
    best = sorted(scores, key=lambda j: (-scores[j], j))[: spec.topk]
    stats["topk_index"] = best + [-1] * (spec.topk - len(best))
    if (tags := case.kwargs.get("query_tags")) is not None:
        key_tags = case.kwargs["key_tags"]
        stats["tag_mass"] = [
            math.fsum(p for j, p in prob.items() if key_tags[t, b, j] >= 0 and key_tags[t, b, j] == tags[t, b, i])
            for t in range(tags.shape[0])
        ]
    if (features := case.kwargs.get("key_features")) is not None:
        stats["feature_mass"] = sum(p * features[b, j].double() for j, p in prob.items())
    return stats


@pytest.mark.parametrize("seed", range(40))
def test_the_reference_is_the_formula(seed: int) -> None:
    case = random_case(seed, dtype=torch.float64, sizes=Sizes(longest=12))
    out, stats = attention(case.query, case.key, case.value, case.spec, impl="reference", **case.kwargs)
    plain = loops(case)
    query_mask = case.kwargs.get("query_mask")
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for i in range(out.shape[2]):
                want = plain[b, h, i]
                expected_out = torch.zeros_like(out[b, h, i]) if want["out"] is None else want["out"]
                torch.testing.assert_close(out[b, h, i], expected_out, rtol=1e-10, atol=1e-12)
                counted = query_mask is None or bool(query_mask[b, i])
                for name, got in stats.items():
                    if name in ("topk_prob", "received_mass"):
                        continue
                    value = want.get(name, 0.0)
                    if not counted:
                        value = {"lse": -math.inf, "max_logit": -math.inf, "topk_index": -1}.get(name, 0.0)
                    if not counted or not want["prob"]:
                        value = -1 if name == "topk_index" else value
                    got_row = got[b, h, i].double()
                    expected = torch.as_tensor(value, dtype=torch.float64).expand_as(got_row)
                    torch.testing.assert_close(
                        got_row, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                    )
    if stats.received_mass is not None:
        for (b, h, j), total in plain["received"].items():
            assert stats.received_mass[b, h, j].item() == pytest.approx(total, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(160))
def test_random_calls_match_the_reference(impl: str, seed: int) -> None:
    case = random_case(seed, dtype=DTYPES[seed % 4])
    out, stats = attention(case.query, case.key, case.value, case.spec, impl=impl, **case.kwargs)
    assert_matches_float64(out, stats, case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(700, 1301, True), (1, 3000, False), (900, 900, False)])
def test_long_sequences_match_the_reference(impl: str, dtype: torch.dtype, rows: int, keys: int, causal: bool) -> None:
    torch.manual_seed(rows)
    query = (2 * torch.randn(1, 2, rows, 40)).to(dtype)
    key, value = torch.randn(2, 1, 1, keys, 40).to(dtype)
    case = Case(query, key, value, StatSpec.all(), {"causal": causal})
    out, stats = attention(query, key, value, case.spec, impl=impl, causal=causal)
    assert_matches_float64(out, stats, case)


@pytest.mark.parametrize("impl", [*IMPLS, TRITON])
@pytest.mark.parametrize("heads_first", [True, False])
def test_the_output_lies_in_memory_as_the_query_does(impl: str, heads_first: bool) -> None:
    shape = (2, 3, 7, 8) if heads_first else (2, 7, 3, 8)
    query = torch.randn(shape) if heads_first else torch.randn(shape).transpose(1, 2)
    out, _ = attention(query, query, query[..., :5], StatSpec.none(), impl=impl)
    assert (out if heads_first else out.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("impl", ALL)
def test_ties_go_to_the_lower_key(impl: str) -> None:
    torch.manual_seed(1)
    # Small integers give exact scores, hence true ties everywhere.
    heads = 1 if impl == "triton" else 6  # is interpreted
    query = torch.randint(-1, 2, (1, heads, 90, 4)).float()
    key = torch.randint(-1, 2, (1, heads, 200, 4)).float()
    value = torch.randn(1, heads, 200, 5)
    _, stats = attention(query, key, value, StatSpec(topk=20), impl=impl, scale=1.0)
    scores = query @ key.transpose(-1, -2)
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :20]
    assert stats.topk_index is not None
    assert torch.equal(stats.topk_index.long(), expected)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_topk_of_ordered_scores(impl: str, order: str) -> None:
    ramp = torch.arange(1000.0)
    scores = {"rising": ramp, "falling": -ramp, "equal": torch.zeros(1000)}[order]
    query, key = torch.ones(1, 1, 3, 1), scores.view(1, 1, -1, 1)
    _, stats = attention(query, key, key, StatSpec(topk=64), impl=impl, scale=1.0)
    expected = torch.arange(999, 935, -1) if order == "rising" else torch.arange(64)
    assert stats.topk_index is not None
    assert torch.equal(stats.topk_index[0, 0, 1].long(), expected)


@pytest.mark.parametrize("impl", ALL)
def test_keys_whose_probability_underflows_are_ordered_by_score(impl: str) -> None:
    key = torch.tensor([0.0, -500.0, -300.0, -400.0]).view(1, 1, 4, 1)
    _, stats = attention(torch.ones(1, 1, 1, 1), key, key, StatSpec(topk=4), impl=impl, scale=1.0)
    assert stats.topk_index is not None
    assert stats.topk_index.flatten().tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("impl", ALL)
def test_a_row_that_sees_no_key(impl: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    value[:] = torch.nan if impl != "reference" else 1.0  # not even 0 * NaN may come through
    mask = torch.zeros(4, 4, dtype=torch.bool)
    out, stats = attention(
        query, key, value, StatSpec.all(topk=3), attn_mask=mask, sink_logits=torch.randn(2), impl=impl
    )
    assert (out == 0).all()
    for name, tensor in stats.items():
        expected = {"lse": -math.inf, "max_logit": -math.inf, "topk_index": -1}.get(name, 0)
        assert (tensor == expected).all(), name


@pytest.mark.parametrize("impl", ALL)
def test_entropy_keeps_its_digits_at_large_scores(impl: str) -> None:
    torch.manual_seed(0)
    key = torch.randn(1, 1, 500, 1)
    query = torch.full((1, 1, 1, 1), 1.0)
    case = Case(query, key + 2000.0, key, StatSpec(), {"scale": 1.0})
    _, stats = attention(case.query, case.key, case.value, scale=1.0, impl=impl)
    _, exact = attention(*(t.double() for t in (case.query, case.key, case.value)), scale=1.0, impl="reference")
    assert stats.entropy is not None
    assert exact.entropy is not None
    assert worst(difference(stats.entropy, exact.entropy)) < 1e-5


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("score", [0.3, 1.0, 2.7])
@pytest.mark.parametrize("rows", [1, 12])
def test_many_equal_probabilities_keep_their_digits(impl: str, rows: int, score: float) -> None:
    """A sum of thousands of equal numbers, taken one by one, would round them all the same way."""
    key = torch.zeros(1, 1, 6000, 1)
    key[0, 0, 0] = score
    tags = {f"{kind}_tags": torch.ones(1, 1, n, dtype=torch.long) for kind, n in (("query", rows), ("key", 6000))}
    query, value = torch.ones(1, 1, rows, 1), torch.randn(1, 1, 6000, 2)
    spec = dataclasses.replace(StatSpec.all(), sink=3000)
    _, stats = attention(query, key, value, spec, scale=1.0, impl=impl, **tags)
    exact_inputs = (tensor.double() for tensor in (query, key, value))
    _, exact = attention(*exact_inputs, spec, scale=1.0, impl="reference", **tags)
    for (name, got), (_, want) in zip(stats.items(), exact.items(), strict=True):
        if name != "topk_index":
            torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("matching", [0, 1, 20, 256, 257, 2000])
def test_tags_find_few_keys_and_many(isa: str, matching: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one tag and their keys, at places of their own, among rows and keys of distinct tags and of none."""
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    rows, keys = 140, 9000
    query_tags, key_tags = torch.arange(rows).repeat(2, 1), -1 - torch.arange(keys).repeat(2, 1)
    for tags, key_tags_of in zip(query_tags, key_tags, strict=True):
        tags[torch.randperm(rows)[:30]] = 1_000_000
        places = torch.randperm(keys)
        key_tags_of[places[:matching]] = 1_000_000
        key_tags_of[places[matching : matching + 100]] = torch.arange(100)
    query, key, value = torch.randn(1, 2, rows, 8), torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 3)
    given = {"query_tags": query_tags[:, None], "key_tags": key_tags[:, None], "causal": causal}
    _, stats = attention(query, key, value, StatSpec.none(), impl="cpu", **given)
    _, exact = attention(query.double(), key.double(), value.double(), StatSpec.none(), impl="reference", **given)
    assert stats.tag_mass is not None
    torch.testing.assert_close(stats.tag_mass.double(), exact.tag_mass, rtol=5e-6, atol=1e-9)


def masks_of_padding(rows: int, keys: int) -> dict[str, torch.Tensor]:
    """What masks leave to rows, as ranges of keys that all rows of a block see, some, or none."""
    every = torch.ones(rows, keys, dtype=torch.bool)
    at = torch.arange(keys)
    biased = torch.where((at > 640) & (at < 700), 0.0, torch.randn(keys)).masked_fill(at < 30, -torch.inf)
    blocks = torch.arange(rows)[:, None] // 50 == at // 300
    return {
        "none": every,
        "right": (at < 900)[None],
        "left": (at >= 700)[None],
        "short": (at < 3)[None],
        "all": ~every,
        "holes": every & (torch.rand(rows, keys) < 0.999),
        "blocks": blocks,
        "biased": biased[None],
        "biased rows": biased + torch.randn(rows, 1) * (at < 500),
        "low": torch.where(blocks, 0.0, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize(("rows", "causal"), [(8, False), (200, True), (200, False)])
def test_masks_leave_ranges_of_keys(isa: str, rows: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    query, key, value = torch.randn(2, 1, rows, 4), torch.randn(2, 1, 1300, 4), torch.randn(2, 1, 1300, 3)
    for kind, mask in masks_of_padding(rows, 1300).items():
        # The second sequence has its keys elsewhere.
        given = {"attn_mask": torch.stack([mask, mask.roll(100, -1)])[:, None], "causal": causal, "query_offset": 40}
        out, stats = attention(query, key, value, StatSpec.all(), impl="cpu", **given)
        exact_inputs = (tensor.double() for tensor in (query, key, value))
        exact_out, exact = attention(*exact_inputs, StatSpec.all(), impl="reference", **given)
        torch.testing.assert_close(out.double(), exact_out, rtol=1e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")
        for name, got in stats.items():
            if name != "topk_index":
                want = getattr(exact, name)
                torch.testing.assert_close(
                    got.double(), want, rtol=1e-4, atol=1e-5, msg=lambda m, k=kind, n=name: f"{k}, {n}: {m}"
                )


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("rows", [1, 8])
def test_the_output_of_few_rows_keeps_its_digits(isa: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50,000 equal values, taken one by one, the sum would be a few ten-thousandths off."""
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    value = torch.full((1, 1, 50_000, 67), 0.7)
    out, _ = attention(torch.zeros(1, 1, rows, 4), torch.zeros(1, 1, 50_000, 4), value, impl="cpu")
    torch.testing.assert_close(out, value[:, :, :rows], rtol=2e-5, atol=0)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("rows", [150, 3])
@pytest.mark.parametrize(("left", "right"), [(-1, 0), (5, -1), (4, 4), (3, 0)])
def test_non_finite_inputs_stay_in_the_rows_and_heads_that_see_them(
    impl: str, rows: int, left: int, right: int
) -> None:
    torch.manual_seed(0)
    keys = 150
    if impl == "triton":
        rows = min(rows, 40)  # is interpreted
    query, key, value = torch.randn(1, 2, rows, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    counted = torch.ones(1, rows, dtype=torch.bool)
    counted[0, 0] = False
    options: dict[str, Any] = {"window": (left, right), "query_mask": counted, "impl": impl}
    clean_out, clean = attention(query, key, value, StatSpec.all(), **options)
    query[0, 0, 0] = query[0, 0, rows // 2] = torch.nan
    key[0, 1, 100] = torch.inf
    out, stats = attention(query, key, value, StatSpec.all(), **options)

    ahead = torch.arange(keys) - (torch.arange(rows) + keys - rows)[:, None]
    sees_QK = ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))
    harmed_HQ = torch.zeros(2, rows, dtype=torch.bool)
    harmed_HQ[0, [0, rows // 2]] = True
    harmed_HQ[1] = sees_QK[:, 100]
    reached_HK = (harmed_HQ[:, :, None] & counted[0, :, None] & sees_QK).any(1)
    assert torch.equal(out[0][~harmed_HQ], clean_out[0][~harmed_HQ])
    for (name, got), (_, want) in zip(stats.items(), clean.items(), strict=True):
        kept = ~reached_HK if name == "received_mass" else ~harmed_HQ
        assert torch.equal(got[0][kept], want[0][kept]), name
        if name != "received_mass":
            assert not got[0, 0, 0].isnan().any(), f"{name} of a row that does not count"


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("rows", [70, 1])
def test_a_row_of_nothing_but_nan_is_not_taken_for_an_empty_one(impl: str, rows: int) -> None:
    query, key = torch.full((1, 1, rows, 8), torch.nan), torch.randn(1, 1, 90, 8)
    mask = torch.arange(90) < 60
    _, stats = attention(query, key, key, attn_mask=mask, impl=impl)
    assert stats.entropy is not None
    assert stats.lse.isnan().all()
    assert stats.entropy.isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_number_of_threads_changes_no_bit(impl: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1100, 32)
    key, value = torch.randn(2, 2, 2, 1500, 32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention(query, key, value, StatSpec.all(), causal=True, impl=impl))
    finally:
        torch.set_num_threads(before)
    for out, stats in results[1:]:
        assert torch.equal(out, results[0][0])
        for (name, got), (_, want) in zip(stats.items(), results[0][1].items(), strict=True):
            assert torch.equal(got, want), name


@pytest.mark.parametrize("impl", IMPLS)
def test_received_mass_is_the_same_kept_or_computed_twice(impl: str) -> None:
    """Long sequences do not keep their exponentials: many threads make that happen early, with equal bits."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 3000, 8)
    spec = StatSpec(received=True)
    before = torch.get_num_threads()
    masses = []
    try:
        for threads in (1, 64):
            torch.set_num_threads(threads)
            masses.append(attention(query, key, value, spec, impl=impl)[1].received_mass)
    finally:
        torch.set_num_threads(before)
    assert masses[0] is not None
    assert torch.equal(masses[0], masses[1])
    assert masses[0].sum().item() == pytest.approx(3000, rel=1e-5)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("seed", range(12))
def test_packed_sequences_are_sequences_by_themselves(impl: str, seed: int) -> None:
    torch.manual_seed(seed)
    lengths_q, lengths_k = torch.randint(0, 90, (2, 4)).tolist()
    query = torch.randn(sum(lengths_q), 4, 16)
    key, value = torch.randn(sum(lengths_k), 2, 16), torch.randn(sum(lengths_k), 2, 9)
    bounds_q, bounds_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    tags = {"query_tags": torch.randint(0, 3, (2, len(query))), "key_tags": torch.randint(-1, 3, (2, len(key)))}
    features, query_mask = torch.randn(len(key), 3), torch.rand(len(query)) < 0.8
    options: dict[str, Any] = {"causal": seed % 2 == 0, "window": (20, -1), "sink_logits": torch.randn(4)}
    spec = StatSpec.all(topk=5)
    out, stats = attention_varlen(
        query,
        key,
        value,
        bounds_q,
        bounds_k,
        spec,
        key_features=features,
        query_mask=query_mask,
        impl=impl,
        **tags,
        **options,
    )
    for b in range(4):
        q0, q1, k0, k1 = bounds_q[b], bounds_q[b + 1], bounds_k[b], bounds_k[b + 1]
        one_out, one = attention(
            *(t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1])),
            spec,
            key_features=features[None, k0:k1],
            query_mask=query_mask[None, q0:q1],
            query_tags=tags["query_tags"][:, None, q0:q1],
            key_tags=tags["key_tags"][:, None, k0:k1],
            impl=impl,
            **options,
        )
        torch.testing.assert_close(out[q0:q1], one_out[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        for (name, got), (_, want) in zip(stats.items(), one.items(), strict=True):
            part = got[:, k0:k1] if name == "received_mass" else got[:, q0:q1]
            torch.testing.assert_close(part, want[0], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_of_few_rows_and_of_many_do_not_touch_each_other(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One memory serves rows whose lanes run along the keys and rows that are lanes themselves."""
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    torch.manual_seed(0)
    lengths_q, lengths_k = [70, 1, 8, 9, 3, 67, 2], [1153, 2400, 33, 700, 0, 1, 1301]  # of 67 rows 3 are left over
    bounds_q, bounds_k = ([0, *itertools.accumulate(lengths)] for lengths in (lengths_q, lengths_k))
    query = torch.randn(bounds_q[-1], 4, 16).to(dtype)
    key, value = torch.randn(bounds_k[-1], 2, 16).to(dtype), torch.randn(bounds_k[-1], 2, 9).to(dtype)
    spec, window = StatSpec.all(topk=5), (900, 3)
    out, stats = attention_varlen(query, key, value, bounds_q, bounds_k, spec, window=window, impl="cpu")
    for b in range(len(lengths_q)):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        one = [tensor.transpose(0, 1)[None] for tensor in (query[rows], key[keys], value[keys])]
        one_out, one_stats = attention(*one, spec, window=window, impl="cpu")
        assert torch.equal(out[rows], one_out[0].transpose(0, 1))
        for (name, got), (_, want) in zip(stats.items(), one_stats.items(), strict=True):
            assert torch.equal(got[:, keys if name == "received_mass" else rows], want[0]), name


@pytest.mark.parametrize("impl", ALL)
def test_no_packed_sequence_at_all(impl: str) -> None:
    empty = torch.zeros(0, 2, 8)
    bounds = torch.zeros(1, dtype=torch.int32)
    out, stats = attention_varlen(empty, empty, empty, bounds, bounds, StatSpec.all(), impl=impl)
    assert out.shape == (0, 2, 8)
    assert stats.lse.shape == (2, 0)


@pytest.mark.parametrize("isa", _C.instruction_sets())
def test_every_set_of_instructions_matches_the_reference(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    for seed in range(200, 230):
        case = random_case(seed, dtype=DTYPES[seed % 4])
        out, stats = attention(case.query, case.key, case.value, case.spec, impl="cpu", **case.kwargs)
        assert_matches_float64(out, stats, case)


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("keys", [575, 577, 1151, 1152, 1153, 1729, 2400])  # a block has 288, 576 or 1152 of them
def test_random_calls_over_several_blocks_of_keys(isa: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    for seed in range(keys, keys + 4):
        case = random_case(seed, dtype=DTYPES[seed % 4], sizes=Sizes(longest=70), number_of_keys=keys)
        out, stats = attention(case.query, case.key, case.value, case.spec, impl="cpu", **case.kwargs)
        assert_matches_float64(out, stats, case)


@pytest.mark.parametrize("isa", _C.instruction_sets())
@pytest.mark.parametrize("keys", [1, 31, 575, 2112, 4300])
def test_random_calls_of_few_rows(isa: str, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As decoding has them: lanes run along the keys then."""
    monkeypatch.setenv("ATTNCAP_CPU_ISA", isa)
    sizes = Sizes(rows=tuple(range(1, 10)), longest=9, dims=(1, 8, 33, 80, 128), value_dims=(1, 5, 64, 136))
    for seed in range(keys, keys + 6):
        case = random_case(seed, dtype=DTYPES[seed % 4], sizes=sizes, number_of_keys=keys)
        out, stats = attention(case.query, case.key, case.value, case.spec, impl="cpu", **case.kwargs)
        assert_matches_float64(out, stats, case)


def test_an_unknown_set_of_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCAP_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"ATTNCAP_CPU_ISA.*portable.*mmx"):
        attention(*torch.randn(3, 1, 1, 2, 4), impl="cpu")
