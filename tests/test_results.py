"""Results of analyses in a run: what is written is what is read, and what was damaged is not believed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from attncap.analysis.results import (
    CURVE,
    HEADS,
    PAIRS,
    Column,
    Result,
    ResultDamagedError,
    head_places,
    read_result,
    read_results,
    save_result,
)
from attncap.store import read_run
from tests.runs import head_rows, write_run

LAYERS = ("encoder.0.attention", "encoder.1.attention")


def two_numbers(**changes: Any) -> Result:
    nan = math.nan
    tables = {
        "copying": torch.tensor([[0.5, -0.25, 0.1], [1.0, nan, nan]], dtype=torch.float64),
        "norm": torch.tensor([[1.0, 2.0, nan], [4.0, nan, nan]], dtype=torch.float64),
    }
    fields = {
        "name": "circuits",
        "title": "Circuits",
        "text": "Eigenvalues of W_V W_O.\n\nElhage 2021.",
        "kind": HEADS,
        "columns": (Column("copying", "", "whether it copies", zero=True), Column("norm", "", "of W_O")),
        "data": head_places(LAYERS, tables),
        "made_from": {"documents": 3, "model": "ab"},
    }
    return Result(**{**fields, **changes})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_rows([3, 1]))
    result = two_numbers()
    path = save_result(run, result)
    assert path == run / "analyses" / "circuits.parquet"
    found = read_result(path)
    for name, values in result.data.items():
        expected = values if name == "module" else pytest.approx(values, nan_ok=True)
        assert found.data[name] == expected
    assert list(found.data) == list(result.data)
    words = ("name", "title", "text", "kind", "columns", "plane", "made_from")
    assert [getattr(found, word) for word in words] == [getattr(result, word) for word in words]
    assert found.by_head("copying") == {(0, 0): 0.5, (0, 1): -0.25, (0, 2): 0.1, (1, 0): 1.0}
    assert math.isnan(found.by_head("norm")[0, 2])


def test_the_numbers_are_a_plain_table(tmp_path: Path) -> None:
    path = save_result(write_run(tmp_path / "run", head_rows([3, 1])), two_numbers())
    table = pq.read_table(path, use_threads=False).to_pydict()
    assert list(table) == ["layer", "module", "head", "copying", "norm"]
    assert table["module"] == [LAYERS[0]] * 3 + [LAYERS[1]]
    assert table["head"] == [0, 1, 2, 0]


def test_curves_pairs_groups_and_planes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_rows([3, 1]))
    curve = two_numbers(
        name="pruning",
        kind=CURVE,
        columns=(Column("removed", "heads", "removed"), Column("importance", "nats", "loss")),
        data={"removed": [0, 1], "importance": [0.5, 0.75]},
    )
    pairs = two_numbers(
        name="pairs",
        kind=PAIRS,
        columns=(Column("distance", "nats", "apart"),),
        data={"layer": [0], "module": ["a"], "head": [1], "other_layer": [1], "other_module": ["b"], "other_head": [0],
              "distance": [0.3]},
    )  # fmt: skip
    groups = two_numbers(
        name="groups",
        columns=(Column("x", "", "right"), Column("y", "", "up")),
        data={"layer": [0, 0], "module": ["a", "a"], "head": [1, 1], "group": ["code", "prose"], "x": [1.0, 2.0],
              "y": [0.0, 0.0]},
        plane=("x", "y"),
    )  # fmt: skip
    for result in (curve, pairs, groups):
        save_result(run, result)
    found = read_results(run)
    assert list(found) == ["groups", "pairs", "pruning"]
    assert found["groups"].plane == ("x", "y")
    assert found["groups"].by_head("x", "prose") == {(0, 1): 2.0}
    assert (found["pairs"].rows, found["pruning"].rows) == (1, 2)
    assert found["pruning"].data == {"removed": [0.0, 1.0], "importance": [0.5, 0.75]}


def test_a_run_with_results_is_still_that_run_and_without_has_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_rows([3, 1]))
    assert read_results(run) == {}
    before = read_run(run)
    save_result(run, two_numbers())
    after = read_run(run)
    assert (after.scan, after.heads) == (before.scan, before.heads)


def test_a_changed_number_or_word_is_found(tmp_path: Path) -> None:
    path = save_result(write_run(tmp_path / "run", head_rows([3, 1])), two_numbers())
    table = pq.read_table(path, use_threads=False)
    words = dict(table.schema.metadata)
    for changed in (
        table.set_column(3, "copying", [[0.5, 0.25, 0.1, 1.0]]),
        table.replace_schema_metadata({**words, b"attncap": words[b"attncap"].replace(b"whether", b"how far")}),
        table.replace_schema_metadata(None),
        table.drop_columns("norm"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(ResultDamagedError, match=r"damaged.*attncap analyse .*run --only circuits` makes it anew"):
            read_result(path)


def test_every_cut_of_the_file_and_every_other_file_is_found(tmp_path: Path) -> None:
    path = save_result(write_run(tmp_path / "run", head_rows([3, 1])), two_numbers())
    data = path.read_bytes()
    for content in (*(data[:length] for length in range(0, len(data), 97)), b"no table at all"):
        path.write_bytes(content)
        with pytest.raises(ResultDamagedError, match="damaged"):
            read_results(path.parent.parent)
    path.with_name("other.parquet").write_bytes(data)
    with pytest.raises(ResultDamagedError, match=r"other\.parquet: damaged"):
        read_result(path.with_name("other.parquet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "name: expected lower-case"),
        ({"kind": "rows"}, "kind: expected one of heads, pairs, curve, got 'rows'"),
        ({"columns": ()}, "data: expected the columns layer, module, head"),
        ({"kind": CURVE}, "of a result of kind curve, got layer"),
        ({"plane": ("copying",)}, "plane: expected two"),
        ({"plane": ("copying", "other")}, "plane: expected two"),
    ],
)
def test_what_is_no_result_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_numbers(**changes)


def test_columns_are_of_one_length() -> None:
    data = {**two_numbers().data, "norm": [1.0]}
    with pytest.raises(ValueError, match="columns of one length"):
        two_numbers(data=data)
    with pytest.raises(ValueError, match="column: expected a number of heads, got 'other'"):
        two_numbers().by_head("other")
