"""What the command `attncap` understands: scan, status, report, analyse, compare, demo, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import attncap
from attncap import arguments
from attncap.analysis.of_run import DOCUMENTS, analyse
from attncap.analysis.of_run import NAMES as ANALYSIS_NAMES
from attncap.arguments import UsageError, errors_name_options, half_width, listed, model_options, relative_keys
from attncap.claims import find_place
from attncap.corpus import CorpusOptions
from attncap.models import BUILTIN_MINILM
from attncap.options import ScanOptions, check_arguments
from attncap.progress import plural, progress_for, signals_interrupt
from attncap.scan import DEFAULT_SPEC, scan
from attncap.store import Run
from attncap.types import StatSpec
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


def run(typed: list[str]) -> int:
    """Run one command; gives the exit code. Errors that attncap foresees leave as AttncapError."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=typed, prog_name="attncap", standalone_mode=False)
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
    corpus: arguments.Sources,
    output: RunFolderOption,
    topk: arguments.TopK = DEFAULT_SPEC.topk,
    sink: arguments.Sink = DEFAULT_SPEC.sink,
    diagonal: arguments.Diagonal = "0",
    offsets: arguments.Offsets = "-1,1",
    entropy: arguments.Entropy = True,
    max_: arguments.Max = True,
    distance: arguments.Distance = True,
    collision: arguments.Collision = True,
    received: arguments.Received = True,
    tags: arguments.Tags = None,
    limit: arguments.Limit = None,
    text_column: arguments.TextColumn = "text",
    txt_documents: arguments.TxtDocuments = "paragraph",
    on_error: arguments.OnError = "skip",
    group_by: arguments.GroupBy = None,
    keep: arguments.Keep = "off",
    max_tokens: arguments.MaxTokens = None,
    batch_tokens: arguments.BatchTokens = None,
    model_option: arguments.ModelOption = None,
    shard_characters: arguments.ShardCharacters = None,
    dtype: arguments.Dtype = "auto",
    device: arguments.Device = "auto",
    tensor_parallel: arguments.TensorParallel = 1,
    workers: arguments.Workers = None,
) -> None:
    """Capture the statistics of every attention head of MODEL over CORPUS into a run folder.

    The same command again goes on where an earlier one was stopped. Started by torchrun or srun, any number of workers
    share the run: torchrun --nproc-per-node 8 -m attncap scan ...
    """
    with errors_name_options():
        spec = StatSpec(
            entropy=entropy,
            max=max_,
            sink=sink,
            diagonal=half_width(diagonal),
            topk=topk,
            offsets=relative_keys(offsets),
            distance=distance,
            collision=collision,
            received=received,
        )
        corpus_options = CorpusOptions(text_column, txt_documents, on_error, limit, group_by)
        options = ScanOptions(
            tags=None if tags is None else tuple(listed(tags)),
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            workers=workers,
            keep=tuple(listed(keep)),
            shard_characters=shard_characters,
            tensor_parallel=tensor_parallel,
            model=model_options(model_option),
        )
        check_arguments(spec, corpus_options, options)
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
    device: arguments.Device = "auto",
) -> int:
    """Analyse the model of RUN beyond its statistics, into tables under RUN/analyses that the report shows.

    The same command again goes on after the last analysis that was finished.
    """
    names = None if only is None else arguments.names("--only", only)
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
    level: Annotated[
        float, typer.Option(help="Heads are shown whose corrected p is at most this.", min=0, max=1)
    ] = 0.05,
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

    group_a, group_b = (None, None) if group is None else arguments.groups(group)
    stats = None if stat is None else arguments.names("--stat", stat)
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
    with errors_name_options():
        corpus_options = CorpusOptions(limit=limit)
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
