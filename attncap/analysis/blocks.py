"""The attention modules of a model as their weights see them: where each head's query, key, value and output lie.

E embedding   H query heads   G key/value heads   D, V head dims of query and value   B sequences   N tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncap.adapters import adapter_for, named_modules
from attncap.types import UnsupportedError

Edit = Callable[[Tensor], Tensor]
"""(..., H, V) what each head gives to the output projection -> the same shape."""

# Names of the projections of query, key and value where they are modules of their own, and of the output.
_SEPARATE = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
    (("query", "key", "value"), ("dense",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    (("q", "k", "v"), ("o",)),
)

# Class, fused projection, output projection, and whether it goes head by head (q k v of head 0, q k v of head 1, ...)
# instead of all queries, all keys, all values. Names of projections do not tell that, so classes are named.
_FUSED = (
    ("GPT2Attention", "c_attn", "c_proj", False),
    ("ModernBertAttention", "Wqkv", "Wo", False),
    ("Phi3Attention", "qkv_proj", "o_proj", False),
    ("GPTNeoXAttention", "query_key_value", "dense", True),
)

_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class Projection:
    """Columns `features` of what a module of weights (E, all features) gives."""

    owner: nn.Module
    features: Tensor  # int64
    parameters: tuple[str, str] = ("weight", "bias")

    @property
    def weight(self) -> Tensor:
        """(E, features) float64, detached."""
        return _matrix(self.owner, self.parameters[0])[:, self.features.to(_device_of(self.owner))]


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """One attention module: its weights head by head, and hooks on what its heads read and give.

    Attributes:
        name: that of the module, as in `capture`.
        heads, key_heads: H and G. head_dim, value_dim: D and V.
    """

    name: str
    module: nn.Module
    query: Projection
    key: Projection
    value: Projection
    out: nn.Module
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int

    @property
    def query_weight(self) -> Tensor:
        """W_Q (H, E, D) float64: q = x W_Q."""
        return _by_head(self.query.weight, self.head_dim).transpose(0, 1)

    @property
    def key_weight(self) -> Tensor:
        """W_K (H, E, D) float64; query heads of one group have the same."""
        return self._of_query_heads(self.key.weight, self.head_dim)

    @property
    def value_weight(self) -> Tensor:
        """W_V (H, E, V) float64; query heads of one group have the same."""
        return self._of_query_heads(self.value.weight, self.value_dim)

    @property
    def out_weight(self) -> Tensor:
        """W_O (H, V, E) float64: the module gives the sum over heads of out_h W_O, and a bias."""
        return _matrix(self.out, "weight").view(self.heads, self.value_dim, -1)

    def _of_query_heads(self, weight: Tensor, width: int) -> Tensor:
        by_group = _by_head(weight, width).transpose(0, 1)
        return by_group.repeat_interleave(self.heads // self.key_heads, 0)

    def edit_heads(self, undo: ExitStack, edit: Edit) -> None:
        """Until `undo` closes, put `edit` between the heads and the output projection; batches come first."""
        if isinstance(self.module, nn.MultiheadAttention):
            _Fused(self.module, undo).edit(lambda heads: edit(self._split(heads)).flatten(-2))
            return
        undo.callback(
            self.out.register_forward_pre_hook(
                lambda _, args: (edit(self._split(args[0])).flatten(-2), *args[1:])
            ).remove
        )

    def _split(self, heads: Tensor) -> Tensor:
        return _by_head(heads, self.value_dim)

    def zero_queries(self, undo: ExitStack, heads: Sequence[int]) -> None:
        """Until `undo` closes, the queries of these heads are 0: all their scores are, but for what is added to them.

        Raises:
            UnsupportedError: a query of 0 does not give equal scores in this module.
        """
        _refuse_other_scores(self)
        dropped = torch.zeros(self.heads, dtype=torch.bool)
        dropped[list(heads)] = True
        features = self.query.features[dropped.repeat_interleave(self.head_dim)]
        if isinstance(self.module, nn.MultiheadAttention):
            _Fused(self.module, undo).zero(self.query, features)
            return
        undo.callback(
            self.query.owner.register_forward_hook(
                lambda _, args, out: out.index_fill(-1, features.to(out.device), 0)
            ).remove
        )


def attention_blocks(model: nn.Module) -> tuple[AttentionBlock, ...]:
    """The attention modules of a model in order of definition, which is that of `capture` in most models.

    Known are query, key and value projections of their own, as BERT, Llama, ViT, T5, BART, DistilBERT and most others
    have them (nn.Linear, grouped heads included), the fused ones of GPT-2, ModernBERT, Phi-3, GPT-NeoX and timm, and
    `nn.MultiheadAttention`.

    Raises:
        TypeError: not a torch module.
        UnsupportedError: an attention module whose layout is not known, by name; or none was found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = dict(named_modules(model))
    blocks = [block for name, module in modules.items() if (block := _block(name, module, modules)) is not None]
    known = {block.name for block in blocks}
    unknown = [name for name in adapter_for(model).known_layers or () if name not in known]
    if unknown or not blocks:
        what = f"{unknown[0]} ({type(modules[unknown[0]]).__name__})" if unknown else type(model).__name__
        raise UnsupportedError(
            f"model: the layout of the attention weights of {what} is not known to attncap; known are separate "
            f"projections ({', '.join('/'.join(names) for names, _ in _SEPARATE)}) with an output projection, "
            f"nn.MultiheadAttention, timm's Attention, {', '.join(kind for kind, *_ in _FUSED)}"
        )
    return tuple(blocks)


def heads_by_block(
    blocks: Sequence[AttentionBlock], heads: Iterable[tuple[str | int, int]]
) -> dict[AttentionBlock, list[int]]:
    """Pairs (layer, head) by block; a layer is an index among the blocks or a module's name.

    Raises:
        TypeError, ValueError: not such pairs, no such layer, no such head.
    """
    names = {block.name: block for block in blocks}
    chosen: dict[AttentionBlock, set[int]] = {}
    for pair in heads:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"heads: expected pairs (layer, head), got {pair!r}")
        layer, head = pair
        if isinstance(layer, str):
            if layer not in names:
                raise ValueError(f"heads: expected a layer among {', '.join(names)}, got {layer!r}")
            block = names[layer]
        elif not 0 <= int(layer) < len(blocks):
            raise ValueError(f"heads: expected a layer from 0 to {len(blocks) - 1}, got {layer}")
        else:
            block = blocks[int(layer)]
        if not 0 <= int(head) < block.heads:
            raise ValueError(f"heads: {block.name} has the heads 0 to {block.heads - 1}, got {head}")
        chosen.setdefault(block, set()).add(int(head))
    return {block: sorted(numbers) for block, numbers in chosen.items()}


def by_layer_and_head(rows: Sequence[Tensor]) -> Tensor:
    """(layers, heads) float64 of one (heads,) per layer, filled up with NaN."""
    table = torch.full((len(rows), max((len(row) for row in rows), default=0)), torch.nan, dtype=torch.float64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _block(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> AttentionBlock | None:
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(path, module)
    kind = type(module)
    for known, fused, out, by_head in _FUSED:
        if kind.__name__ == known and fused in module._modules:
            return _of_fused(path, module, getattr(module, fused), getattr(module, out), by_head)
    if kind.__module__.startswith("timm.") and isinstance(getattr(module, "qkv", None), nn.Linear):
        return _of_fused(path, module, module.get_submodule("qkv"), module.get_submodule("proj"), by_head=False)
    for names, outs in _SEPARATE:
        parts = [part for part in (getattr(module, name, None) for name in names) if _is_linear(part)]
        if len(parts) < len(names):
            continue
        projection = next((getattr(module, part) for part in outs if _is_linear(getattr(module, part, None))), None)
        if projection is None:  # BERT's lies beside the module
            projection = modules.get(".".join([*path.split(".")[:-1], "output", "dense"]))
        if projection is not None:
            return _of_separate(path, module, parts, projection)
    return None


def _of_separate(name: str, module: nn.Module, parts: list[Any], out: nn.Module) -> AttentionBlock | None:
    query, key, value = (Projection(part, torch.arange(_features(part))) for part in parts)
    head_dim = _head_dim(module, len(query.features))
    if head_dim is None or len(query.features) % head_dim or len(key.features) % head_dim:
        return None
    heads, groups = len(query.features) // head_dim, len(key.features) // head_dim
    return _checked(AttentionBlock(
        name, module, query, key, value, out, heads, groups, head_dim, len(value.features) // max(groups, 1)
    ))  # fmt: skip


def _of_fused(name: str, module: nn.Module, fused: nn.Module, out: nn.Module, by_head: bool) -> AttentionBlock | None:
    width = _inputs(out)  # of all query heads
    head_dim = _head_dim(module, width)
    if head_dim is None:
        return None
    heads, others = width // head_dim, (_features(fused) - width) // 2
    index = torch.arange(_features(fused))
    parts = index.view(heads, 3, head_dim).unbind(1) if by_head else torch.split(index, [width, others, others])
    query, key, value = (Projection(fused, part.flatten()) for part in parts)
    return _checked(AttentionBlock(
        name, module, query, key, value, out, heads, len(key.features) // head_dim, head_dim, head_dim
    ))  # fmt: skip


def _of_torch(name: str, module: nn.MultiheadAttention) -> AttentionBlock:
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        places = torch.arange(3 * width).view(3, width)
        parts = [Projection(module, place, ("in_proj_weight", "in_proj_bias")) for place in places]
    else:
        parts = [Projection(module, torch.arange(width), (f"{part}_proj_weight", "in_proj_bias")) for part in "qkv"]
    query, key, value = parts
    heads, width = module.num_heads, module.head_dim
    return AttentionBlock(name, module, query, key, value, module.out_proj, heads, heads, width, width)


def _checked(block: AttentionBlock) -> AttentionBlock | None:
    """None where the sizes do not go together: gated queries, latent keys and the like."""
    fits = (
        block.key_heads > 0
        and block.heads % block.key_heads == 0
        and len(block.value.features) == block.key_heads * block.value_dim
        and _inputs(block.out) == block.heads * block.value_dim
    )
    return block if fits else None


def _head_dim(module: nn.Module, width: int) -> int | None:
    known = next((getattr(module, name) for name in _HEAD_DIMS if isinstance(getattr(module, name, None), int)), None)
    if known is None and isinstance(heads := getattr(module, "num_heads", None), int) and heads > 0:
        return width // heads
    return known


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: Any) -> bool:
    """Whether it is Transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _features(linear: nn.Module) -> int:
    """How many numbers it gives."""
    return int(linear.nf if _is_transposed(linear) else linear.out_features)  # type: ignore[arg-type]


def _inputs(linear: nn.Module) -> int:
    """How many numbers it takes."""
    return int(linear.weight.shape[0] if _is_transposed(linear) else linear.in_features)  # type: ignore[arg-type, index]


def _by_head(tensor: Tensor, width: int) -> Tensor:
    """(..., heads * width) -> (..., heads, width)."""
    return tensor.reshape(*tensor.shape[:-1], -1, width)


def _matrix(owner: nn.Module, name: str) -> Tensor:
    """(in, out) float64, detached."""
    weight: Any = getattr(owner, name)
    plain = (
        isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() and weight.device.type != "meta"
    )
    if not plain or (isinstance(owner, nn.Linear) and weight.shape != (owner.out_features, owner.in_features)):
        raise UnsupportedError(f"model: the weights of {type(owner).__name__} are quantised, sharded or not loaded")
    matrix: Tensor = weight.detach().double()
    return matrix if _is_transposed(owner) else matrix.T


def _device_of(owner: nn.Module) -> torch.device:
    return next(owner.parameters()).device


def _refuse_other_scores(block: AttentionBlock) -> None:
    """Refuse modules in which heads with a query of 0 would not look at all their keys alike."""
    module = block.module
    reasons = [name for name in ("sinks", "has_relative_attention_bias", "alibi") if hasattr(module, name)]
    reasons += [name for name in dir(module) if name.startswith("relative_position_bias")]
    reasons += [
        name
        for name, child in module.named_children()
        if name.startswith("q") and isinstance(child, nn.LayerNorm) and child.bias is not None
    ]
    if reasons:
        raise UnsupportedError(
            f"how: the scores of {block.name} do not come from the query alone (it has {reasons[0]}), so its heads "
            'cannot be made to look everywhere alike; "zero" and "mean" work'
        )


class _Fused:
    """`nn.MultiheadAttention`, which calls none of its projections as a module: its parameters change while it runs.

    The parameters that optimisers, state dicts and other threads see between two forwards are its own.
    """

    def __init__(self, module: nn.MultiheadAttention, undo: ExitStack) -> None:
        self._module = module
        self._undo = undo
        self._own: list[tuple[nn.Module, str, Any]] = []

    def edit(self, edit: Edit) -> None:
        """Have the module project by the identity, and project what `edit` makes of it."""
        projection = self._module.out_proj

        def enter(*_: Any) -> None:
            identity = torch.eye(projection.in_features, device=projection.weight.device, dtype=projection.weight.dtype)
            zeros = None if projection.bias is None else torch.zeros_like(projection.bias)
            self._swap(projection, weight=identity, bias=zeros)

        def leave(_module: nn.Module, _args: Any, result: Any) -> Any:
            self._restore()
            if result is None:  # it raised
                return None
            swaps = result[0].dim() == 3 and not self._module.batch_first
            heads = edit(result[0].transpose(0, 1) if swaps else result[0])
            out = F.linear(heads, projection.weight, projection.bias)
            return (out.transpose(0, 1) if swaps else out, *result[1:])

        self._follow(enter, leave)

    def zero(self, query: Projection, features: Tensor) -> None:
        """Have these features of the query be 0."""
        weight_name, bias_name = query.parameters

        def enter(*_: Any) -> None:
            weight, bias = getattr(self._module, weight_name), getattr(self._module, bias_name)
            places = features.to(weight.device)
            changed = {weight_name: weight.index_fill(0, places, 0)}
            if bias is not None:
                changed[bias_name] = bias.index_fill(0, places, 0)
            self._swap(self._module, **changed)

        self._follow(enter, lambda *_: self._restore())

    def _follow(self, enter: Any, leave: Any) -> None:
        self._undo.callback(self._restore)
        self._undo.callback(self._module.register_forward_pre_hook(enter).remove)
        # Where there are several, the last one to change parameters is the first one to put them back.
        self._undo.callback(self._module.register_forward_hook(leave, always_call=True, prepend=True).remove)

    def _swap(self, owner: nn.Module, **changed: Tensor | None) -> None:
        for name, tensor in changed.items():
            self._own.append((owner, name, owner._parameters[name]))
            owner._parameters[name] = tensor  # type: ignore[assignment]

    def _restore(self) -> None:
        while self._own:
            owner, name, parameter = self._own.pop()
            owner._parameters[name] = parameter
