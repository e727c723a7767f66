"""`analyse`: compute what a finished run can say beyond its statistics, and keep it in the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attncap.analysis.catalogue import ANALYSES, SENTENCES, Analysis
from attncap.analysis.results import Result, ResultDamagedError, read_result, result_path, save_result
from attncap.analysis.subject import Subject, load_subject
from attncap.analysis.syntax import ConlluError
from attncap.parts import TEMPORARY
from attncap.progress import Progress
from attncap.store import ANALYSES as FOLDER
from attncap.store import RunError, read_run
from attncap.types import AttncapError

NAMES = tuple(analysis.name for analysis in ANALYSES)

DOCUMENTS = 32
"""How many documents of the corpus the model is run on."""


@dataclass(frozen=True)
class Analysed:
    """What `analyse` did.

    Attributes:
        results: all that were asked for and are in the run now, by name.
        refused: analysis -> why it cannot be had of this model or run.
        computed: names of the analyses that were not there before.
    """

    results: dict[str, Result]
    refused: dict[str, str]
    computed: tuple[str, ...]


def analyse(
    run: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    documents: int = DOCUMENTS,
    device: str = "auto",
    conllu: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Analysed:
    """Analyse the model of a finished run, on documents of its corpus, into RUN/analyses.

    Results that are there already, of the same model, documents and version, are not computed again, so that a call
    that was stopped goes on after the last finished analysis. The scan itself is not touched.

    Args:
        run: its folder.
        only: names out of `NAMES`; None for all.
        documents: how many the model is run on, evenly spaced over the corpus.
        device: a torch device; "auto" takes the GPU where there is one.
        conllu: a CoNLL-U file, which "syntax" is about; without one it is left out.
        progress: is shown forwards of the model, of all analyses together.

    Raises:
        RunError: the run is not finished or damaged, or its folder may not be written.
        RunMismatchError: the model, or the corpus where one is needed, is not what was scanned.
        ModelError, CorpusError, ConlluError: they cannot be read.
        ValueError: no such analysis; fewer than one document; syntax without a file.
    """
    for name in only or ():
        if name not in NAMES:
            raise ValueError(f"only: expected names out of {', '.join(NAMES)}, got {name!r}")
    if documents < 1:
        raise ValueError(f"documents: expected at least 1, got {documents}")
    if conllu is None and "syntax" in (only or ()):
        raise ValueError("conllu: expected a CoNLL-U file for syntax, got none")
    if conllu is not None and not Path(conllu).is_file():
        raise ConlluError(f"{conllu}: no such file")
    progress = progress or Progress()
    folder = Path(run)
    finished = read_run(folder)
    _make_folder(folder)
    subject = load_subject(finished, documents, device, progress.message, progress.advance, str(conllu or ""))
    possible = [analysis for analysis in ANALYSES if conllu is not None or analysis.reads != SENTENCES]
    wanted = [analysis for analysis in possible if only is None or analysis.name in only]
    there = {analysis.name: _there(analysis, subject) for analysis in wanted}
    left = [analysis for analysis in wanted if there[analysis.name] is None]
    results = {one.name: one for found in there.values() for one in found or ()}
    refused: dict[str, str] = {}
    forwards = {analysis.name: analysis.forwards(subject) for analysis in left}
    progress.start(sum(forwards.values()), 0, "forward")
    done = 0
    for analysis in left:
        try:
            for result in analysis.run(subject):
                save_result(folder, result)
                results[result.name] = result
        except (AttncapError, ValueError) as error:
            refused[analysis.name] = str(error)
        done += forwards[analysis.name]
        progress.reached(done)
        said = refused.get(analysis.name) or ", ".join(str(result_path(folder, name)) for name in analysis.writes)
        progress.message(f"{analysis.name}: {'not to be had: ' if analysis.name in refused else ''}{said}")
    computed = tuple(analysis.name for analysis in left if analysis.name not in refused)
    return Analysed(results, refused, computed)


def _there(analysis: Analysis, subject: Subject) -> list[Result] | None:
    """Its results, where all of them are in the run, whole and made from the same."""
    made_from = analysis.made_from(subject)
    found = []
    for name in analysis.writes:
        try:
            result = read_result(result_path(subject.run.path, name))
        except (FileNotFoundError, ResultDamagedError):
            return None
        if result.made_from != made_from:
            return None
        found.append(result)
    return found


def _make_folder(run: Path) -> None:
    """The folder of results, without what killed processes were writing there."""
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob("*" + TEMPORARY):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror or error}); check its permissions") from error
