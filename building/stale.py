"""Compiles what is older than the files it was made of, by the list that the compiler itself makes of them."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def compile_stale(target: Path, command: Sequence[str], run: Callable[[list[str]], object]) -> None:
    """Make `target` with run(command, options for the list), unless this command made it of the files as they are."""
    made_by, listed = Path(f"{target}.command"), Path(f"{target}.d")
    text = shlex.join(command)
    if made_by.exists() and made_by.read_text() == text and _is_newer(target, listed):
        return
    made_by.unlink(missing_ok=True)
    began = time.time()
    run([*command, "-MD", "-MF", str(listed)])
    os.utime(target, (began, began))  # a file that changed meanwhile is newer
    made_by.write_text(text)


def _is_newer(target: Path, listed: Path) -> bool:
    if not target.exists() or not listed.exists():
        return False
    _, _, names = listed.read_text().replace("\\\n", " ").partition(": ")
    made = target.stat().st_mtime
    sources = map(Path, shlex.split(names))
    return all(source.exists() and source.stat().st_mtime <= made for source in sources)
