"""Questions that MiniLM answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from attncap.analysis import BestHead, dependency_accuracy, mixing_ratio, rank_correlation, read_conllu, word_encoder
from attncap.analysis.output_weight import SMALL_SHARE
from attncap.analysis.patterns import POSITIONAL_THRESHOLD
from attncap.analysis.roles import RoleResult
from attncap.store import read_run
from scripts.guide import pictures
from scripts.guide.material import SENTENCES, Material, means

_SHOWN = ("previous token", "next token", "duplicate", "special tokens")
_FEWEST = 5  # dependencies of a relation that is drawn


def corpus(material: Material) -> dict[str, Any]:
    """What was read."""
    counts = read_run(material.run).scan["counts"]
    return {
        "documents": counts["documents"],
        "tokens": f"{counts['tokens']:,}",
        "sentences": len(read_conllu(SENTENCES)),
        "layers": len(material.report.layers),
        "heads": material.report.heads,
        "all_heads": len(material.report.layers) * material.report.heads,
    }


def place(layer: int, head: int) -> str:
    """As people say it."""
    return f"layer {layer} head {head}"


def largest(grid: Any) -> tuple[int, int]:
    """(layer, head) of the largest number."""
    row, head = np.unravel_index(int(np.nanargmax(grid)), np.shape(grid))
    return int(row), int(head)


def roles(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which heads are positional, sinks, look at the same word."""
    found = {one.role.name: one for one in material.report.roles}
    numbers: dict[str, Any] = {}
    for role, one in found.items():
        key = role.replace(" ", "_")
        numbers |= {f"{key}_holders": len(one.holders), f"{key}_best": one.ranked[0].label}
        numbers[f"{key}_mean"] = one.ranked[0].mean
    numbers["table"] = "\n".join(_row(one) for one in found.values())
    share, offset = (material.result("positional", column) for column in ("share", "offset"))
    layer, head = largest(share)
    numbers |= {
        "positional": int((share >= POSITIONAL_THRESHOLD).sum()),
        "positional_best": place(layer, head),
        "positional_share": float(share[layer, head]),
        "positional_offset": int(offset[layer, head]),
    }
    patterns = Counter(one.pattern for one in material.report.patterns)
    numbers["patterns"] = ", ".join(f"{count} {name}" for name, count in patterns.most_common())
    duplicate = means(material.report, "duplicate") - means(material.report, "diagonal_mass")
    grids = (
        means(material.report, "offset_mass[-1]"),
        means(material.report, "offset_mass[1]"),
        duplicate,
        means(material.report, "special_tokens"),
    )
    figure, axes = pictures.sheet(4, height=2.1)
    for box, role, grid in zip(axes, _SHOWN, grids, strict=True):
        holders = [(head.layer, head.head) for head in found[role].holders]
        pictures.heat_map(figure, box, grid, role, bounds=(0, 1), chosen=holders, bar=box is axes[-1])
        box.set_xticks(range(0, grid.shape[1], 2))
    return numbers, {"": figure}


def _row(one: RoleResult) -> str:
    best, source = one.ranked[0], one.role.source
    return (
        f"| {one.role.name} | {one.role.measures} | {one.role.rule} | {len(one.holders)} | "
        f"{best.label}: {one.role.shown(best.mean)} | {source} |"
    )


def output_weight(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whether a small static weight is a small role."""
    names = ("share", "weight", "value", "place", "agreement", "sink", "sink_value")
    found = {name: material.result("output_weight", name) for name in names}
    tensors = {name: torch.from_numpy(grid) for name, grid in found.items()}
    breadth = torch.from_numpy(means(material.report, "relative_entropy"))
    special = torch.from_numpy(means(material.report, "special_tokens"))
    even = 1 / found["share"].shape[1]
    numbers: dict[str, Any] = {
        "weight_share": rank_correlation(tensors["weight"], tensors["share"]),
        "value_share": rank_correlation(tensors["value"], tensors["share"]),
        "agreement_share": rank_correlation(tensors["agreement"], tensors["share"]),
        "weight_breadth": rank_correlation(tensors["weight"], breadth),
        "share_breadth": rank_correlation(tensors["share"], breadth),
        "weight_special": rank_correlation(tensors["weight"], special),
        "share_special": rank_correlation(tensors["share"], special),
        "sink_value": rank_correlation(tensors["sink"], tensors["sink_value"]),
        "least_weight": float(found["weight"].min()),
        "most_weight": float(found["weight"].max()),
        "least_share": float(found["share"].min()),
        "most_share": float(found["share"].max()),
        "largest": place(*largest(found["share"])),
        "even": even,
        "small": int((found["share"] < SMALL_SHARE * even).sum()),
        "sink": float(np.median(found["sink"])),
        "sink_size": float(np.median(found["sink_value"])),
    }
    figure, (first, second) = pictures.sheet(2, height=2.9)
    pictures.dots(figure, first, found["weight"], found["share"], breadth, "relative entropy")
    first.axhline(even, color=pictures.GREY, linewidth=0.8, linestyle="--")
    first.set(title="weight and share of the output", xlabel="|W_O| of the head", ylabel="share of its layer's output")
    pictures.dots(figure, second, found["agreement"], found["share"], breadth, "relative entropy")
    second.set(title="agreement and share of the output", xlabel="agreement of the values looked at", ylabel="")
    second.axhline(even, color=pictures.GREY, linewidth=0.8, linestyle="--")
    return numbers, {"": figure}


def mixing(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """How much of a token's own information survives a layer."""
    batches = [_batch(material, text) for text in material.texts[:12]]
    found = mixing_ratio(material.minilm.model, batches)
    alone = mixing_ratio(material.minilm.model, batches, residual=False)
    heads = material.result("mixing", "ratio")
    layer, head = largest(heads)
    numbers: dict[str, Any] = {
        "mean": float(found.layer.mean()),
        "alone": float(alone.layer.mean()),
        "least": float(found.layer.min()),
        "most": float(found.layer.max()),
        "least_layer": int(found.layer.argmin()),
        "most_layer": int(found.layer.argmax()),
        "head": place(layer, head),
        "head_ratio": float(heads[layer, head]),
        "heads": float(np.nanmean(heads)),
        "kind": found.kind[0],
        "texts": len(batches),
    }
    figure, (first, second) = pictures.sheet(2, shares=(1, 1.25))
    layers = {f"layer {number}": value for number, value in enumerate(found.layer.tolist())}
    pictures.bars(first, layers, "all heads together", "share that comes from other tokens")
    pictures.heat_map(figure, second, heads, "each head as if it were the only one")
    return numbers, {"": figure}


def _batch(material: Material, text: str) -> dict[str, torch.Tensor]:
    return dict(material.minilm.tokenizer(text, truncation=True, max_length=512, return_tensors="pt"))


def importance(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which heads matter."""
    rise = material.result("importance", "importance")
    curve = material.results["pruning"].data
    share, weight = (material.result("output_weight", name) for name in ("share", "weight"))
    removed = list(curve["removed"])
    half = removed.index(min(removed, key=lambda number: abs(number - rise.size / 2)))
    first, second = (np.sort(rise, None)[-place] for place in (1, 2))
    numbers: dict[str, Any] = {
        "best": place(*largest(rise)),
        "most": float(first),
        "second": float(second),
        "median": float(np.median(rise)),
        "share": rank_correlation(torch.from_numpy(rise), torch.from_numpy(share)),
        "weight": rank_correlation(torch.from_numpy(rise), torch.from_numpy(weight)),
        "removed": int(removed[half]),
        "documents": material.results["importance"].made_from["documents"],
        "all": float(curve["importance"][-1]),
    }
    lines = {"importance": "least important", "share": "smallest share", "weight": "smallest |W_O|", "random": "random"}
    numbers |= {f"half_{name}": float(curve[name][half]) for name in lines}
    figure, (left, right) = pictures.sheet(2, height=2.7, shares=(1.15, 1))
    pictures.heat_map(figure, left, rise, "rise of the loss without the head")
    colours = (pictures.BLUE, pictures.ORANGE, pictures.INK, pictures.GREY)
    for (name, label), colour in zip(lines.items(), colours, strict=True):
        right.plot(removed, curve[name], label=f"{label} first", color=colour, marker="o", markersize=2.5)
    right.set(title="heads taken away", xlabel="how many", ylabel="1 - cosine with the whole model")
    right.legend(fontsize=7.5, loc="lower right")
    return numbers, {"": figure}


def similarity(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which heads attend alike."""
    x, y = (material.result("similarity", name) for name in "xy")
    pairs = material.results["head_distances"].data
    apart = np.asarray(pairs["divergence"])
    same = np.asarray(pairs["layer"]) == np.asarray(pairs["other_layer"])
    nearest = int(apart.argmin())
    numbers: dict[str, Any] = {
        "same_layer": float(apart[same].mean()),
        "other_layers": float(apart[~same].mean()),
        "nearest": float(apart[nearest]),
        "one": place(pairs["layer"][nearest], pairs["head"][nearest]),
        "other": place(pairs["other_layer"][nearest], pairs["other_head"][nearest]),
        "clusters": len(set(material.results["similarity"].data["cluster"])),
    }
    figure, (axes,) = pictures.sheet(1, width=5.4, height=3.6)
    pictures.dots(figure, axes, x, y, np.indices(x.shape)[0], "layer")
    for one in material.report.roles:
        if one.role.name in _SHOWN and one.holders:
            head = one.holders[0]
            pictures.name(axes, (x[head.layer, head.head], y[head.layer, head.head]), f"{one.role.name}")
    axes.set(title="heads that attend alike lie together", xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    return numbers, {"": figure}


def syntax(material: Material) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which heads follow syntax."""
    minilm = material.minilm
    found = dependency_accuracy(
        minilm.model, word_encoder(minilm.tokenizer, minilm.device, minilm.max_tokens), read_conllu(SENTENCES)
    )
    best = found.best(_FEWEST)
    everything, *relations = best
    numbers: dict[str, Any] = {
        "dependencies": everything.count,
        "all_best": place(everything.layer, everything.head),
        "all_accuracy": everything.accuracy,
        "all_baseline": everything.baseline,
        "all_offset": f"{everything.offset:+d}",
        "table": "\n".join(_relation(one) for one in best),
        "better": sum(one.accuracy > one.baseline for one in relations),
        "relations": len(relations),
        "fewest": _FEWEST,
    }
    figure, (axes,) = pictures.sheet(1, width=5.4, height=0.5 + 0.42 * len(best))
    for row, one in enumerate(best):
        axes.barh(row - 0.19, one.accuracy, height=0.36, color=pictures.BLUE, label=None if row else "best head")
        axes.barh(
            row + 0.19, one.baseline, height=0.36, color=pictures.GREY, label=None if row else "best fixed offset"
        )
    axes.set_yticks(range(len(best)), [f"{one.relation} ({one.count})" for one in best])
    axes.invert_yaxis()
    axes.set(xlabel="share of dependencies found", xlim=(0, 1))
    axes.legend(fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return numbers, {"": figure}


def _relation(one: BestHead) -> str:
    return (
        f"| {one.relation} | {one.count} | {place(one.layer, one.head)}, {one.direction} | {one.accuracy:.2f} | "
        f"{one.baseline:.2f} (offset {one.offset:+d}) |"
    )
