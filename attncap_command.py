"""What the console script `attncap` runs: the interrupt is answered in one line even while torch is being imported.

Outside the package, for importing anything of `attncap` imports torch, which takes a second or two.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


def _stop(_number: int, _frame: FrameType | None) -> None:
    # An exception would rise in the middle of an import, where libraries swallow it or make something else of it.
    os.write(2, b"attncap: interrupted\n")
    os._exit(130)


def main() -> int:
    """Run the command line; gives the exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell has it ignored
    if ours:
        signal.signal(signal.SIGINT, _stop)
    from attncap import cli

    with contextlib.suppress(ImportError):  # `main` says what is missing
        import attncap.commands  # noqa: F401
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
