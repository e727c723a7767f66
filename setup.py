"""Build of the C++ and CUDA extension; the metadata stands in pyproject.toml.

Environment, besides what building/nvcc.py reads for CUDA:
    ATTNCAP_BUILD_JOBS  files compiled at once (2).
    ATTNCAP_SANITIZE    sanitizers to compile with, as in -fsanitize= (address,undefined).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, has_flag
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from building import nvcc  # noqa: E402
from building.stale import compile_stale  # noqa: E402

# One translation unit per instruction set, chosen at run time: a source whose name ends with the key is
# compiled with these flags besides the common ones. Never -march=native (the build must run on other
# machines) nor -ffast-math (statistics of -inf and NaN rows must hold).
# Of debugging what names lines alone: Python's own -g takes a third more time.
COMMON_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-g1")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
FLAGS_BY_SUFFIX = {
    "_avx2": AVX2_FLAGS,
    "_avx512": AVX512_FLAGS,
    "_avx512bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "_amx": (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
INSTRUCTION_FLAGS = {flag for flags in FLAGS_BY_SUFFIX.values() for flag in flags}
# Sums that must have the bits of torch's operators: a multiplication and an addition stay two.
EXACT_SOURCES = ("row_sums",)
EXACT_FLAGS = ("-ffp-contract=off",)
MODULE, CUDA_BINDINGS = "csrc/bindings/module.cpp", "csrc/bindings/cuda.cpp"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

NO_COMPILER = """
attncap's kernels need a C++17 compiler with OpenMP (g++ 9 or newer), and compiling them failed:
    {error}
Install one (Debian, Ubuntu: apt-get install g++), or name it in CXX, and install attncap again.
With ATTNCAP_CUDA=0 the kernels for GPUs, which nvcc compiles, are left out.
"""


def flags_for(source: str) -> list[str]:
    """Flags a source gets besides the common ones; off x86 none for an instruction set: those compile to nothing."""
    stem = Path(source).stem
    if stem in EXACT_SOURCES:
        return list(EXACT_FLAGS)
    suffixes = [suffix for suffix in FLAGS_BY_SUFFIX if stem.endswith(suffix)]
    return list(FLAGS_BY_SUFFIX[max(suffixes, key=len)]) if suffixes and IS_X86 else []


def order_of(source: str) -> tuple[list[str], bool]:
    """Places a source among those to compile and link.

    Templates of the standard library may be compiled in several files; the linker keeps the first, which must be one
    that runs on every processor. Of these CUDA's take the longest and come first.
    """
    return flags_for(source), not source.endswith(".cu")


def sanitizer_flags() -> list[str]:
    """Flags of a build that looks for errors in memory and undefined behaviour (`make sanitize`)."""
    sanitizers = os.environ.get("ATTNCAP_SANITIZE", "")
    # Python's own -fwrapv would hide overflows.
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-fno-wrapv", "-O1"]
    return flags if sanitizers else []


def source_hash(*patterns: str, also: str = "") -> str:
    """Names the kernels' sources: results are only compared or continued between equal ones."""
    digest = hashlib.sha256()
    for source in relative(*patterns):
        if (ROOT / source).is_file():
            digest.update(source.encode() + b"\0" + (ROOT / source).read_bytes() + b"\0")
    digest.update(also.encode())
    return digest.hexdigest()[:16]


def defines_for(source: str) -> list[str]:
    """What the module says of its own build. Other sources know nothing of it, or each would be compiled anew."""
    if source != MODULE:
        return []
    toolkit = nvcc.toolkit()
    texts = {"SOURCE_HASH": source_hash("csrc/**/*")}
    if isinstance(toolkit, str):
        texts["CUDA_LACKS"] = toolkit
    else:
        texts["CUDA_COMPILER"] = toolkit.name
        texts["CUDA_HASH"] = source_hash("csrc/cuda/*", "csrc/statistics/*", "csrc/problem.h", also=toolkit.version)
    return [f"-DATTNCAP_{name}={json.dumps(text)}" for name, text in texts.items()]


def relative(*patterns: str) -> list[str]:
    """Files matching the patterns, relative to the project as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


class BuildExtension(build_ext):
    """build_ext with flags per source, nvcc for CUDA, nothing compiled twice, a message where there is no compiler."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # every source is looked at; what is up to date is not compiled
        # An editable install would put objects where the next one does not find them.
        if self.inplace or self.editable_mode:
            self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile
        self.compiler.src_extensions.append(".cu")
        # Asked before anything is compiled: asking changes the folder that all threads are in.
        known = {flag for flag in INSTRUCTION_FLAGS if IS_X86 and has_flag(self.compiler, flag)}

        def known_flags(src: str) -> list[str]:
            """None for an instruction set that an older compiler does not know: the source compiles to nothing then."""
            flags = flags_for(src)
            return flags if all(flag in known for flag in flags if flag.startswith("-m")) else []

        def compile_with_flags(
            obj: str, src: str, ext: str, cc_args: list[str], extra_postargs: list[str], pp_opts: list[str]
        ) -> None:
            def run(command: list[str]) -> None:
                options = command[len(fixed) :]
                compile_one(obj, src, ext, cc_args, [*extra_postargs, *options], pp_opts)

            if ext == ".cu":
                toolkit = nvcc.toolkit()
                assert isinstance(toolkit, nvcc.Toolkit)
                compile_stale(Path(obj), toolkit.command(src, obj, pp_opts), lambda command: run_nvcc(command, obj))
                return
            compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
            fixed = [*compiler, *cc_args, src, *extra_postargs]
            compile_stale(Path(obj), [*fixed, *known_flags(src), *defines_for(src)], run)

        compile_all = self.compiler.compile

        def compile_in_order(sources: list[str], *args: Any, **kwargs: Any) -> Any:
            return compile_all(sorted(sources, key=order_of), *args, **kwargs)

        self.compiler._compile = compile_with_flags
        self.compiler.compile = compile_in_order
        try:
            super().build_extensions()
        except (CCompilerError, OSError) as error:
            raise SystemExit(NO_COMPILER.format(error=error)) from error


def run_nvcc(command: list[str], obj: str) -> None:
    """Compile; what ptxas reports of every kernel is kept beside the object."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    Path(f"{obj}.report").write_text(report)
    if done.returncode != 0:
        raise CCompilerError(f"{' '.join(command)}\n{report}")


def extension() -> Any:
    """attncap._C: raw pointers in, raw pointers out; it neither links nor includes torch."""
    toolkit = nvcc.toolkit()
    has_cuda = isinstance(toolkit, nvcc.Toolkit)
    sources = relative("csrc/bindings/*.cpp", "csrc/cpu/*.cpp")
    sources = sources + relative("csrc/cuda/*.cu") if has_cuda else [one for one in sources if one != CUDA_BINDINGS]
    return Pybind11Extension(
        "attncap._C",
        sources=sources,
        include_dirs=["csrc"],
        extra_compile_args=[*COMMON_FLAGS, *sanitizer_flags()],
        extra_link_args=["-fopenmp", *sanitizer_flags(), *(toolkit.link_flags() if has_cuda else [])],
    )


# kernels/ is a source root, not a package: a top-level package named `kernels` breaks Transformers.
PACKAGES = find_packages(include=["attncap", "attncap.*"])
PACKAGE_DIR = {"attncap": "attncap"}
if (ROOT / "kernels" / "attncap_kernels").is_dir():
    PACKAGES += find_packages("kernels", include=["attncap_kernels", "attncap_kernels.*"])
    PACKAGE_DIR["attncap_kernels"] = "kernels/attncap_kernels"

if __name__ == "__main__":
    ParallelCompile("ATTNCAP_BUILD_JOBS", default=2).install()
    setup(
        packages=PACKAGES,
        py_modules=["attncap_command"],
        package_dir=PACKAGE_DIR,
        package_data={"attncap": ["py.typed", "qualified.json"], "attncap.report": ["templates/*"]},
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension},
    )
