"""Roles of heads: which statistic, which direction, which threshold, in which order."""

from __future__ import annotations

import math

import pytest

from attncap.analysis import RoleResult, find_roles
from attncap.store import heads_bytes
from tests.runs import head_rows

pyarrow = pytest.importorskip("pyarrow")


def table(rows):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(pyarrow.BufferReader(heads_bytes(rows)))


def roles_of(rows, **options) -> dict[str, RoleResult]:
    return {result.role.name: result for result in find_roles(table(rows), **options)}


def test_previous_token_head_is_found_and_labelled():
    found = roles_of(head_rows([12] * 6, means={("offset_mass[-1]", 0, 2): 0.93, ("offset_mass[-1]", 3, 1): 0.51}))
    previous = found["previous token"]
    assert [head.label for head in previous.holders] == ["layer 0 head 2", "layer 3 head 1"]
    assert previous.ranked[0].mean == pytest.approx(0.93)
    assert previous.ranked[0].module == "encoder.layer.0.attention"
    assert len(previous.ranked) == 72


def test_half_is_not_more_than_half():
    found = roles_of(head_rows([2], means={("offset_mass[1]", 0, 1): 0.5}))
    assert found["next token"].holders == ()
    assert found["next token"].ranked[0].label == "layer 0 head 1"


def test_narrowest_ranks_upwards_and_broadest_downwards():
    means = {("relative_entropy", 0, 0): 0.95, ("relative_entropy", 1, 2): 0.1}
    found = roles_of(head_rows([3, 3], means=means))
    assert [head.label for head in found["broadest"].holders] == ["layer 0 head 0"]
    assert [head.label for head in found["narrowest"].holders] == ["layer 1 head 2"]
    assert found["narrowest"].role.rule == "< 0.20"


def test_entropy_stands_in_for_relative_entropy_without_a_threshold():
    found = roles_of(head_rows([2], stats=("entropy",)))
    assert found["broadest"].role.stat == "entropy"
    assert found["broadest"].role.rule == ""
    assert found["broadest"].holders == ()


def test_ties_are_ordered_by_layer_and_head():
    means = {("sink_mass", layer, head): 0.4 for layer in range(2) for head in range(2)}
    ranked = roles_of(head_rows([2, 2], means=means))["sink"].ranked
    assert [(head.layer, head.head) for head in ranked] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(("diagonal", "there"), [(0, True), (2, False), (None, False)])
def test_a_wide_diagonal_is_not_the_token_itself(diagonal, there):
    assert ("self" in roles_of(head_rows([2]), spec={"diagonal": diagonal})) == there


def test_tags_and_other_offsets_are_roles_where_they_were_captured():
    stats = ("special_tokens", "mine", "offset_mass[-3]", "offset_mass[0]")
    rows = head_rows([2], stats=stats, means={("mine", 0, 1): 0.8})
    found = roles_of(rows, tags=("special_tokens", "mine", "absent"))
    assert list(found) == ["3 tokens before", "special tokens", "mine"]
    assert found["mine"].holders[0].label == "layer 0 head 1"


@pytest.mark.parametrize(("tag", "part"), [("induction", "offset_mass[1]"), ("duplicate", "diagonal_mass")])
def test_what_a_tag_always_matches_is_no_sign_of_its_role(tag, part):
    means = {(tag, 0, 0): 0.9, (part, 0, 0): 0.8, (tag, 0, 1): 0.6, (part, 0, 1): 0.2}
    found = roles_of(head_rows([2], stats=(tag, part), means=means), tags=(tag,))
    assert [head.label for head in found[tag].holders] == ["layer 0 head 1"]
    assert found[tag].ranked[0].mean == pytest.approx(0.4)
    assert tag not in roles_of(head_rows([2], stats=(tag,)), tags=(tag,))


def test_sink_says_how_many_tokens_it_counts():
    assert "the first token" in roles_of(head_rows([2]), spec={"sink": 1})["sink"].role.measures
    assert "the first 4 tokens" in roles_of(head_rows([2]), spec={"sink": 4})["sink"].role.measures


def test_groups_are_pooled_by_their_counts():
    rows = head_rows([1], stats=("sink_mass",), groups=("a", "b"))
    rows[0] |= {"count": 300, "mean": 0.2}
    rows[1] |= {"count": 100, "mean": 0.6}
    (head,) = roles_of(rows)["sink"].ranked
    assert head.mean == pytest.approx(0.3)
    assert head.count == 400


def test_heads_that_counted_nothing_are_left_out():
    rows = head_rows([2], stats=("sink_mass",))
    rows[0] |= {"count": 0, "mean": math.nan}
    assert [head.head for head in roles_of(rows)["sink"].ranked] == [1]
