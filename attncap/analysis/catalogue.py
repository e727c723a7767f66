"""The analyses that `attncap analyse` knows: each computes one or more results of a run, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attncap
from attncap.analysis.head_results import (
    PERMUTATIONS,
    circuits_results,
    composition_results,
    groups_results,
    mixing_results,
    output_weight_results,
    positional_results,
    similarity_results,
    syntax_results,
)
from attncap.analysis.loss_results import importance_forwards, importance_results
from attncap.analysis.results import Result
from attncap.analysis.subject import Subject
from attncap.parts import digest_of_file

WEIGHTS, TABLES, DOCUMENTS, FEW, SENTENCES = "weights", "tables", "documents", "few documents", "sentences"


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: what it is asked for by. writes: names of its results.
        compute: gives them.
        reads: what it looks at beside the model's weights: the run's own tables, documents of the corpus, a few of
            them, or a file of sentences with dependencies, without which it is left out.
        forwards: how many forwards of the model it takes.
    """

    name: str
    writes: tuple[str, ...]
    compute: Callable[[Subject], Sequence[Result]]
    reads: str
    forwards: Callable[[Subject], int] = lambda _: 0

    def run(self, subject: Subject) -> list[Result]:
        """Its results, and what they were made from."""
        made_from = self.made_from(subject)
        return [replace(result, made_from=made_from) for result in self.compute(subject)]

    def made_from(self, subject: Subject) -> dict[str, Any]:
        """What its results depend on."""
        scan = subject.run.scan
        found = {"attncap": attncap.__version__, "model": scan["model"]["fingerprint"]}
        if self.reads in (DOCUMENTS, FEW):
            documents = subject.documents if self.reads == DOCUMENTS else len(subject.few)
            return {**found, "corpus": scan["corpus"]["fingerprint"], "documents": documents}
        if self.reads == TABLES:
            tables = {"heads": scan["heads_sha256"], **scan.get("tables_sha256", {})}
            return {**found, "tables": tables, "permutations": PERMUTATIONS}
        return found | ({"sentences": digest_of_file(Path(subject.conllu))} if self.reads == SENTENCES else {})


def _once(subject: Subject) -> int:
    return len(subject.batches)


ANALYSES: tuple[Analysis, ...] = (
    Analysis("circuits", ("circuits",), circuits_results, WEIGHTS),
    Analysis("composition", ("composition",), composition_results, WEIGHTS),
    Analysis("groups", ("groups",), groups_results, TABLES),
    Analysis("output_weight", ("output_weight",), output_weight_results, DOCUMENTS, _once),
    Analysis("mixing", ("mixing",), mixing_results, DOCUMENTS, _once),
    Analysis("positional", ("positional",), positional_results, DOCUMENTS, _once),
    Analysis("syntax", ("syntax",), syntax_results, SENTENCES),
    Analysis("similarity", ("similarity", "head_distances"), similarity_results, DOCUMENTS, _once),
    Analysis("importance", ("importance", "pruning"), importance_results, FEW, importance_forwards),
)
"""From the cheapest on."""
