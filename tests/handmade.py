"""A two-layer attention-only causal model whose weights are written by hand, so that what its heads do is known.

The residual stream holds the token, the place, the token before and the model's guess, one-hot each, the guess being
where the logits are read. Token 0 begins every sequence.

V vocabulary   P places   E embedding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, PLACES = 16, 40
HEAD_DIM = PLACES
TOKEN = slice(0, VOCABULARY)
PLACE = slice(VOCABULARY, VOCABULARY + PLACES)
BEFORE = slice(PLACE.stop, PLACE.stop + VOCABULARY)
EMBEDDING = BEFORE.stop
SHARP = 60.0

PREVIOUS, ANTICOPY = (0, 0), (0, 1)
INDUCTION, ITSELF = (1, 0), (1, 1)


class Attention(nn.Module):
    """Two causal heads without biases; scores are not scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(EMBEDDING, 2 * HEAD_DIM, bias=False))
        self.o_proj = nn.Linear(2 * HEAD_DIM, EMBEDDING, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def head(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of W_Q, W_K, W_V (E, D) and W_O (D, E) of a head."""
        rows = slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)
        reads = [projection.weight[rows].T for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return reads[0], reads[1], reads[2], self.o_proj.weight[:, rows].T

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (2, HEAD_DIM)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class InductionModel(nn.Module):
    """Logits (B, N, V) that say what followed the newest token's earlier occurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        with torch.no_grad():
            _previous_token(*self.layers[0].head(0))
            _anticopy(*self.layers[0].head(1))
            _induction(*self.layers[1].head(0))
            _itself(*self.layers[1].head(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.zeros(*input_ids.shape, EMBEDDING)
        hidden[..., TOKEN] = F.one_hot(input_ids, VOCABULARY).float()
        hidden[..., PLACE] = torch.eye(PLACES)[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden[..., TOKEN]


def _previous_token(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    query[PLACE] = SHARP * torch.eye(PLACES)
    key[PLACE] = torch.eye(PLACES).roll(1, 1)  # place j is found by place j + 1
    key[PLACE.stop - 1] = 0
    value[TOKEN, :VOCABULARY] = torch.eye(VOCABULARY)
    out[:VOCABULARY, BEFORE] = torch.eye(VOCABULARY)


def _anticopy(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Looks everywhere alike and takes a little of what it sees away."""
    value[TOKEN, :VOCABULARY] = torch.eye(VOCABULARY)
    out[:VOCABULARY, TOKEN] = -0.1 * torch.eye(VOCABULARY)


def _induction(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Finds keys whose token before is the query's; where there are none it rests on token 0."""
    query[TOKEN, :VOCABULARY] = SHARP * torch.eye(VOCABULARY)
    query[TOKEN, VOCABULARY] = SHARP / 2
    key[BEFORE, :VOCABULARY] = torch.eye(VOCABULARY)
    key[0, VOCABULARY] = 1
    value[TOKEN, :VOCABULARY] = torch.eye(VOCABULARY)
    out[:VOCABULARY, TOKEN] = 4 * torch.eye(VOCABULARY)


def _itself(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    query[PLACE] = SHARP * torch.eye(PLACES)
    key[PLACE] = torch.eye(PLACES)
    value[TOKEN, :VOCABULARY] = torch.eye(VOCABULARY)
    out[:VOCABULARY, TOKEN] = 0.1 * torch.eye(VOCABULARY)


def repeated(batch: int, seed: int, half: int = VOCABULARY - 1) -> Tensor:
    """Token 0, then distinct tokens in random order, twice: (B, 1 + 2 * half)."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(VOCABULARY - 1, generator=generator)[:half] + 1 for _ in range(batch)])
    return torch.cat([torch.zeros(batch, 1, dtype=torch.long), orders, orders], 1)
