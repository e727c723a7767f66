"""Build of the C++ extension; the metadata stands in pyproject.toml.

Environment:
    ATTNCAP_CUDA        0 never builds CUDA kernels, 1 insists on them; by default they are built where nvcc is found.
    ATTNCAP_BUILD_JOBS  files compiled at once (2).
    ATTNCAP_SANITIZE    sanitizers to compile with, as in -fsanitize= (address,undefined).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, has_flag
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).resolve().parent

# One translation unit per instruction set, chosen at run time: a source whose name ends with the key is
# compiled with these flags besides the common ones. Never -march=native (the build must run on other
# machines) nor -ffast-math (statistics of -inf and NaN rows must hold).
COMMON_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
FLAGS_BY_SUFFIX = {
    "_avx2": AVX2_FLAGS,
    "_avx512": AVX512_FLAGS,
    "_avx512bf16": (*AVX512_FLAGS, "-mavx512bf16"),
    "_amx": (*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
# Sums that must have the bits of torch's operators: a multiplication and an addition stay two.
EXACT_SOURCES = ("row_sums",)
EXACT_FLAGS = ("-ffp-contract=off",)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

NO_COMPILER = """
attncap's CPU kernels need a C++17 compiler with OpenMP (g++ 9 or newer), and compiling them failed:
    {error}
Install one (Debian, Ubuntu: apt-get install g++), or name it in CXX, and install attncap again.
"""


def flags_for(source: str) -> list[str]:
    """Flags a source gets besides the common ones; off x86 none for an instruction set: those compile to nothing."""
    stem = Path(source).stem
    if stem in EXACT_SOURCES:
        return list(EXACT_FLAGS)
    suffixes = [suffix for suffix in FLAGS_BY_SUFFIX if stem.endswith(suffix)]
    return list(FLAGS_BY_SUFFIX[max(suffixes, key=len)]) if suffixes and IS_X86 else []


def sanitizer_flags() -> list[str]:
    """Flags of a build that looks for errors in memory and undefined behaviour (`make sanitize`)."""
    sanitizers = os.environ.get("ATTNCAP_SANITIZE", "")
    # Python's own -fwrapv would hide overflows.
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-fno-wrapv", "-O1", "-g"]
    return flags if sanitizers else []


def cuda_sources() -> list[str]:
    """CUDA sources that join the extension; `BuildExtension` compiles what is listed here."""
    wish = os.environ.get("ATTNCAP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"ATTNCAP_CUDA: expected 0 or 1, got {wish!r}")
    sources = relative("csrc/cuda/*.cu")
    if wish == "1" and not sources:
        raise SystemExit("ATTNCAP_CUDA=1: this version of attncap has no CUDA kernels")
    if wish == "1" and shutil.which("nvcc") is None:
        raise SystemExit("ATTNCAP_CUDA=1: nvcc was not found on PATH")
    return sources if wish != "0" and shutil.which("nvcc") else []


def source_hash() -> str:
    """Names the kernels' sources: results are only compared or continued between equal ones."""
    digest = hashlib.sha256()
    for source in relative("csrc/**/*"):
        if (ROOT / source).is_file():
            digest.update(source.encode() + b"\0" + (ROOT / source).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def relative(*patterns: str) -> list[str]:
    """Files matching the patterns, relative to the project as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


class BuildExtension(build_ext):
    """build_ext with flags per source, and a message that helps where there is no compiler."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile
        knows = functools.cache(lambda flag: bool(has_flag(self.compiler, flag)))

        def known_flags(src: str) -> list[str]:
            """None for an instruction set that an older compiler does not know: the source compiles to nothing then."""
            flags = flags_for(src)
            return flags if all(knows(flag) for flag in flags if flag.startswith("-m")) else []

        def compile_with_flags(
            obj: str, src: str, ext: str, cc_args: list[str], extra_postargs: list[str], pp_opts: list[str]
        ) -> None:
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *known_flags(src)], pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extensions()
        except (CCompilerError, OSError) as error:
            raise SystemExit(NO_COMPILER.format(error=error)) from error


def extension() -> Any:
    """attncap._C: raw pointers in, raw pointers out; it neither links nor includes torch."""
    return Pybind11Extension(
        "attncap._C",
        # Templates of the standard library may be compiled in several files; the linker keeps the first, which must
        # be one that runs on every processor.
        sources=[*sorted(relative("csrc/bindings.cpp", "csrc/cpu/*.cpp"), key=flags_for), *cuda_sources()],
        # Any of these being newer than the library builds it again.
        depends=["setup.py", *relative("csrc/**/*.h", "csrc/**/*.hpp", "csrc/**/*.inl", "csrc/**/*.cuh")],
        include_dirs=["csrc"],
        define_macros=[("ATTNCAP_SOURCE_HASH", f'"{source_hash()}"')],
        extra_compile_args=[*COMMON_FLAGS, *sanitizer_flags()],
        extra_link_args=["-fopenmp", *sanitizer_flags()],
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
