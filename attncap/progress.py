"""How far a long job is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts documents (or what else `start` is told) and tokens and shows nothing; the others show it.

    `advance` may be called from several threads.

    Attributes:
        interrupted: whether the process was told to end; the next `advance` raises KeyboardInterrupt then. What a
            signal's handler raises is lost where it happens to run inside a callback of the interpreter's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.interrupted = False
        self.noun = "document"
        self.total = 0
        self.documents = 0  # done in all
        self.own_documents = 0  # done since the start
        self.tokens = 0
        self._begun = time.monotonic()
        self._documents_before = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""

    def message(self, text: str) -> None:
        """Something the user should know."""

    def start(self, total: int, done: int, noun: str = "document") -> None:
        """Begin to count, with `done` of `total` documents there already; `noun` where it is not documents."""
        self.noun = noun
        self.total, self.documents, self._documents_before = total, done, done
        self._begun = time.monotonic()

    def advance(self, documents: int, tokens: int) -> None:
        """So many more are done."""
        with self._lock:
            self.documents += documents
            self.own_documents += documents
            self.tokens += tokens
            self._show()
        if self.interrupted:
            raise KeyboardInterrupt

    def reached(self, documents: int) -> None:
        """So many documents are done in all, those of other workers included."""
        with self._lock:
            self.documents = max(self.documents, documents)

    def _show(self) -> None:
        pass

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begun

    def rates(self) -> tuple[float, float]:
        """(documents, tokens) per second since the start."""
        seconds = max(self.seconds(), 1e-9)
        return (self.documents - self._documents_before) / seconds, self.tokens / seconds

    def seconds_left(self) -> float | None:
        """At the rate so far; None before there is one."""
        rate, _ = self.rates()
        return (self.total - self.documents) / rate if rate > 0 else None

    def line(self) -> str:
        """Where it stands, in one line."""
        documents, tokens = self.rates()
        left = self.seconds_left()
        return (
            f"{self.documents}/{plural(self.total, self.noun)}, {documents:.1f} {self.noun}s/s, "
            f"{tokens:,.0f} tokens/s, {clock(left) if left is not None else '?'} left"
        )


class LineProgress(Progress):
    """A line every ten seconds.

    Args:
        head: what every line begins with.
    """

    def __init__(self, stream: TextIO, head: str = "") -> None:
        super().__init__()
        self._stream = stream
        self._head = head
        self._shown = time.monotonic()

    def message(self, text: str) -> None:
        """See `Progress.message`."""
        self._stream.write(f"{self._head}{text}\n")  # in one piece: other workers write there too
        self._stream.flush()

    def _show(self) -> None:
        if time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            self.message(self.line())


class BarProgress(Progress):
    """A bar with the rates and the time left."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__()
        columns = (TextColumn("[progress.description]{task.description}"), BarColumn())
        self._bar = Bar(*columns, TextColumn("{task.fields[line]}"), console=console, transient=True)
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """See `Progress.message`."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, total: int, done: int, noun: str = "document") -> None:
        """See `Progress.start`."""
        super().start(total, done, noun)
        self._task = self._bar.add_task(f"{noun}s", total=total, completed=done, line=f"{done}/{plural(total, noun)}")

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.documents, line=self.line())


def progress_for(stream: TextIO | None = None, worker: str = "") -> Progress:
    """A bar where `stream` (standard error when None) is a terminal and rich is installed; lines otherwise.

    Args:
        worker: name of this worker where there are several, whose lines begin with it.
    """
    stream = sys.stderr if stream is None else stream
    if worker:
        return LineProgress(stream, f"[{worker}] ")
    if not stream.isatty():
        return LineProgress(stream)
    try:
        from rich.console import Console
    except ImportError:
        return LineProgress(stream)
    return BarProgress(Console(file=stream))


def plural(number: int, noun: str) -> str:
    """1 document, 2 documents, 1,234 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clock(seconds: float) -> str:
    """1:05, or 2:01:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def signals_interrupt(progress: Progress) -> Iterator[None]:
    """What launchers and batch systems send to end a process ends the step in progress first, as Ctrl-C does."""

    def interrupt(number: int, _: object) -> None:
        progress.interrupted = True
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    def unraisable(unraised: sys.UnraisableHookArgs) -> None:
        # Raised inside a finaliser it is lost; the next step ends the scan then, and there is nothing to be told.
        if not (progress.interrupted and isinstance(unraised.exc_value, KeyboardInterrupt)):
            hook(unraised)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if number == signal.SIGTERM or handler is signal.default_int_handler:  # in the background it is ignored
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
