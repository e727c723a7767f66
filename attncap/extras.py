"""Optional packages: imported when they are first needed, and missed with a message that helps."""

from __future__ import annotations

import importlib
from typing import Any

from attncap.types import MissingExtraError


def require(module: str, extra: str) -> Any:
    """The module `module`, which the extra `extra` of attncap brings.

    Raises:
        MissingExtraError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        refuse_interrupt(error)
        package = module.partition(".")[0]
        raise MissingExtraError(
            f'{package} is needed for this and cannot be imported ({error}): pip install "attncap[{extra}]"'
        ) from error


def refuse_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt where that is what `error` was made from: libraries turn it into errors of import."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt) or "KeyboardInterrupt" in str(seen):
            raise KeyboardInterrupt from error
        seen = seen.__cause__ or seen.__context__
