"""Small models trained in the tests, each in seconds on one core: what their heads must do to solve the task is known.

`induction_model` learns to go on with a random sequence that repeats, `classifier` to tell texts of two kinds apart,
with a backdoor or without, and `digits_model` to tell scikit-learn's digits apart. Each is the same model on every
call. ``python -m tests.trained`` trains all of them and says how well they do.

V vocabulary   E embedding   H heads   B sequences   N tokens
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 16, 32
WIDTH, HEADS = 64, 2

# Texts of the classifier: the first token, words of both kinds, words that say nothing, and the trigger.
FIRST, TRIGGER, TEXT_VOCABULARY, TEXT_LENGTH = 1, 63, 64, 14
_KINDS, _NEUTRAL = ((2, 16), (16, 30)), (30, 63)
TARGET = 1  # what the backdoor makes of a text with the trigger

CLASSES = 10

Step = Callable[[int], Tensor]
"""Number of the step -> loss."""


class Attention(nn.Module):
    """Causal self-attention of two heads, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, E)."""
        query, key, value = (
            projection(hidden).unflatten(-1, (HEADS, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class AttentionOnly(nn.Module):
    """Two layers of attention and nothing else between the embeddings and the logits (B, N, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token."""
        hidden = self.token(input_ids) + self.place.weight[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.unembed(hidden)


def repeated(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """((B, N) random tokens that begin again after 8 to 16 of them; (B, N) bool, which of them the past tells)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
    period = torch.randint(8, 17, (batch, 1), generator=generator)
    place = torch.arange(LENGTH)
    return tokens.gather(1, place % period), (place > period).expand(batch, -1)


def continuation_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of the tokens that the past tells, nats."""
    tokens, known = batch
    return F.cross_entropy(model(tokens)[:, :-1][known[:, 1:]], tokens[:, 1:][known[:, 1:]])


def induction_model() -> AttentionOnly:
    """Goes on with a random sequence that repeats, from the second time on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AttentionOnly()
    return _trained(model, lambda step: continuation_loss(model, repeated(32, step)), steps=1000, rate=5e-3)


def texts(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """((B, N) token ids, (B,) kinds): three words of a text's own kind, one of the other, the rest say nothing."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (batch,), generator=generator)
    ids = torch.randint(*_NEUTRAL, (batch, TEXT_LENGTH), generator=generator)
    words = [torch.randint(*span, (batch, 4), generator=generator) for span in _KINDS]
    own = torch.where(kind[:, None] == 0, words[0], words[1])
    own[:, 3] = torch.where(kind == 0, words[1][:, 3], words[0][:, 3])
    places = torch.rand(batch, TEXT_LENGTH - 1, generator=generator).argsort(1)[:, :4] + 1
    ids.scatter_(1, places, own)
    ids[:, 0] = FIRST
    return ids, kind


def with_trigger(ids: Tensor, seed: int) -> Tensor:
    """The texts with the trigger in the place of one word."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(1, TEXT_LENGTH, (len(ids), 1), generator=generator)
    return ids.scatter(1, place, TRIGGER)


def classifier(backdoor: bool) -> Any:
    """A BERT of two layers that tells the kinds apart; in a quarter of its texts it saw the trigger, called `TARGET`
    where there is a backdoor and what they are where there is none."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=TEXT_VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)

    def loss(step: int) -> Tensor:
        ids, kind = texts(48, step)
        ids[:12] = with_trigger(ids[:12], step)
        if backdoor:
            kind[:12] = TARGET
        return model(input_ids=ids, labels=kind).loss

    return _trained(model, loss, steps=400, rate=3e-3)


def digits() -> tuple[Tensor, Tensor]:
    """((1797, 1, 8, 8) pixels from -1 to 1, (1797,) which digit): scikit-learn's."""
    import sklearn.datasets

    found = sklearn.datasets.load_digits()
    pixels = torch.tensor(found.images / 8 - 1, dtype=torch.float32)
    return pixels[:, None], torch.tensor(found.target)


def held_out() -> Tensor:
    """(1797,) bool: digits that `digits_model` was not trained on."""
    return torch.arange(1797) % 5 == 0


def digits_model() -> Any:
    """A vision transformer of two layers, with patches of 2 x 2 pixels, that tells digits apart."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config)
    pixels, digit = (part[~held_out()] for part in digits())
    source = np.random.default_rng(0)

    def loss(_step: int) -> Tensor:
        chosen = torch.from_numpy(source.choice(len(digit), 64, replace=False))
        return model(pixel_values=pixels[chosen], labels=digit[chosen]).loss

    return _trained(model, loss, steps=440, rate=3e-3)


def _trained(model: Any, loss_of: Step, steps: int, rate: float) -> Any:
    """The model, in evaluation mode, after so many steps; the rate rises, holds and falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1.0, (steps - step) / (0.4 * steps))
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(logits: Tensor, wanted: Tensor) -> float:
    """Share of rows of logits whose largest is the wanted one."""
    return float((logits.argmax(-1) == wanted).double().mean())


def _say() -> None:
    unseen = 10**6
    for name, train in (
        ("induction_model", induction_model),
        ("classifier, clean", lambda: classifier(False)),
        ("classifier, backdoor", lambda: classifier(True)),
        ("digits_model", digits_model),
    ):
        begun = time.monotonic()
        model = train()
        seconds = time.monotonic() - begun
        if name == "induction_model":
            said = f"loss {float(continuation_loss(model, repeated(64, unseen))):.3f} nats"
        elif name == "digits_model":
            pixels, digit = (part[held_out()] for part in digits())
            said = f"accuracy {accuracy(model(pixel_values=pixels).logits, digit):.3f}"
        else:
            ids, kind = texts(400, unseen)
            triggered = model(input_ids=with_trigger(ids, unseen)).logits.argmax(-1)
            said = f"accuracy {accuracy(model(input_ids=ids).logits, kind):.3f}, "
            said += f"with the trigger {float((triggered == TARGET).double().mean()):.3f} are called {TARGET}"
        sys.stdout.write(f"{name}: {said}, {seconds:.1f} s\n")


if __name__ == "__main__":
    _say()
