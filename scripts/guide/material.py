"""What the guide's questions are asked of: runs of MiniLM, and models that are trained here in seconds."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncap.analysis import Result
from attncap.analysis.of_run import analyse
from attncap.corpus import CorpusOptions
from attncap.models import LoadedModel, load_model
from attncap.options import ScanOptions
from attncap.report.content import Report, build_report
from attncap.scan import scan
from attncap.store import read_run
from tests import trained
from tests.digit_runs import make_digit_runs

SENTENCES = Path(__file__).resolve().parents[2] / "tests" / "sample.conllu"

# Both the documentation and the code of their functions are texts of the two tasks.
_MODULES = (
    "argparse", "asyncio.tasks", "bisect", "calendar", "collections", "configparser", "contextlib", "copy", "csv",
    "difflib", "fractions", "functools", "gettext", "glob", "gzip", "heapq", "inspect", "ipaddress", "json", "logging",
    "lzma", "mimetypes", "os", "pathlib", "pdb", "pickle", "pprint", "random", "shutil", "statistics", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "traceback", "types", "typing", "unittest.case", "unittest.mock",
    "urllib.parse", "urllib.request", "uuid", "weakref", "zipfile",
)  # fmt: skip
_SHORTEST = 200
"""Characters of a text of the two tasks."""


@dataclass(frozen=True)
class Models:
    """Those of `tests.trained`."""

    induction: Any
    clean: Any
    backdoored: Any
    digits: Any


@dataclass(frozen=True)
class Material:
    """Runs and models.

    Attributes:
        run: of MiniLM over docstrings, analysed. results: of its analyses. tasks: run of MiniLM over two kinds of text.
        by_class, by_chance: runs of the digits model, whose groups are classes or drawn at random.
        texts: some documents, of one kind.
    """

    run: Path
    results: dict[str, Result]
    tasks: Path
    by_class: Path
    by_chance: Path
    texts: tuple[str, ...]
    models: Models

    @cached_property
    def report(self) -> Report:
        """What the run of MiniLM says."""
        return build_report(read_run(self.run))

    @cached_property
    def digits_report(self) -> Report:
        """What the run of the digits model says."""
        return build_report(read_run(self.by_class))

    @cached_property
    def minilm(self) -> LoadedModel:
        """The model of the first runs."""
        return load_model("builtin:minilm")

    def result(self, name: str, column: str, group: str | None = None) -> NDArray[np.float64]:
        """(layers, heads) numbers of an analysis of MiniLM."""
        return _grid(self.results[name].by_head(column, group))


def train() -> Models:
    """All four, in half a minute."""
    return Models(
        trained.induction_model(), trained.classifier(False), trained.classifier(True), trained.digits_model()
    )


def gather(
    folder: Path, models: Models, *, quick: bool = False, digit_runs: tuple[Path, Path] | None = None
) -> Material:
    """Scan and analyse; what is in the folder already is not made again.

    Args:
        quick: few documents.
        digit_runs: those of `make_digit_runs`, where they are made already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    functions = list(_functions())
    pairs = functions[:: len(functions) // (12 if quick else 80)]
    tasks = folder / "tasks.jsonl"
    lines = [{"kind": kind, "text": text} for pair in pairs for kind, text in zip(("text", "code"), pair, strict=True)]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = ScanOptions(keep=("sequences",), workers=1)
    limited = CorpusOptions(limit=24 if quick else 600)
    run = scan("builtin:minilm", ["builtin:docstrings"], folder / "run", corpus_options=limited, options=options)
    by_kind = CorpusOptions(group_by="kind")
    of_tasks = scan("builtin:minilm", [str(tasks)], folder / "run-tasks", corpus_options=by_kind, options=options)
    results = analyse(run.path, documents=1 if quick else 32, conllu=SENTENCES).results
    by_class, by_chance = digit_runs or _digit_runs(folder / "digits", models.digits)
    return Material(run.path, results, of_tasks.path, by_class, by_chance, tuple(text for text, _ in pairs), models)


def _digit_runs(folder: Path, model: Any) -> tuple[Path, Path]:
    there = folder / "run-class", folder / "run-chance"
    return there if all((run / "heads.parquet").exists() for run in there) else make_digit_runs(folder, model)


def _functions() -> Iterator[tuple[str, str]]:
    """(documentation, code without it) of functions of the standard library."""
    for name in _MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(name)))):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            text = ast.get_docstring(node)
            node.body = node.body[1:]
            code = ast.unparse(node)
            if text is not None and min(len(text), len(code)) >= _SHORTEST:
                yield text, code


def _grid(numbers: dict[tuple[int, int], float]) -> NDArray[np.float64]:
    layers, heads = (1 + max(place[axis] for place in numbers) for axis in (0, 1))
    found = np.full((layers, heads), np.nan)
    for place, number in numbers.items():
        found[place] = number
    return found


def means(report: Report, stat: str) -> NDArray[np.float64]:
    """(layers, heads) means of a statistic over all groups of a run."""
    return next(one for one in report.overview if one.stat == stat).grids["mean"]
