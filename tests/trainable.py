"""A small network to train under a monitor, and what it is held against; without Transformers, so that processes start
quickly."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attncap
from attncap import StatSpec

WIDTH, HEADS = 16, 4
SPEC = StatSpec(topk=0, diagonal=None)


class Layer(nn.Module):
    """Causal self-attention and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.inner(hidden).chunk(3, dim=-1)
        )
        return hidden + F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


class Net(nn.Module):
    """Two layers, under activation checkpointing of one kind, or none."""

    def __init__(self, checkpointing: str = "none") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Layer(), Layer()])
        self.checkpointing = checkpointing

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        for layer in self.layers:
            if self.checkpointing == "none":
                hidden = layer(hidden)
            else:
                hidden = checkpoint(layer, hidden, use_reentrant=self.checkpointing == "reentrant")
        return hidden


def batch(seed: int, size: int = 2) -> Tensor:
    return 2 * torch.randn(size, 9, WIDTH, generator=torch.Generator().manual_seed(seed))


def train_step(model: nn.Module, given: Tensor) -> None:
    model(given).square().mean().backward()


def captured(model: nn.Module, *batches: Tensor, **options: Any) -> attncap.Capture:
    with torch.no_grad(), attncap.capture(model, SPEC, **options) as cap:
        for given in batches:
            model(given)
    return cap


def scaled(model: Net, layer: int, head: int, by: float) -> Net:
    """The query weights of one head multiplied, which multiplies its scores."""
    width = WIDTH // HEADS
    with torch.no_grad():
        inner = model.layers[layer].inner
        inner.weight[head * width : (head + 1) * width] *= by
        inner.bias[head * width : (head + 1) * width] *= by
    return model


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> number, read from TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.rglob("events.*"):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    return found
