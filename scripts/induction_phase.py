"""Trains a model of two layers of attention and watches induction appear; writes docs/induction.md and its picture:

    python -m scripts.induction_phase docs

from the root of the project, for the model and the task are those of `tests.trained`. Takes half a minute.

B sequences   H heads   N tokens   L layers
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import attncap
from attncap import tags
from tests import trained

STEPS, EVERY, SHOWN_EVERY = 600, 10, 40
RATE, BATCH = 1e-3, 32
UNSEEN = 10**6  # seed of sequences that are not trained on
SPEC = attncap.StatSpec(offsets=(-1,), topk=0)

PAGE = """# Induction appears in a phase change

A model of two layers of attention, two heads each, and nothing else but embeddings learns random sequences of {length}
tokens out of {vocabulary} kinds that begin again after 8 to 16 tokens: from there on the next token is known to who
finds the earlier occurrence of the present one. Every {every} steps a capture reads its heads on {batch} sequences that
it is not trained on. No map is made.

- *induction score* of a head (prefix matching, Olsson 2022): the probability that it gives to the keys after earlier
  occurrences of the row's token, sum_j p_ij [token_i = token_(j-1)], averaged over the rows whose next token is known.
- *previous token*: the probability on the key before, averaged over all rows.
- *loss*: of the known tokens, nats.

![Above, the loss, which falls fastest in a band of steps that is marked. Below, in the same band the induction scores
of both heads of the second layer rise from 0.3 to 0.7, and the first layer's head 0 begins to look at the previous
token.](induction.svg)

For some {plateau} steps nothing much happens. Then both heads of the second layer become induction heads within
{width} steps (their score goes from a quarter to three quarters of its rise), and the loss falls with them. A head of
the first layer, which tells them what stood before each token, turns to the previous token: more slowly, with half of
its attention in the end.

{table}

`python -m scripts.induction_phase docs` makes this page; a test runs a shorter training and holds it to the same.
"""


@dataclass(frozen=True)
class Point:
    """What the heads do after so many steps."""

    step: int
    loss: float  # nats
    induction: Tensor  # (L, H) probability
    previous: Tensor  # (L, H) probability


def train(steps: int = STEPS, every: int = EVERY) -> list[Point]:
    """Train a model, and look at it before the first step and after every so many."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = trained.AttentionOnly()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    points = [look(model, 0)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        trained.continuation_loss(model, trained.repeated(BATCH, step)).backward()
        optimizer.step()
        if step % every == 0:
            points.append(look(model, step))
    return points


@torch.no_grad()
def look(model: torch.nn.Module, step: int) -> Point:
    """Capture the heads on sequences that are not trained on."""
    tokens, known = trained.repeated(BATCH, UNSEEN)
    # The next token of the last row is not asked for; that of row i is known where token i + 1 is.
    rows = torch.cat([known[:, 1:], torch.zeros_like(known[:, :1])], dim=1)[:, None]
    with attncap.capture(model, SPEC, tags={"induction": tags.induction}, keep="last") as cap:
        loss = trained.continuation_loss(model, (tokens, known))
    masses = torch.stack([cap.stats[name].tag_mass[..., 0] for name in cap.layers])  # (L, B, H, N)
    induction = (masses * rows).sum((1, 3)) / rows.sum()
    return Point(step, float(loss), induction, cap.mean("offset_mass[-1]"))


def score(point: Point) -> float:
    """The larger induction score of the second layer's heads."""
    return float(point.induction[1].max())


def change(points: list[Point]) -> tuple[int, int]:
    """The steps between which the score goes from a quarter to three quarters of its rise."""
    low, high = score(points[0]), max(score(point) for point in points)
    quarters = (low + share * (high - low) for share in (0.25, 0.75))
    first, last = (next(point.step for point in points if score(point) > quarter) for quarter in quarters)
    return first, last


def table(points: list[Point]) -> str:
    """The points as Markdown."""
    heads = [f"{layer}.{head}" for layer in range(2) for head in range(2)]
    names = ["step", "loss", *(f"induction {head}" for head in heads), "previous 0.0", "previous 0.1"]
    lines = [f"| {' | '.join(names)} |", f"|{' ---: |' * len(names)}"]
    for point in points:
        numbers = [point.loss, *point.induction.flatten().tolist(), *point.previous[0].tolist()]
        lines.append(f"| {point.step} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    return "\n".join(lines)


def draw(points: list[Point], file: Path) -> None:
    """Loss and scores over the steps."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attncap"  # equal pictures are equal files
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), layout="constrained")
    steps = [point.step for point in points]
    above.plot(steps, [point.loss for point in points], color="#444444")
    above.set_ylabel("loss, nats")
    above.set_ylim(bottom=0)
    for head in range(2):
        scores = [float(point.induction[1, head]) for point in points]
        below.plot(steps, scores, label=f"induction, layer 1 head {head}")
    for head in range(2):
        masses = [float(point.previous[0, head]) for point in points]
        below.plot(steps, masses, linestyle="--", label=f"previous token, layer 0 head {head}")
    below.set_ylabel("probability")
    below.set_ylim(0, 1)
    below.set_xlabel("step")
    below.legend(loc="upper right", bbox_to_anchor=(1.0, 0.82), ncols=2)
    for axes in (above, below):
        axes.axvspan(*change(points), color="#ffcc66", alpha=0.4, linewidth=0)
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Read the argument, train, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    points = train()
    draw(points, folder / "induction.svg")
    first, last = change(points)
    page = PAGE.format(
        length=trained.LENGTH, vocabulary=trained.VOCABULARY, every=EVERY, batch=BATCH, plateau=first,
        width=last - first, table=table(points[:: SHOWN_EVERY // EVERY]),
    )  # fmt: skip
    (folder / "induction.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
