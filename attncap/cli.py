"""The command `attncap`: errors become one line on standard error and an exit code.

The exit codes stand in the help of the command: `attncap.commands.EXIT_CODES`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from attncap.extras import refuse_interrupt
from attncap.types import AttncapError

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the arguments of the process, or with these; gives the exit code."""
    try:
        from attncap import commands
    except ImportError as error:
        if _caused_by_interrupt(error):
            _say("interrupted")
            return _INTERRUPTED
        _say(f'the command line cannot be used here ({error}): pip install "attncap[scan]"')
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A name that is no UTF-8, or a terminal that knows few letters, is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return commands.run(sys.argv[1:] if arguments is None else list(arguments))
    except AttncapError as error:
        _say(str(error))
        return 2 if isinstance(error, (ValueError, TypeError)) else 1
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _say(str(error))
        return 1


def _caused_by_interrupt(error: ImportError) -> bool:
    try:
        refuse_interrupt(error)
    except KeyboardInterrupt:
        return True
    return False


def _say(message: str) -> None:
    print(f"attncap: {message}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
