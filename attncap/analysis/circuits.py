"""What the weights of heads say without any data: copying, norms, and how heads of different layers compose.

After Elhage et al. 2021 (A Mathematical Framework for Transformer Circuits). With rows as vectors, a head scores with
the E x E matrix QK = W_Q W_K^T and moves what it reads by OV = W_V W_O. Neither is ever made: each has rank D, and
everything below follows from D x D products. Gains of normalisation layers, biases, rotary positions and the scale of
the scores are not part of them.

E embedding   H heads   D head dim   L layers   T tokens of the vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attncap.analysis.blocks import AttentionBlock, attention_blocks, by_layer_and_head


@dataclass(frozen=True)
class Circuits:
    """Numbers of every head, (layers, heads) float64; NaN where a layer has fewer heads.

    Attributes:
        layers: names of the attention modules.
        copying: Re(sum of eigenvalues) / sum of abs(eigenvalues) of OV, from -1 to 1: near 1 a head gives back what it
            reads. With embeddings, that of the whole circuit from token to token, W_E W_V W_O W_U.
        qk_norm: Frobenius norm of W_Q W_K^T.
        ov_norm: Frobenius norm of W_V W_O.
        output_norm: Frobenius norm of W_O, the static weight that the output gives the head.
    """

    layers: tuple[str, ...]
    copying: Tensor
    qk_norm: Tensor
    ov_norm: Tensor
    output_norm: Tensor


def circuits(model: nn.Module, *, embed: Tensor | None = None, unembed: Tensor | None = None) -> Circuits:
    """Copying scores and norms of every head's circuits.

    The eigenvalues of W_V W_O other than 0 are those of W_O W_V, D x D, and those of W_E W_V W_O W_U those of
    W_O (W_U W_E) W_V.

    Args:
        model: one whose weights `attention_blocks` knows.
        embed: W_E (T, E), and
        unembed: W_U (T, E) as a linear layer holds it, both or neither: copying then is from token to token, as
            Elhage et al. have it, instead of from residual stream to residual stream.

    Raises:
        TypeError, ValueError: the embeddings do not fit.
        UnsupportedError: the layout of the weights is not known.
    """
    blocks = attention_blocks(model)
    through = _through_tokens(embed, unembed)
    return Circuits(
        layers=tuple(block.name for block in blocks),
        copying=by_layer_and_head([_copying(block, through) for block in blocks]),
        qk_norm=by_layer_and_head([_norm(block.query_weight, block.key_weight.mT) for block in blocks]),
        ov_norm=by_layer_and_head([_norm(block.value_weight, block.out_weight) for block in blocks]),
        output_norm=by_layer_and_head([torch.linalg.matrix_norm(block.out_weight).cpu() for block in blocks]),
    )


def composition(model: nn.Module, kind: str) -> Tensor:
    """How much the heads of a layer read what those of an earlier one write (Elhage et al. 2021).

    With OV of the earlier head a and QK, OV of the later head b, Frobenius norms::

        "q"  |OV_a QK_b| / (|OV_a| |QK_b|)          a moves what b asks with
        "k"  |QK_b OV_a^T| / (|OV_a| |QK_b|)        a moves what b is found by
        "v"  |OV_a OV_b| / (|OV_a| |OV_b|)          a moves what b moves on

    An induction head has K-composition with a previous-token head. Random heads have about 1 / sqrt(E), not 0.

    Returns:
        (L, H, L, H) float64: [earlier layer, head, later layer, head], from 0 to 1; NaN where the first is not the
        earlier one, or the two have different embeddings.

    Raises:
        ValueError: no such kind. UnsupportedError: the layout of the weights is not known.
    """
    if kind not in ("q", "k", "v"):
        raise ValueError(f'kind: expected "q", "k" or "v", got {kind!r}')
    blocks = attention_blocks(model)
    heads = max(block.heads for block in blocks)
    table = torch.full((len(blocks), heads, len(blocks), heads), torch.nan, dtype=torch.float64)
    for later, reader in enumerate(blocks):
        left, right = _read_by(reader, kind)
        for earlier, writer in enumerate(blocks[:later]):
            if writer.out_weight.shape[-1] != left.shape[1]:
                continue
            value, out = writer.value_weight, writer.out_weight
            together = _composed(value, out, left, right)
            alone = _norm(value, out)[:, None] * _norm(left, right.mT)
            table[earlier, : writer.heads, later, : reader.heads] = together / alone
    return table


def _read_by(reader: AttentionBlock, kind: str) -> tuple[Tensor, Tensor]:
    """(what a head reads with (H, E, D), the rest of the same matrix transposed (H, E, D))."""
    if kind == "q":
        return reader.query_weight, reader.key_weight
    if kind == "k":
        return reader.key_weight, reader.query_weight
    return reader.value_weight, reader.out_weight.mT


def _composed(value: Tensor, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(H_a, H_b) Frobenius norms of value_a out_a left_b right_b^T, from products of D x D."""
    gram_value, gram_right = value.mT @ value, right.mT @ right
    rows = []
    for one_out, one_gram in zip(out, gram_value, strict=True):
        middle = one_out @ left  # (H_b, D, D)
        rows.append(((middle.mT @ one_gram @ middle) * gram_right).sum((-2, -1)))
    return torch.stack(rows).clamp_min(0).sqrt().cpu()


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """(H,) Frobenius norms of left (H, E, D) @ right (H, D, E): the square is tr(left^T left right right^T)."""
    return ((left.mT @ left) * (right @ right.mT)).sum((-2, -1)).clamp_min(0).sqrt().cpu()


def _copying(block: AttentionBlock, through: Tensor | None) -> Tensor:
    out, value = block.out_weight, block.value_weight
    width = value.shape[1]
    if out.shape[-1] != width or (through is not None and through.shape != (width, width)):
        got = tuple(out.shape[-1:]) if through is None else tuple(through.shape)
        raise ValueError(f"embed, unembed: {block.name} reads vectors of {width}, got {got}")
    product = out @ value if through is None else out @ through.to(out.device) @ value
    eigenvalues = torch.linalg.eigvals(product)
    score: Tensor = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
    return score.cpu()


def _through_tokens(embed: Tensor | None, unembed: Tensor | None) -> Tensor | None:
    """W_U W_E (E, E) float64."""
    if embed is None and unembed is None:
        return None
    for name, tensor in (("embed", embed), ("unembed", unembed)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor beside the other one, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected (vocabulary, embedding), got {tuple(tensor.shape)}")
    assert embed is not None
    assert unembed is not None
    if len(embed) != len(unembed):
        raise ValueError(f"unembed: expected the {len(embed)} tokens of embed, got {len(unembed)}")
    return unembed.detach().double().mT @ embed.detach().double()
