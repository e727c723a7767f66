"""What `import attncap` brings along, which layer imports which, and what is said where an extra is missing."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import attncap

PACKAGE = Path(attncap.__file__).parent
PROJECT = PACKAGE.parent

HEAVY = (
    "transformers",
    "pyarrow",
    "typer",
    "rich",
    "matplotlib",
    "jinja2",
    "triton",
    "attncap_kernels",
    "sentence_transformers",
)

# From the bottom up; a module may import its own layer and those below it, when it is imported or later.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "extras", "claims", "parts", "colours", "display", "device_tables", "threads", "memory"),
    ("validation",),
    ("reference", "gradients", "native", "cpu", "cuda", "qualification", "annotations", "layers", "_C"),
    ("dispatch", "ops", "autograd"),
    ("heads_call", "api", "sdpa", "mha", "nn"),
    ("accumulate", "accumulate_io", "histogram", "moments", "row_sums", "row_sums_cpu"),
    ("tags", "capture", "kept_stats", "attention_only", "adapters"),
    ("monitor",),
    ("store", "workers", "team", "corpus", "corpus_readers", "models", "progress"),
    ("report", "scan", "plan", "shards", "encode", "tables", "options", "ledger", "analysis", "doctor"),
    ("commands", "arguments"),
    ("cli", "__main__"),
)


# Forks for each piece of code, so that a fresh interpreter costs the time of its own imports and not that of torch's.
_FORKING = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        code = 1
        try:
            exec(json.loads(line), {})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


@pytest.fixture(scope="module")
def run_fresh() -> Iterator[Callable[[str], str]]:
    """What code says in an interpreter that has imported torch alone; a failure shows its traceback."""
    command = [sys.executable, "-c", _FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None

        def run(code: str) -> str:
            print(json.dumps(code), file=forking.stdin, flush=True)
            exit_code, said = json.loads(forking.stdout.readline())
            assert exit_code == 0, said
            return said

        yield run
        forking.stdin.close()


def test_importing_attncap_brings_nothing_optional_along(run_fresh):
    # torch itself may look for triton, so what it loads is taken off first.
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import attncap; attncap.capture; new = set(sys.modules) - before\n"
        f"print(*[name for name in new if name.partition('.')[0] in {HEAVY!r}])"
    )
    assert run_fresh(code).split() == []


def test_importing_attncap_loads_no_kernels(run_fresh):
    loaded = run_fresh("import sys, attncap; print(*[m for m in sys.modules if m.startswith('attncap')])").split()
    assert "attncap" in loaded
    assert not {"attncap._C", "attncap.cpu", "attncap.ops", "attncap.cli", "attncap.scan"} & set(loaded)


def test_every_public_name_is_there():
    missing = [name for name in attncap.__all__ if not hasattr(attncap, name)]
    assert missing == []


def module_name(path: Path) -> str:
    """Name of a file's module below attncap: "report.page", "" for attncap itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    """Modules below attncap that a file imports anywhere but for types; attncap itself counts as the public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("attncap.") for name in found if name.startswith("attncap.")}


def layer_of(module: str) -> int | None:
    top = module.partition(".")[0]
    return next((place for place, names in enumerate(LAYERS) if top in names), None)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards(path):
    own = layer_of(module_name(path))
    assert own is not None, f"{module_name(path)} has no place in LAYERS: give it one"
    public = {name for name in imports_of(path) if name in attncap.__all__ or name == "__version__"}
    upwards = {name for name in imports_of(path) - public if (layer_of(name) or 0) > own}
    assert upwards == set()


@pytest.mark.parametrize("path", sorted(PROJECT.glob("kernels/attncap_kernels/*.py")), ids=lambda path: path.stem)
def test_kernels_know_of_types_arguments_and_tables_alone(path):
    assert {name.partition(".")[0] for name in imports_of(path)} <= {"types", "validation", "device_tables"}


def test_types_import_no_accelerator():
    imported = (PACKAGE / "types.py").read_text(encoding="utf-8")
    for name in ("torch.cuda", "triton", "attncap._C"):
        assert f"import {name}" not in imported


@pytest.mark.parametrize(
    ("blocked", "code", "extra"),
    [
        ("pyarrow", "from attncap.store import heads_bytes; heads_bytes([])", "scan"),
        ("jinja2", "from attncap.report import write_report; write_report('run', 'report.html')", "report"),
        ("transformers", "import attncap.monitor.trainer_callback", "large"),
        ("matplotlib", "from attncap.report import write_figures; write_figures('run', 'figures')", "report"),
        ("rich", "from attncap.report import print_highlights; print_highlights('run')", "report"),
    ],
)
def test_a_missing_extra_is_named(run_fresh, blocked, code, extra):
    fresh = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        f"from attncap import MissingExtraError\n"
        f"try:\n    {code}\nexcept MissingExtraError as error:\n    print(error)"
    )
    said = run_fresh(fresh)
    assert blocked in said
    assert f"attncap[{extra}]" in said


@pytest.mark.parametrize("after", ["raise ImportError('torch')", "pass"])
def test_an_interrupt_during_the_imports_is_one_line(tmp_path, after):
    """A package in place of attncap that is interrupted while it is imported, and makes what it likes of that."""
    (tmp_path / "attncap").mkdir()
    source = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\n"
    (tmp_path / "attncap" / "__init__.py").write_text(source + f"except BaseException:\n    {after}\n")
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"sys.path.insert(0, {str(tmp_path)!r});"
        f"runpy.run_path({str(PROJECT / 'attncap_command.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (130, "attncap: interrupted\n")


def test_the_console_script_is_built_in():
    import attncap_command

    assert callable(attncap_command.main)
    assert 'attncap = "attncap_command:main"' in (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'py_modules=["attncap_command"]' in (PROJECT / "setup.py").read_text(encoding="utf-8")


def test_kernels_is_no_package():
    assert not (PROJECT / "kernels" / "__init__.py").exists()


def test_implementations_do_not_import_each_other():
    families = ("reference", "cpu", "cuda")
    for family in families:
        assert not set(families) & imports_of(PACKAGE / f"{family}.py")


@pytest.fixture
def build_script():
    """setup.py as a module; reading it builds nothing."""
    for package in ("pybind11", "setuptools"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("attncap_setup", PROJECT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_wheel_holds_the_packages_and_no_tests(build_script):
    packages = set(build_script.PACKAGES)
    here = {".".join(path.parent.relative_to(PROJECT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert here | {"attncap_kernels"} <= packages
    assert not {name.partition(".")[0] for name in packages} & {"tests", "benchmarks", "kernels", "scripts"}


@pytest.mark.parametrize(
    ("source", "wanted", "unwanted"),
    [
        ("csrc/cpu/attention_avx512.cpp", "-mavx512f", "-mavx512bf16"),
        ("csrc/cpu/attention_avx512bf16.cpp", "-mavx512bf16", "-mamx-bf16"),
        ("csrc/cpu/attention_amx.cpp", "-mamx-bf16", "-mavx2"),
        ("csrc/cpu/attention_avx2.cpp", "-mavx2", "-mavx512f"),
    ],
)
def test_each_instruction_set_has_its_flags(build_script, monkeypatch, source, wanted, unwanted):
    monkeypatch.setattr(build_script, "IS_X86", True)
    assert wanted in build_script.flags_for(source)
    assert unwanted not in build_script.flags_for(source)
    monkeypatch.setattr(build_script, "IS_X86", False)
    assert build_script.flags_for(source) == []


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_without_its_flags_an_instruction_set_compiles_to_nothing(isa):
    source = PROJECT / "csrc" / "cpu" / f"attention_{isa}.cpp"
    command = ["g++", "-E", "-P", "-std=c++17", f"-I{PROJECT / 'csrc'}", str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_portable_source_has_no_flags_of_its_own(build_script):
    assert build_script.flags_for("csrc/cpu/attention_portable.cpp") == []
    assert "-march=native" not in build_script.COMMON_FLAGS
    assert "-ffast-math" not in build_script.COMMON_FLAGS
