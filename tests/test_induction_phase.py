"""The script behind docs/induction.md: a small model becomes able to do induction while it is watched."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from scripts import induction_phase
from scripts.induction_phase import Point, change, draw, look, score
from tests import trained

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def points() -> list[Point]:
    """A training as long as the change takes."""
    return induction_phase.train(steps=240, every=20)


def test_the_induction_score_rises_in_a_phase_change(points: list[Point]) -> None:
    by_step = {point.step: point for point in points}
    assert score(by_step[60]) < 0.25
    assert float(points[-1].induction[1].min()) > 0.75  # both heads of the second layer
    first, last = change(points)
    assert 60 < first < last <= first + 80
    falls = by_step[first - 20].loss - by_step[last].loss
    assert falls > 0.4 * (points[0].loss - points[-1].loss)  # in a third of the training


def test_a_head_of_the_first_layer_turns_to_the_previous_token_and_none_to_induction(points: list[Point]) -> None:
    previous = points[-1].previous[0]
    assert float(previous.max()) > 2 * float(points[0].previous[0].max())
    assert float(torch.stack([point.induction[0] for point in points]).max()) < 0.3


def test_the_score_is_that_of_the_maps() -> None:
    model = trained.AttentionOnly()
    tokens, known = trained.repeated(induction_phase.BATCH, induction_phase.UNSEEN)
    with torch.no_grad():
        hidden = model.token(tokens) + model.place.weight
        for layer, attention in enumerate(model.layers):
            query, key = (
                projection(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj)
            )
            maps = (query @ key.mT / 32**0.5).masked_fill(~lower_triangle(), -torch.inf).softmax(-1)
            wanted = [mean_on_followers(maps[:, head], tokens, known) for head in range(2)]
            assert look(model, 0).induction[layer].tolist() == pytest.approx(wanted, rel=1e-4)
            hidden = hidden + attention(hidden)


def lower_triangle() -> Tensor:
    return torch.ones(trained.LENGTH, trained.LENGTH, dtype=torch.bool).tril()


def mean_on_followers(maps: Tensor, tokens: Tensor, known: Tensor) -> float:
    """Mean over the rows whose next token the past tells of the probability on keys after the row's token."""
    masses = [
        sum(float(maps[text, row, key]) for key in range(1, row + 1) if tokens[text, key - 1] == tokens[text, row])
        for text in range(len(tokens))
        for row in range(trained.LENGTH - 1)
        if known[text, row + 1]
    ]
    return sum(masses) / len(masses)


def test_the_page_has_the_numbers_of_the_script(points: list[Point]) -> None:
    page = (DOCS / "induction.md").read_text(encoding="utf-8")
    rows = {int(step): numbers for step, numbers in re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)}
    assert list(rows) == list(range(0, induction_phase.STEPS + 1, induction_phase.SHOWN_EVERY))
    for point in (points[0], points[2]):
        written = [float(number) for number in rows[point.step].split(" | ")]
        found = [point.loss, *point.induction.flatten().tolist(), *point.previous[0].tolist()]
        assert written == pytest.approx(found, abs=0.03)


def test_the_picture_can_be_drawn_again(points: list[Point], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(points, tmp_path / "induction.svg")
    for file in (tmp_path, DOCS):
        assert ElementTree.parse(file / "induction.svg").getroot().tag.endswith("svg")
