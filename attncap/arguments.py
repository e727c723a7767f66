"""What can be typed after `attncap scan`, and how text on the command line becomes values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from attncap.models import DTYPES
from attncap.plan import DEFAULT_TAGS, TAG_NAMES
from attncap.tables import KINDS
from attncap.types import AttncapError

# What is captured.

TopK = Annotated[int, typer.Option(help="Largest probabilities summed into topk_mass; 0 = off.")]
Sink = Annotated[int, typer.Option(help="sink_mass is the mass on so many first keys; 0 = off.")]
Diagonal = Annotated[str, typer.Option(help="Half width of diagonal_mass, or off.")]
Offsets = Annotated[str, typer.Option(help="Relative keys, e.g. -1,1 for previous and next; or off.")]
Entropy = Annotated[bool, typer.Option(help="Entropy of each row, nats.")]
Max = Annotated[bool, typer.Option("--max/--no-max", help="max_logit and max_prob.")]
Distance = Annotated[bool, typer.Option(help="Mean distance to the keys attended to, tokens.")]
Collision = Annotated[bool, typer.Option(help="Sum of squared probabilities.")]
Received = Annotated[bool, typer.Option(help="Mass that each key receives.")]
Tags = Annotated[
    str | None, typer.Option(help=f"Out of {', '.join(TAG_NAMES)}; or off.", show_default=",".join(DEFAULT_TAGS))
]
Keep = Annotated[
    str, typer.Option(help=f"Tables of single documents to write: {' or '.join(KINDS)} (with --limit); or off.")
]

# What is read.

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="CORPUS...",
        help=".txt, .jsonl, .csv, .tsv, .parquet files, images, folders, globs, datasets or builtin:docstrings.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Read no more than this many documents.")]
TextColumn = Annotated[str, typer.Option(help="Column or key that holds the text, token ids or image.")]
TxtDocuments = Annotated[str, typer.Option(help="A document of a .txt file is a paragraph or a file.")]
OnError = Annotated[str, typer.Option(help="At a document that cannot be read: skip and count it, or stop.")]
GroupBy = Annotated[
    str | None,
    typer.Option(help="Column that names each document's group; folder for files without columns."),
]

# How it is computed.

MaxTokens = Annotated[int | None, typer.Option(help="Cut documents there; default: where the model must.")]
BatchTokens = Annotated[int | None, typer.Option(help="Tokens computed at once; default: by device.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE for Transformers' from_pretrained, e.g. device_map=auto; JSON or a word."),
]
ShardCharacters = Annotated[
    int | None, typer.Option(help="Length of a shard, which is what a kill costs; default: by device.")
]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]
TensorParallel = Annotated[
    int, typer.Option(help="Processes of torchrun that run the model together, each with its share of the heads.")
]
Workers = Annotated[int | None, typer.Option(help="Batches computed side by side; default: the CPU's cores.")]


class UsageError(AttncapError, ValueError):
    """An argument of the command line is not what it should be."""


@contextmanager
def errors_name_options() -> Iterator[None]:
    """A TypeError or ValueError inside that begins with an argument's name leaves as a UsageError with the option's."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(_as_typed(str(error))) from error


def _as_typed(message: str) -> str:
    """A message that begins with the name of an argument, with that of the option: "txt_documents: ..."."""
    name, colon, rest = message.partition(":")
    name = name.removeprefix("StatSpec.")
    return f"--{name.replace('_', '-')}:{rest}" if colon and name.isidentifier() else message


def listed(text: str) -> list[str]:
    """What stands between commas; nothing for "off"."""
    return [] if text == "off" else [part.strip() for part in text.split(",") if part.strip()]


def names(option: str, text: str) -> list[str]:
    """One or more of them between commas."""
    found = listed(text)
    if not found:
        raise UsageError(f"{option}: expected names with commas between, got {text!r}")
    return found


def groups(text: str) -> tuple[str, str]:
    """X of both runs, or X of the first and Y of the second."""
    found = [part.strip() for part in text.split(",")]
    if len(found) > 2 or not all(found):
        raise UsageError(f"--group: expected X, or X,Y for group X of A and group Y of B, got {text!r}")
    return found[0], found[-1]


def half_width(text: str) -> int | None:
    """Of the diagonal; None for "off"."""
    return None if text == "off" else _integer("--diagonal", text)


def relative_keys(text: str) -> tuple[int, ...]:
    """Each number once."""
    found = tuple(_integer("--offsets", offset) for offset in listed(text))
    if len(set(found)) < len(found):
        raise UsageError(f"--offsets: expected each number once, got {text}")
    return found


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{option}: expected whole numbers or off, got {text!r}") from None


def model_options(texts: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE each; what is not JSON is a word."""
    return dict(_model_option(text) for text in texts or ())


def _model_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--model-option: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
