"""The command line: what it prints, what it refuses, and the exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import attncap
from attncap import cli, commands
from attncap.progress import LineProgress, progress_for
from attncap.store import Run
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model "model", the corpus "corpus.jsonl" and the finished run "run"."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", ["", *tiny.texts(40)])
    assert cli.main(["scan", str(folder / "model"), str(folder / "corpus.jsonl"), "-o", str(folder / "run")]) == 0
    return folder


def scan_arguments(folder: Path, *options: str) -> list[str]:
    return ["scan", str(folder / "model"), str(folder / "corpus.jsonl"), *options]


def test_a_scan_sums_up_what_it_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(scan_arguments(folder, "-o", str(folder / "run"))) == 0
    printed = capsys.readouterr()
    assert "40 documents" in printed.out
    assert "1 empty" in printed.out
    assert f"attncap report {folder / 'run'}" in printed.out
    assert "nothing to do" in printed.err


def test_a_summary_speaks_of_one_document_and_of_rows_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"documents": 1, "tokens": 1, "truncated_documents": 0, "empty_documents": 0, "failed_documents": 0}
    commands._summary(Run(tmp_path, None, {"counts": {**counts, "nonfinite_rows": 1200}}))  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "1 document, 1 token, 1,200 rows of the heads left out: not finite; try --dtype float32" in said


def test_every_switch_reaches_the_scan(folder: Path, tmp_path: Path) -> None:
    switches = ["--topk", "2", "--sink", "1", "--diagonal", "off", "--offsets", "-2,3", "--no-entropy", "--no-max"]
    switches += ["--no-distance", "--no-collision", "--no-received", "--tags", "segment", "--limit", "5"]
    assert cli.main(scan_arguments(folder, *switches, "-o", str(tmp_path / "run"))) == 0
    from attncap.store import read_run

    run = read_run(tmp_path / "run")
    found = {row["stat"] for row in run.heads.to_pylist()}
    assert found == {"lse", "topk_mass", "sink_mass", "offset_mass[-2]", "offset_mass[3]", "segment"}
    assert run.scan["counts"]["documents"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topk", "65"], "--topk: expected an int from 0 to 64, got 65"),
        (["--offsets", "one"], "--offsets: expected whole numbers or off, got 'one'"),
        (["--diagonal", "-3"], "--diagonal: expected"),
        (["--tags", "nonsense"], "--tags: expected names out of induction"),
        (["--limit", "0"], "--limit: expected at least 1"),
        (["--on-error", "ignore"], "--on-error: expected stop or skip"),
        (["--txt-documents", "line"], "--txt-documents: expected paragraph or file"),
        (["--dtype", "int8"], "--dtype: expected one of"),
        (["--text-column", "body"], "corpus.jsonl:1: no column 'body'; there is 'text'"),
        (["--max-tokens", "1"], "--max-tokens: expected at least 3"),
        (["--offsets", "1,2,1"], "--offsets: expected each number once, got 1,2,1"),
        (["--tags", "duplicate,duplicate"], "--tags: expected each name once, got duplicate 2 times"),
        (["--batch-tokens", "0"], "--batch-tokens: expected at least 1"),
        (["--keep", "rows"], "--keep: rows is for single examples, so it needs a limit"),
    ],
)
def test_wrong_options_exit_2_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(scan_arguments(folder, *options, "-o", str(tmp_path / "run"))) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attncap: ")]
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["scan", "{model}", "{folder}/absent.jsonl", "-o", "{tmp}/run"], 2, "absent.jsonl: no such file"),
        (["scan", "{folder}/absent", "{corpus}", "-o", "{tmp}/run"], 2, "absent'"),
        (["scan", "{model}", "{corpus}", "-o", "{model}"], 2, "is not a run of attncap"),
        (["scan", "{model}", "{corpus}", "-o", "{corpus}"], 2, "is a file"),
        (["scan", "{model}", "{corpus}", "--sink", "2", "-o", "{folder}/run"], 2, "spec.sink is 4 there and 2 here"),
        (["scan", "{model}", "{corpus}", "--device", "abacus", "-o", "{tmp}/run"], 2, "--device: 'abacus'"),
        (["report", "{tmp}"], 2, "no run of attncap"),
        (["status", "{tmp}"], 2, "no run of attncap"),
        (["report", "{folder}/run", "-o", "{tmp}"], 2, "is a folder; give a file for the report with -o"),
        (["scan", "{model}"], 2, "Missing argument"),
        (["scan", "{model}", "{corpus}"], 2, "Missing option"),
        (["scan", "{model}", "{corpus}", "-o", "{tmp}/run", "--topk", "many"], 2, "'--topk'"),
        (["frobnicate"], 2, "frobnicate"),
        (["report", "{folder}/run", "{folder}/run", "-o", "{tmp}/page.html"], 2, "given twice"),
        (["analyse", "{folder}/run", "--only", ""], 2, "--only: expected names"),
    ],
)
def test_every_failure_is_one_message_and_a_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    names = {"folder": folder, "model": folder / "model", "corpus": folder / "corpus.jsonl", "tmp": tmp_path}
    assert cli.main([argument.format(**names) for argument in arguments]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_report_is_written_beside_the_run_or_where_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.html"
    assert cli.main(["report", str(folder / "run"), "-o", str(target)]) == 0
    assert str(target) in capsys.readouterr().out.replace("\n", "")
    assert "<html" in target.read_text(encoding="utf-8")


def test_two_runs_are_reported_on_one_page_with_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [
        "--no-entropy",
        "--no-max",
        "--no-distance",
        "--no-collision",
        "--no-received",
        "--tags",
        "off",
        "--topk",
        "0",
    ]
    for name, limit in (("run", "30"), ("other", "20")):
        assert cli.main(scan_arguments(folder, *few, "--limit", limit, "-o", str(tmp_path / name))) == 0
    runs = [str(tmp_path / "run"), str(tmp_path / "other")]
    figures = tmp_path / "figures"
    assert cli.main(["report", *runs, "-o", str(tmp_path / "page.html"), "--figures", str(figures)]) == 0
    assert "run and other" in (tmp_path / "page.html").read_text(encoding="utf-8")
    number = len(list(figures.iterdir()))
    assert f"Figures: {number} files in {figures}" in capsys.readouterr().out.replace("\n", "")
    assert {"run_overview.svg", "other_overview.png", "comparison_sink_mass.svg"} <= {
        path.name for path in figures.iterdir()
    }


def test_the_doctor_finds_the_core_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "attncap works here" in printed
    for name in ("torch", "transformers", "reference", "cpu", "triton", "cuda", "auto takes"):
        assert name in printed


def test_the_doctor_says_when_an_implementation_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attncap import doctor

    def off_by_a_bit(query: object, *arguments: object, impl: str = "auto", **options: object) -> object:
        out, stats = attncap.attention(query, *arguments, impl=impl, **options)  # type: ignore[arg-type]
        return out + (0 if out.dtype.itemsize == 8 else 0.01), stats

    monkeypatch.setattr(doctor, "attention", off_by_a_bit)
    assert cli.main(["doctor"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert commands.EXIT_CODES in " ".join(capsys.readouterr().out.split())


def test_a_table_that_goes_to_a_file_has_no_broken_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder / "run")]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith(": the most telling heads")
    rows = [line for line in lines if "> 0." in line or "< 0." in line]
    assert len(rows) == sum("layer " in line for line in lines) > 8


def test_a_corpus_whose_name_is_not_utf8_is_scanned_and_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / os.fsdecode(b"n\xff.txt")
    corpus.write_bytes(b"ba be\n\n\xff\n\nba du")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    complaints = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")  # as Python's own
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setattr(sys, "stderr", complaints)
    for arguments in (["scan", str(folder / "model"), str(corpus), "-o"], ["status"], ["report"]):
        assert cli.main([*arguments, str(tmp_path / "run")]) == 0
    assert cli.main(["scan", str(folder / "model"), str(corpus), "-o", str(tmp_path / os.fsdecode(b"\xff"))]) == 2
    for stream, said in ((printed, "n\\udcff.txt:3: not UTF-8"), (complaints, "the name is not UTF-8")):
        stream.seek(0)
        assert said in stream.read()


def test_a_level_that_is_no_probability_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(folder / "run"), str(folder / "run"), "--level", "7"]) == 2
    assert "--level" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"attncap {attncap.__version__}\n"


def test_python_m_attncap_is_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "attncap", "frobnicate"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "frobnicate" in ended.stderr


def test_without_typer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "attncap.commands", raising=False)
    monkeypatch.delattr(attncap, "commands", raising=False)
    assert cli.main(["doctor"]) == 1
    assert 'pip install "attncap[scan]"' in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "pyarrow"])
def test_without_an_optional_package_the_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(scan_arguments(folder, "-o", str(tmp_path / "run"))) == 1
    said = capsys.readouterr().err
    assert package in said
    assert 'pip install "attncap[scan]"' in said


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = progress_for(stream)
    assert isinstance(progress, LineProgress)
    monkeypatch.setattr("attncap.progress._SECONDS_BETWEEN_LINES", 0.0)
    progress.start(total=10, done=4)
    progress.advance(2, 50)
    (line,) = stream.getvalue().splitlines()
    for part in ("6/10 documents", "documents/s", "tokens/s", "left"):
        assert part in line


def test_progress_is_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_for(stream) as progress:
        progress.start(total=10, done=0)
        progress.message("something to know")
        progress.advance(10, 50)
    assert "something to know" in stream.getvalue()
    assert "10/10 documents" in stream.getvalue()
