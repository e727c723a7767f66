"""What the command `attncap` understands: scan, status, report, analyse, compare, demo, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import attncap
from attncap.analysis.of_run import DOCUMENTS, analyse
from attncap.analysis.of_run import NAMES as ANALYSIS_NAMES
from attncap.claims import find_place
from attncap.corpus import CorpusOptions
from attncap.models import BUILTIN_MINILM, DTYPES
from attncap.options import ScanOptions, check_arguments
from attncap.plan import DEFAULT_TAGS, TAG_NAMES
from attncap.progress import plural, progress_for, signals_interrupt
from attncap.scan import DEFAULT_SPEC, scan
from attncap.store import Run
from attncap.tables import KINDS
from attncap.types import AttncapError, StatSpec
from attncap.workers import print_status, read_status

DEMO_DOCUMENTS = 600

EXIT_CODES = (
    "Exit codes: 0 done, 1 it failed, 2 an argument or the input is wrong, 3 not finished (status), 130 interrupted."
)

app = typer.Typer(
    name="attncap",
    help="What every attention head of a model does, over real text, without the N x N map.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolderOption = Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; given again, it is resumed.")]


class UsageError(AttncapError, ValueError):
    """An argument of the command line is not what it should be."""


def run(arguments: list[str]) -> int:
    """Run one command; gives the exit code. Errors that attncap foresees leave as AttncapError."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="attncap", standalone_mode=False)
    except Exception as error:
        # Typer may bring its own click, whose exceptions are known by what they can do.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from error
        if show is None or code is None:
            raise
        show()
        return int(code)
    return result if isinstance(result, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attncap {attncap.__version__}")
        raise typer.Exit


@app.callback()
def _attncap(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("scan")
def scan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"A folder, a hub id or {BUILTIN_MINILM}.")],
    corpus: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS...",
            help=".txt, .jsonl, .csv, .tsv, .parquet files, images, folders, globs, datasets or builtin:docstrings.",
        ),
    ],
    output: RunFolderOption,
    topk: Annotated[
        int, typer.Option(help="Largest probabilities summed into topk_mass; 0 = off.")
    ] = DEFAULT_SPEC.topk,
    sink: Annotated[
        int, typer.Option(help="sink_mass is the mass on so many first keys; 0 = off.")
    ] = DEFAULT_SPEC.sink,
    diagonal: Annotated[str, typer.Option(help="Half width of diagonal_mass, or off.")] = "0",
    offsets: Annotated[str, typer.Option(help="Relative keys, e.g. -1,1 for previous and next; or off.")] = "-1,1",
    entropy: Annotated[bool, typer.Option(help="Entropy of each row, nats.")] = True,
    max_: Annotated[bool, typer.Option("--max/--no-max", help="max_logit and max_prob.")] = True,
    distance: Annotated[bool, typer.Option(help="Mean distance to the keys attended to, tokens.")] = True,
    collision: Annotated[bool, typer.Option(help="Sum of squared probabilities.")] = True,
    received: Annotated[bool, typer.Option(help="Mass that each key receives.")] = True,
    tags: Annotated[
        str | None,
        typer.Option(help=f"Out of {', '.join(TAG_NAMES)}; or off.", show_default=",".join(DEFAULT_TAGS)),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read no more than this many documents.")] = None,
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text, token ids or image.")] = "text",
    txt_documents: Annotated[
        str, typer.Option(help="A document of a .txt file is a paragraph or a file.")
    ] = "paragraph",
    on_error: Annotated[
        str, typer.Option(help="At a document that cannot be read: skip and count it, or stop.")
    ] = "skip",
    group_by: Annotated[
        str | None, typer.Option(help="Column that names each document's group; folder for files without columns.")
    ] = None,
    keep: Annotated[
        str,
        typer.Option(help=f"Tables of single documents to write: {' or '.join(KINDS)} (with --limit); or off."),
    ] = "off",
    max_tokens: Annotated[int | None, typer.Option(help="Cut documents there; default: where the model must.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens computed at once; default: by device.")] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for Transformers' from_pretrained, e.g. device_map=auto; JSON or a word."),
    ] = None,
    shard_characters: Annotated[
        int | None, typer.Option(help="Length of a shard, which is what a kill costs; default: by device.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(help="Processes of torchrun that run the model together, each with its share of the heads.")
    ] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Batches computed side by side; default: the CPU's cores.")
    ] = None,
) -> None:
    """Capture the statistics of every attention head of MODEL over CORPUS into a run folder.

    The same command again goes on where an earlier one was stopped. Started by torchrun or srun, any number of workers
    share the run: torchrun --nproc-per-node 8 -m attncap scan ...
    """
    try:
        spec = StatSpec(
            entropy=entropy,
            max=max_,
            sink=sink,
            diagonal=None if diagonal == "off" else _integer("--diagonal", diagonal),
            topk=topk,
            offsets=_offsets(offsets),
            distance=distance,
            collision=collision,
            received=received,
        )
        corpus_options = CorpusOptions(text_column, txt_documents, on_error, limit, group_by)
        options = ScanOptions(
            tags=None if tags is None else tuple(_listed(tags)),
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            workers=workers,
            keep=tuple(_listed(keep)),
            shard_characters=shard_characters,
            tensor_parallel=tensor_parallel,
            model=dict(_model_option(option) for option in model_option or ()),
        )
        check_arguments(spec, corpus_options, options)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(_as_typed(str(error))) from error
    finished = _scan(model, corpus, output, spec, corpus_options, options)
    if find_place().rank == 0:
        _summary(finished)
        typer.echo(f"See it: attncap report {output}")


@app.command("status")
def status_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
) -> int:
    """Say how far RUN is, who is at work on it, how fast, and what was left out.

    Exits with 0 where it is finished, with 3 where not.
    """
    status = read_status(run_folder)
    print_status(status, typer.echo)
    return 0 if status.complete else 3


@app.command("report")
def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Finished runs; the first is compared with each.")
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File; default: report.html in RUN.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for each figure as SVG and PNG, too.")] = None,
) -> None:
    """Print the most telling heads of each RUN and write one self-contained HTML file.

    Several runs are compared head by head: scan them with --keep sequences for tests.
    """
    from attncap.report import print_highlights, write_figures, write_report

    for run_folder in runs:
        print_highlights(run_folder)
    typer.echo(f"Report: {write_report(runs, output or runs[0] / 'report.html')}")
    if figures is not None:
        typer.echo(f"Figures: {len(write_figures(runs, figures))} files in {figures}")


@app.command("analyse")
def analyse_command(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    only: Annotated[
        str | None, typer.Option(help=f"Out of {', '.join(ANALYSIS_NAMES)}.", show_default="all of them")
    ] = None,
    documents: Annotated[
        int, typer.Option(help="How many documents of the corpus the model is run on, evenly spaced.", min=1)
    ] = DOCUMENTS,
    conllu: Annotated[
        Path | None, typer.Option(help="Sentences with dependencies, CoNLL-U, for syntax; it is left out without.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
) -> int:
    """Analyse the model of RUN beyond its statistics, into tables under RUN/analyses that the report shows.

    The same command again goes on after the last analysis that was finished.
    """
    names = None if only is None else _names("--only", only)
    for name in names or ():
        if name not in ANALYSIS_NAMES:
            raise UsageError(f"--only: expected names out of {', '.join(ANALYSIS_NAMES)}, got {name!r}")
    if conllu is None and "syntax" in (names or ()):
        raise UsageError("--only: syntax needs --conllu FILE")
    with progress_for(sys.stderr) as progress:
        try:
            with signals_interrupt(progress):
                found = analyse(
                    run_folder, only=names, documents=documents, device=device, conllu=conllu, progress=progress
                )
        except KeyboardInterrupt:
            progress.message(f"{run_folder}: stopped; finished analyses are kept, the same command does the rest")
            raise
    refused = f"; not to be had: {', '.join(found.refused)}" if found.refused else ""
    typer.echo(f"{run_folder}: {plural(len(found.results), 'result')} under {run_folder / 'analyses'}{refused}")
    return 1 if names and not found.results else 0


@app.command("compare")
def compare_command(
    run_a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a finished run.")],
    run_b: Annotated[Path, typer.Argument(metavar="B", help="Another, or the same with two groups.")],
    group: Annotated[
        str | None, typer.Option(help="Only documents of this group; X,Y for group X of A and group Y of B.")
    ] = None,
    stat: Annotated[str | None, typer.Option(help="Statistics, with commas between; default: all.")] = None,
    permutations: Annotated[int, typer.Option(help="How often documents are exchanged.", min=1)] = 2000,
    level: Annotated[float, typer.Option(help="Heads are shown whose corrected p is at most this.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the exchanges.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write all heads there: .parquet or .csv.")
    ] = None,
) -> None:
    """Say which heads differ between two runs or groups: effect sizes, permutation tests, corrected for all heads.

    Both runs need scan --keep sequences for the tests.
    """
    from attncap.analysis.compare import compare
    from attncap.report.comparison import print_comparison, write_comparison

    group_a, group_b = (None, None) if group is None else _groups(group)
    stats = None if stat is None else _names("--stat", stat)
    if output is not None and output.suffix not in (".parquet", ".csv"):
        raise UsageError(f"--output: expected a file that ends in .parquet or .csv, got {output}")
    found = compare(run_a, run_b, group_a=group_a, group_b=group_b, stats=stats, permutations=permutations, seed=seed)
    print_comparison(found, level)
    if output is not None:
        write_comparison(found, output)
        typer.echo(f"All heads: {output}")


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the run and the report.")] = Path("demo"),
    limit: Annotated[int, typer.Option(help="How many documents.")] = DEMO_DOCUMENTS,
) -> None:
    """Scan a real trained model over Python's own documentation, print the most telling heads, write the report.

    Needs no network. About a minute on two cores.
    """
    try:
        corpus_options = CorpusOptions(limit=limit)
    except ValueError as error:
        raise UsageError(_as_typed(str(error))) from error
    from attncap.report import print_highlights, write_report

    run_folder = output / "run"
    options = ScanOptions(keep=("sequences",))  # for the distributions on the page of each head
    _summary(_scan(BUILTIN_MINILM, ["builtin:docstrings"], run_folder, DEFAULT_SPEC, corpus_options, options))
    print_highlights(run_folder)
    typer.echo(f"Report: {write_report(run_folder, output / 'report.html').resolve()}")


@app.command("doctor")
def doctor_command() -> int:
    """Say what runs here, and why not the rest."""
    from attncap.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    print_diagnosis(diagnosis)
    return 0 if diagnosis.healthy else 1


def _scan(
    model: str,
    corpus: list[str],
    output: Path,
    spec: StatSpec,
    corpus_options: CorpusOptions,
    options: ScanOptions,
) -> Run:
    place = find_place()
    with progress_for(sys.stderr, f"worker {place.rank} of {place.size}" if place.launched else "") as progress:
        try:
            with signals_interrupt(progress):
                return scan(
                    model, corpus, output, spec=spec, corpus_options=corpus_options, options=options, progress=progress
                )
        except KeyboardInterrupt:
            progress.message(f"{output}: stopped; finished shards are kept, the same command goes on from there")
            raise


def _summary(finished: Run) -> None:
    counts = finished.scan["counts"]
    parts = [f"{plural(counts['documents'], 'document')}, {plural(counts['tokens'], 'token')}"]
    for name, what in (
        ("truncated_documents", "cut at the model's length"),
        ("empty_documents", "empty"),
        ("failed_documents", "left out because they could not be read"),
    ):
        if counts[name]:
            parts.append(f"{counts[name]} {what}")
    if lost := counts["nonfinite_rows"]:
        parts.append(f"{plural(lost, 'row')} of the heads left out: not finite; try --dtype float32")
    typer.echo(f"{finished.path}: {', '.join(parts)}")


def _as_typed(message: str) -> str:
    """A message that begins with the name of an argument, with that of the option: "txt_documents: ..."."""
    name, colon, rest = message.partition(":")
    name = name.removeprefix("StatSpec.")
    return f"--{name.replace('_', '-')}:{rest}" if colon and name.isidentifier() else message


def _model_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--model-option: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _offsets(text: str) -> tuple[int, ...]:
    found = tuple(_integer("--offsets", offset) for offset in _listed(text))
    if len(set(found)) < len(found):
        raise UsageError(f"--offsets: expected each number once, got {text}")
    return found


def _listed(text: str) -> list[str]:
    return [] if text == "off" else [part.strip() for part in text.split(",") if part.strip()]


def _names(option: str, text: str) -> list[str]:
    found = _listed(text)
    if not found:
        raise UsageError(f"{option}: expected names with commas between, got {text!r}")
    return found


def _groups(text: str) -> tuple[str, str]:
    names = [part.strip() for part in text.split(",")]
    if len(names) > 2 or not all(names):
        raise UsageError(f"--group: expected X, or X,Y for group X of A and group Y of B, got {text!r}")
    return names[0], names[-1]


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option}: expected whole numbers or off, got {text!r}") from None
