"""Asks every question, and writes the guide with what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

from attncap.parts import write_whole
from scripts.guide import of_minilm, of_small, pictures
from scripts.guide.material import Material

TEMPLATE = Path(__file__).with_name("guide.md")
QUESTIONS = (
    of_minilm.roles,
    of_small.induction,
    of_minilm.output_weight,
    of_minilm.mixing,
    of_minilm.importance,
    of_small.groups,
    of_small.trigger,
    of_small.patches,
    of_minilm.similarity,
    of_minilm.syntax,
)

Number = float | int | str
Answer = tuple[dict[str, Number], dict[str, matplotlib.figure.Figure]]
"""(name -> number or words for the text, name -> picture)."""


def answers(material: Material) -> Answer:
    """Of all questions together."""
    numbers: dict[str, Number] = dict(of_minilm.corpus(material))
    drawn: dict[str, matplotlib.figure.Figure] = {}
    with matplotlib.rc_context(pictures.STYLE):
        for question in QUESTIONS:
            found, figures = question(material)
            numbers |= {f"{question.__name__}_{name}": value for name, value in found.items()}
            drawn |= {f"{question.__name__}{'_' if name else ''}{name}": one for name, one in figures.items()}
    return numbers, drawn


def write_guide(material: Material, folder: Path) -> list[Path]:
    """Write guide.md, guide/*.svg and guide/numbers.json; gives their paths."""
    found, drawn = answers(material)
    numbers = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
    paths = [folder / "guide.md", folder / "guide" / "numbers.json"]
    paths[1].parent.mkdir(parents=True, exist_ok=True)
    write_whole(paths[0], filled_in(numbers).encode())
    write_whole(paths[1], (json.dumps(numbers, indent=1, sort_keys=True) + "\n").encode())
    return paths + pictures.save(drawn, folder / "guide")


def filled_in(numbers: Mapping[str, Number]) -> str:
    """The guide's text with these numbers."""
    return TEMPLATE.read_text(encoding="utf-8").format_map(numbers)
