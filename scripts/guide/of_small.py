"""Questions that small models answer, which are trained for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import attncap
from attncap.analysis import (
    ablate,
    circuits,
    composition,
    detect_head,
    focus_drift,
    group_preference,
    head_importance,
    patch_distance,
    token_trigger,
)
from attncap.report.content import Report
from scripts.guide import pictures
from scripts.guide.material import Material, means
from scripts.guide.of_minilm import largest, place
from tests import trained

_UNSEEN = 10**6  # seed of texts that no model was trained on


def induction(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """An induction head, and what it is made of."""
    model = material.models.induction
    tokens, _ = batch = trained.repeated(64, _UNSEEN)
    previous, matching = (detect_head(model, tokens, kind) for kind in ("previous_token_head", "induction_head"))
    before = largest(previous)
    found = circuits(model, embed=model.token.weight, unembed=model.unembed.weight)
    keys = composition(model, "k")[0, :, 1]
    heads = [(1, head) for head in range(trained.HEADS)]
    losses = {}
    for name, dropped in (("whole model", []), ("without previous-token head", [before]), ("without layer 1", heads)):
        with torch.no_grad(), ablate(model, dropped):
            losses[name] = float(trained.continuation_loss(model, batch))
            if dropped == [before]:
                left = float(detect_head(model, tokens, "induction_head").max())
    important = head_importance(model, [batch], trained.continuation_loss)
    numbers: dict[str, Any] = {
        "previous": place(*before),
        "previous_score": float(previous[before]),
        "score_0": float(matching[1, 0]),
        "score_1": float(matching[1, 1]),
        "copying_0": float(found.copying[1, 0]),
        "copying_1": float(found.copying[1, 1]),
        "composed": float(keys[before[1]].mean()),
        "composed_other": float(keys[1 - before[1]].mean()),
        "chance": trained.WIDTH**-0.5,
        "guessing": float(np.log(trained.VOCABULARY)),
        "loss": losses["whole model"],
        "loss_without": losses["without previous-token head"],
        "loss_without_layer": losses["without layer 1"],
        "score_left": left,
        "important": place(*largest(important)),
    }
    figure, (first, second, third) = pictures.sheet(3, height=1.9, shares=(1, 1, 1.2))
    pictures.heat_map(figure, first, previous, "previous token", bounds=(0, 1), written=True, bar=False)
    pictures.heat_map(figure, second, matching, "induction", bounds=(0, 1), written=True, bar=False)
    pictures.bars(third, losses, "loss (nats)", "")
    return numbers, {"": figure}


def groups(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whether classes and tasks prefer heads."""
    classes, chance, tasks = (group_preference(run) for run in (material.by_class, material.by_chance, material.tasks))
    numbers: dict[str, Any] = {
        "images": sum(classes.sizes.values()),
        "texts": sum(tasks.sizes.values()) // 2,
        "classes_tested": len(classes.heads),
        "classes_found": len(classes.found()),
        "classes_expected": classes.expected,
        "chance_found": len(chance.found()),
        "tasks_tested": len(tasks.heads),
        "tasks_found": len(tasks.found()),
    }
    grids = []
    for name, found, stat in (
        ("classes", classes, "relative_entropy"),
        ("chance", chance, "relative_entropy"),
        ("tasks", tasks, "offset_mass[-1]"),
    ):
        ones = {(one.layer, one.head): one for one in found.heads if one.stat == stat}
        grid = np.full([1 + max(key[axis] for key in ones) for axis in (0, 1)], np.nan)
        for key, one in ones.items():
            grid[key] = one.eta_squared
        best = ones[largest(grid)]
        numbers |= {
            f"{name}_best": place(best.layer, best.head),
            f"{name}_eta": best.eta_squared,
            f"{name}_p": best.p_corrected,
            f"{name}_highest": best.highest,
            f"{name}_median": float(np.median(grid)),
        }
        if name == "tasks":
            numbers |= {f"tasks_mean_{group}": mean for group, mean in best.means.items()}
        grids.append(grid)
    top = float(max(grid.max() for grid in grids[:2]))
    figure, (first, second, third) = pictures.sheet(3, height=2.0, shares=(1, 1, 1.8))
    pictures.heat_map(figure, first, grids[0], "digits, classes", bounds=(0, top), written=True, bar=False)
    pictures.heat_map(figure, second, grids[1], "digits, drawn at random", bounds=(0, top), written=True, bar=False)
    pictures.heat_map(figure, third, grids[2], "MiniLM, documentation or code")
    return numbers, {"": figure}


def trigger(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a trigger does to attention."""
    ids, kind = trained.texts(200, _UNSEEN)
    changed = trained.with_trigger(ids, _UNSEEN)
    clean, triggered = ([{"input_ids": part} for part in of.split(64)] for of in (ids, changed))
    numbers: dict[str, Any] = {"sentences": len(ids)}
    drifts = []
    for name, model in (("clean", material.models.clean), ("backdoored", material.models.backdoored)):
        found = focus_drift(model, clean, triggered, token_trigger([trained.TRIGGER]))
        with torch.no_grad():
            called = model(input_ids=changed).logits.argmax(-1)
            accuracy = trained.accuracy(model(input_ids=ids).logits, kind)
        numbers |= {
            f"{name}_accuracy": accuracy,
            f"{name}_called": float((called == trained.TARGET).double().mean()),
            f"{name}_drifting": len(found.drifting()),
            f"{name}_most": float(found.drift.max()),
            f"{name}_mass": float(found.mass.max()),
            "even": found.expected_mass,
            "heads": found.drift.numel(),
        }
        drifts.append(found.drift)
    figure, axes = pictures.sheet(2, width=5.4, height=1.9)
    for box, grid, title in zip(axes, drifts, ("clean model", "with a backdoor"), strict=True):
        pictures.heat_map(figure, box, grid, title, bounds=(0, 1), written=True, bar=False)
    return numbers, {"": figure}


def patches(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whether patch and text heads are alike."""
    pixels = trained.digits()[0][trained.held_out()]
    images = [{"pixel_values": part} for part in pixels.split(60)]
    digits = material.models.digits
    of_images = _against_even(digits, lambda: patch_distance(digits, images, 1.0))
    minilm = material.minilm
    texts = [dict(minilm.tokenizer(text, truncation=True, return_tensors="pt")) for text in material.texts[:12]]

    def text_distance() -> torch.Tensor:
        spec = attncap.StatSpec(distance=True)
        with torch.no_grad(), attncap.capture(minilm.model, spec) as cap:
            for batch in texts:
                minilm.model(**batch)
        return cap.mean("distance")

    of_texts = _against_even(minilm.model, text_distance)
    wide = {"image": means(material.digits_report, "relative_entropy")}
    wide["text"] = means(material.report, "relative_entropy")
    far = {"image": of_images, "text": of_texts}
    numbers: dict[str, Any] = {"even_patches": _even(digits, lambda: patch_distance(digits, images, 1.0))}
    for name in ("image", "text"):
        numbers |= {
            f"{name}_entropy_least": float(wide[name].min()),
            f"{name}_entropy_most": float(wide[name].max()),
            f"{name}_entropy_median": float(np.median(wide[name])),
            f"{name}_distance_least": float(far[name].min()),
            f"{name}_distance_most": float(far[name].max()),
            f"{name}_distance_median": float(np.median(far[name])),
        }
    numbers["image_roles"] = _holders(material.digits_report)
    numbers["text_roles"] = _holders(material.report)
    figure, axes = pictures.sheet(2, height=2.6)
    measures = {"relative entropy": wide, "distance over that of even attention": far}
    for box, (title, grids) in zip(axes, measures.items(), strict=True):
        for name, colour, marker in (("text", pictures.BLUE, "o"), ("image", pictures.ORANGE, "s")):
            grid = grids[name]
            depth = (np.indices(grid.shape)[0] + 0.5) / len(grid)
            label = {"text": "MiniLM (text)", "image": "digits (patches)"}[name]
            box.plot(depth.ravel(), grid.ravel(), marker, color=colour, markersize=3.8, alpha=0.75, label=label)
        box.set(title=title, xlabel="depth (0 = input, 1 = output)", xlim=(0, 1), ylim=(0, None))
        box.axhline(1, color=pictures.GREY, linewidth=0.8, linestyle="--")
    axes[0].legend(fontsize=7.5, loc="lower right")
    return numbers, {"": figure}


def _everywhere(model: Any) -> list[tuple[int, int]]:
    grid = circuits(model).output_norm
    return [(layer, head) for layer in range(len(grid)) for head in range(grid.shape[1])]


def _even(model: Any, measure: Callable[[], torch.Tensor]) -> float:
    """The mean of what is measured where every head attends evenly."""
    with ablate(model, _everywhere(model), "uniform"):
        return float(measure().mean())


def _against_even(model: Any, measure: Callable[[], torch.Tensor]) -> np.ndarray:
    return measure().double().numpy() / _even(model, measure)


def _holders(report: Report) -> str:
    told = [f"{len(one.holders)} {one.role.name}" for one in report.roles if one.holders]
    return ", ".join(told) or "none"
