"""How the extension is built: what is compiled again, and what is said where CUDA kernels are not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from building import nvcc
from building.stale import compile_stale

NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  *) echo '#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"' >&2 ;;
esac
"""


@pytest.fixture(autouse=True)
def found_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toolkit is looked for anew, in an environment that names none."""
    for name in ("ATTNCAP_CUDA", "ATTNCAP_CUDA_ARCHS", "ATTNCAP_CUTLASS", "ATTNCAP_SANITIZE", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda _name: None)
    nvcc.toolkit.cache_clear()
    yield
    nvcc.toolkit.cache_clear()


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a compiler on PATH that says its version, and headers that are not told of yet."""
    return _toolkit(tmp_path, monkeypatch, "13.0")


def _toolkit(folder: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> Path:
    program = folder / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(NVCC.format(release=release))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (folder / "include" / "cute").mkdir(parents=True)
    (folder / "include" / "cute" / "config.hpp").touch()
    return folder


def test_without_nvcc_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert nvcc.toolkit() == "nvcc was found neither on PATH nor in CUDA_HOME when it was built"
    assert nvcc.requirements() == []


def test_without_headers_it_says_how_to_get_them(toolkit, monkeypatch):
    assert "pip install --no-deps nvidia-cutlass" in nvcc.toolkit()
    assert nvcc.requirements() == [nvcc.HEADERS_REQUIREMENT]
    nvcc.toolkit.cache_clear()
    monkeypatch.setenv("ATTNCAP_CUDA", "1")
    with pytest.raises(SystemExit, match="ATTNCAP_CUDA=1: CuTe's headers were not found"):
        nvcc.toolkit()


def test_headers_are_found_where_they_are_named(toolkit, monkeypatch):
    monkeypatch.setenv("ATTNCAP_CUTLASS", str(toolkit / "include"))
    found = nvcc.toolkit()
    assert found.name == "nvcc 13.0.88 for sm_80, sm_90a"
    assert found.link_flags()[:2] == ["-L/toolkit/lib/stubs", "-L/toolkit/lib"]
    assert nvcc.requirements() == []
    nvcc.toolkit.cache_clear()
    monkeypatch.setenv("ATTNCAP_CUTLASS", str(toolkit / "bin"))
    with pytest.raises(SystemExit, match="ATTNCAP_CUTLASS: expected a folder with cute/ and cutlass/"):
        nvcc.toolkit()


def test_headers_are_found_in_their_package(toolkit, monkeypatch):
    package = toolkit / "cutlass_library"
    (package / "source").mkdir(parents=True)
    (toolkit / "include").rename(package / "source" / "include")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(toolkit))
    monkeypatch.delenv("ATTNCAP_CUTLASS", raising=False)
    sys.modules.pop("cutlass_library", None)
    assert nvcc.find_headers() == package / "source" / "include"


def test_an_old_compiler_is_not_taken(tmp_path, monkeypatch):
    _toolkit(tmp_path, monkeypatch, "12.2")
    assert nvcc.toolkit() == "it takes nvcc 12.5 or newer, and it was built beside nvcc 12.2.88"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("ATTNCAP_CUDA", "0", "ATTNCAP_CUDA=0"), ("ATTNCAP_SANITIZE", "address", "ATTNCAP_SANITIZE")],
)
def test_it_is_left_out_on_request(toolkit, monkeypatch, name, value, why):
    monkeypatch.setenv(name, value)
    assert why in nvcc.toolkit()
    assert nvcc.requirements() == []


def test_a_wish_without_meaning_is_refused(monkeypatch):
    monkeypatch.setenv("ATTNCAP_CUDA", "yes")
    with pytest.raises(SystemExit, match="ATTNCAP_CUDA: expected 0 or 1, got 'yes'"):
        nvcc.toolkit()


def test_the_forward_is_compiled_for_hopper_alone(toolkit, monkeypatch):
    monkeypatch.setenv("ATTNCAP_CUTLASS", str(toolkit / "include"))
    found = nvcc.toolkit()
    forward, received = (
        " ".join(found.command(f"csrc/cuda/{name}.cu", "x.o", [])) for name in ("forward_a", "received")
    )
    assert "sm_90a" in forward
    assert "sm_80" not in forward
    assert "sm_80" in received


class TestStale:
    """What `compile_stale` compiles; `run` copies the source and lists what it was made of, as a compiler does."""

    @pytest.fixture(autouse=True)
    def files(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.source, self.header, self.target = (tmp_path / name for name in ("a b.cpp", "a.h", "a.o"))
        self.runs = 0
        for file in (self.source, self.header):
            file.touch()
            os.utime(file, (1000, 1000))

    def run(self, command: list[str]) -> None:
        self.runs += 1
        self.target.write_bytes(b"code")
        names = f"{self.target}: {self.source} \\\n {self.header}\n".replace("a b", "a\\ b")
        Path(command[command.index("-MF") + 1]).write_text(names)

    def compiled(self, *options: str) -> bool:
        before = self.runs
        compile_stale(self.target, ["c++", *options], self.run)
        return self.runs > before

    def test_what_is_up_to_date_is_not_compiled(self):
        assert self.compiled()
        assert not self.compiled()

    def test_other_options_compile_it(self):
        assert self.compiled()
        assert self.compiled("-O3")
        assert not self.compiled("-O3")

    @pytest.mark.parametrize("name", ["source", "header"])
    def test_a_newer_file_compiles_it(self, name):
        assert self.compiled()
        os.utime(getattr(self, name))
        later = self.target.stat().st_mtime + 5
        os.utime(getattr(self, name), (later, later))
        assert self.compiled()

    def test_a_file_that_has_gone_compiles_it(self):
        assert self.compiled()
        self.header.unlink()
        assert self.compiled()

    def test_a_file_that_changes_meanwhile_compiles_it_again(self):
        self.compiled()
        plain = self.run

        def slow(command: list[str]) -> None:
            meanwhile = time.time() + 0.1
            os.utime(self.header, (meanwhile, meanwhile))
            plain(command)

        compile_stale(self.target, ["c++", "-O3"], slow)
        assert self.compiled("-O3")

    def test_what_failed_is_compiled_again(self):
        self.compiled()

        def fails(_command: list[str]) -> None:
            raise OSError("no compiler")

        with pytest.raises(OSError, match="no compiler"):
            compile_stale(self.target, ["c++", "-O3"], fails)
        assert self.compiled("-O3")
