"""How much a run's model depends on its heads, and its loss without them; see `attncap.analysis.catalogue`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attncap.analysis.ablation import pruning_curve
from attncap.analysis.importance import head_importance, leave_one_out
from attncap.analysis.output_weight import output_weight, rank_correlation
from attncap.analysis.results import CURVE, Column, Result, described
from attncap.analysis.subject import Subject

_STEPS_OF_A_CURVE = 8
_RANKINGS = {
    "importance": "the least important first",
    "share": "the smallest share of the layer's output first",
    "weight": "the smallest static weight |W_O| first",
    "broad": "the broadest attention first",
    "unsunk": "the most attention on the first tokens first",
    "random": "in an order drawn at random",
}
_MEASURES = {
    "share": "the share of the layer's output",
    "weight": "the static weight |W_O|",
    "broad": "narrow attention",
    "unsunk": "little attention on the first tokens",
}


def importance_results(subject: Subject) -> list[Result]:
    """How much the loss depends on each head, and its curve as heads are taken away."""
    objective = subject.objective
    how = (
        "mean over tokens of the absolute derivative of a document's summed loss by a gate on the head (Michel et al. "
        "2019)"
        if objective.total is not None
        else "rise of the loss when that head alone is taken away (Michel et al. 2019), for the checkpoint has no "
        "language-modelling head to take a loss of"
    )
    table = _importance_of(subject)
    rankings = _rankings(subject, table)
    correlations = [
        f"{what} {rank_correlation(table, rankings[name]):+.2f}" for name, what in _MEASURES.items() if name in rankings
    ]
    text = f"""How much the model depends on each head: {how}.

The loss: {objective.what} ({objective.unit}), over {len(subject.few)} documents.

Rank correlation (Spearman) of importance with {", ".join(correlations) or "nothing else that is known"}."""
    unit = objective.unit
    columns = (Column("importance", unit, "how much the loss depends on the head", zero=objective.total is None),)
    data = subject.heads(subject.layers, {"importance": table})
    importance = described("importance", "Importance", text, columns, data)
    return [importance, _pruning(subject, rankings)]


def _importance_of(subject: Subject) -> Tensor:
    objective = subject.objective
    if objective.total is not None:
        return head_importance(objective.model, subject.few, objective.total)
    return leave_one_out(objective.model, subject.few, objective.loss)


def _pruning(subject: Subject, rankings: Mapping[str, Tensor]) -> Result:
    objective = subject.objective
    heads = int(rankings["importance"].isfinite().sum())
    curves = {
        name: pruning_curve(objective.model, subject.few, objective.loss, ranking, steps=_steps(heads))
        for name, ranking in rankings.items()
    }
    data = {"removed": [float(step) for step in _steps(heads)]}
    data |= {name: [point.loss for point in curve] for name, curve in curves.items()}
    columns = (
        Column("removed", "heads", "how many heads were taken away"),
        *(Column(name, objective.unit, f"loss, {_RANKINGS[name]}") for name in curves),
    )
    text = f"""The loss as heads are taken away one after another, by several rankings (Michel et al. 2019, figure 3).
The longer a curve stays low, the better its ranking tells which heads matter; a ranking that is no better than
chance does not.

The loss: {objective.what}. A head that is taken away gives 0."""
    return described("pruning", "Loss against heads removed", text, columns, data, kind=CURVE)


def _rankings(subject: Subject, importance: Tensor) -> dict[str, Tensor]:
    """Name -> numbers (layers, heads), the smallest of which go first."""
    found = {"importance": importance}
    weight = output_weight(subject.loaded.model, subject.few)
    layers = subject.layers
    if list(weight.layers) == layers:
        found |= {"share": weight.share, "weight": weight.weight}
    for name, stat in (("broad", "relative_entropy"), ("unsunk", "sink_mass")):
        table = subject.table(stat, layers, importance.shape[1])
        if torch.equal(table.isnan(), importance.isnan()):
            found[name] = -table
    random = torch.rand(importance.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {**found, "random": random.masked_fill(importance.isnan(), torch.nan)}


def _steps(heads: int) -> list[int]:
    count = min(_STEPS_OF_A_CURVE, heads)
    return sorted({round(heads * place / count) for place in range(count + 1)})


def importance_forwards(subject: Subject) -> int:
    """Of importance and its curves."""
    heads = subject.loaded.layers * subject.loaded.heads
    alone = 1 if subject.objective.total is not None else heads + 1
    return len(subject.few) * (alone + len(_RANKINGS) * len(_steps(heads)))
