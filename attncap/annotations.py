"""What a user says about the tokens of a batch: tags and features, evaluated and checked.

T tags   F feature columns   B sequences   N tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncap.types import STATISTIC_NAMES

Batch = Mapping[str, Any]
TagFunction = Callable[[Batch], "tuple[Tensor, Tensor]"]
FeatureFunction = Callable[[Batch], Tensor]

_RESERVED = frozenset((*STATISTIC_NAMES, "max_prob", "topk_mass", "relative_entropy"))


@dataclass(frozen=True)
class Annotations:
    """Tags and features of one batch, in the form `attncap.attention` takes them."""

    tag_names: tuple[str, ...] = ()
    query_tags: Tensor | None = None  # (T, B, N) int64
    key_tags: Tensor | None = None  # (T, B, N) int64
    feature_names: tuple[str, ...] = ()  # one per column
    key_features: Tensor | None = None  # (B, N, F) floating


class Annotator:
    """The functions behind `tags` and `features` of a capture.

    Raises:
        TypeError: not a mapping of names to functions.
        ValueError: a name is empty, is that of a statistic, or names both a tag and a feature.
    """

    def __init__(
        self, tags: Mapping[str, TagFunction] | None = None, features: Mapping[str, FeatureFunction] | None = None
    ) -> None:
        self.tags = _functions("tags", tags)
        self.features = _functions("features", features)
        for name in self.tags.keys() & self.features.keys():
            raise ValueError(f"features: {name!r} is the name of a tag already")

    def __bool__(self) -> bool:
        return bool(self.tags or self.features)

    def __call__(self, batch: Batch) -> Annotations:
        """Evaluate every function on one batch.

        Raises:
            TypeError, ValueError: a function gave something else than it should; the message names it.
        """
        pairs = [_tag_pair(name, function(batch)) for name, function in self.tags.items()]
        columns = {name: _feature_columns(name, function(batch)) for name, function in self.features.items()}
        _same_shape("tags", {name: pair[0] for name, pair in zip(self.tags, pairs, strict=True)})
        _same_shape("features", {name: column[..., 0] for name, column in columns.items()})
        names = tuple(name for feature, column in columns.items() for name in _column_names(feature, column))
        for name in names:
            if name in self.tags or names.count(name) > 1:
                raise ValueError(f"features: the column {name!r} has the name of another tag or feature")
        return Annotations(
            tag_names=tuple(self.tags),
            query_tags=torch.stack([pair[0] for pair in pairs]) if pairs else None,
            key_tags=torch.stack([pair[1] for pair in pairs]) if pairs else None,
            feature_names=names,
            key_features=torch.cat(list(columns.values()), dim=-1) if columns else None,
        )


def _functions(argument: str, functions: Any) -> dict[str, Callable[[Batch], Any]]:
    if functions is None:
        return {}
    if not isinstance(functions, Mapping):
        raise TypeError(f"{argument}: expected a mapping of names to functions, got {type(functions).__name__}")
    for name, function in functions.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names that are strings, got {name!r}")
        if not name or name in _RESERVED or name.startswith("offset_mass["):
            raise ValueError(f"{argument}: {name!r} cannot be a name, it is empty or that of a statistic")
        if not callable(function):
            raise TypeError(f"{argument}[{name!r}]: expected a function of the batch, got {type(function).__name__}")
    return dict(functions)


def _tag_pair(name: str, result: Any) -> tuple[Tensor, Tensor]:
    where = f"tags[{name!r}]"
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"{where}: expected (query_tags, key_tags), got {type(result).__name__}")
    pair = []
    for side, given in zip(("query_tags", "key_tags"), result, strict=True):
        tensor = _tensor(where, given)
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{where}: expected integer {side}, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{where}: expected {side} of shape (batch, tokens), got {tuple(tensor.shape)}")
        pair.append(tensor.to(torch.int64))
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{where}: expected query_tags and key_tags of one shape, got {tuple(pair[0].shape)} and "
            f"{tuple(pair[1].shape)}"
        )
    return pair[0], pair[1]


def _tensor(where: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{where}: expected a tensor, got {type(given).__name__}") from error


def _feature_columns(name: str, result: Any) -> Tensor:
    tensor = _tensor(f"features[{name!r}]", result)
    if not tensor.is_floating_point():
        raise TypeError(f"features[{name!r}]: expected floating point numbers, got {tensor.dtype}")
    if tensor.dim() == 2:
        tensor = tensor[..., None]
    if tensor.dim() != 3 or tensor.shape[-1] == 0:
        raise ValueError(
            f"features[{name!r}]: expected shape (batch, tokens) or (batch, tokens, columns), got {tuple(tensor.shape)}"
        )
    return tensor.detach()


def _column_names(feature: str, column: Tensor) -> list[str]:
    count = column.shape[-1]
    return [feature] if count == 1 else [f"{feature}[{place}]" for place in range(count)]


def _same_shape(argument: str, tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{argument}: expected the same (batch, tokens) from all, got {shapes}")
