"""The analyses that `attncap analyse` knows: each computes one or more results of a run, or says why it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attncap.analysis.ablation import pruning_curve
from attncap.analysis.blocks import attention_blocks
from attncap.analysis.circuits import circuits, composition
from attncap.analysis.groups import group_preference
from attncap.analysis.importance import head_importance, leave_one_out
from attncap.analysis.mixing import mixing_ratio
from attncap.analysis.output_weight import output_weight, rank_correlation
from attncap.analysis.patterns import positional_heads
from attncap.analysis.results import CURVE, HEADS, PAIRS, Column, Result
from attncap.analysis.similarity import clusters, coordinates, head_distances
from attncap.analysis.subject import Subject

_PERMUTATIONS = 2000
_STEPS_OF_A_CURVE = 8
_MOST_PAIRS = 1e11  # of heads, times probabilities: minutes
_RANKINGS = {
    "importance": "the least important first",
    "share": "the smallest share of the layer's output first",
    "weight": "the smallest static weight |W_O| first",
    "broad": "the broadest attention first",
    "random": "in an order drawn at random",
}
_UNTOLD = ("lse", "max_logit", "collision", "topk_mass", "received_mass", "null_mass")  # of groups


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: what it is asked for by. writes: names of its results.
        compute: gives them.
        forwards: how many forwards of the model it takes.
        data: whether it runs the model on documents at all.
    """

    name: str
    writes: tuple[str, ...]
    compute: Callable[[Subject], Sequence[Result]]
    forwards: Callable[[Subject], int] = lambda _: 0
    data: bool = True

    def made_from(self, subject: Subject) -> dict[str, Any]:
        """What its results depend on."""
        more = {"permutations": _PERMUTATIONS, **_tables(subject)} if self.name == "groups" else {}
        documents = {"importance": len(subject.few)}.get(self.name, subject.documents) if self.data else 0
        return subject.made_from(documents, **more)


def _circuits(subject: Subject) -> list[Result]:
    found = circuits(subject.loaded.model)
    tables = {
        "copying": found.copying,
        "output_norm": found.output_norm,
        "ov_norm": found.ov_norm,
        "qk_norm": found.qk_norm,
    }
    text = """What the weights alone say. A head reads with W_Q and W_K, and moves what it finds by W_V W_O.

Copying is Re(sum of eigenvalues) / sum of their sizes of W_V W_O: 1 where a head writes what it reads, -1 where it
writes the opposite (Elhage et al. 2021). Norms are Frobenius norms; they say how strong a head can be, not what it
does."""
    columns = (
        Column("copying", "", "whether the head writes what it reads (1) or its opposite (-1)", zero=True),
        Column("output_norm", "", "static weight of the head in the output projection, |W_O|"),
        Column("ov_norm", "", "how strongly the head can write what it reads, |W_V W_O|"),
        Column("qk_norm", "", "how strongly the head can tell keys apart, |W_Q W_K^T|"),
    )
    return [_result(subject, "circuits", "Circuits", text, columns, subject.heads(found.layers, tables))]


def _composition(subject: Subject) -> list[Result]:
    tables = {kind: composition(subject.loaded.model, kind) for kind in "qkv"}
    layers = _layers(subject)
    places = (~tables["q"].isnan()).nonzero().tolist()
    data: dict[str, list[Any]] = {
        "layer": [subject.number(layers[place[0]]) for place in places],
        "module": [layers[place[0]] for place in places],
        "head": [place[1] for place in places],
        "other_layer": [subject.number(layers[place[2]]) for place in places],
        "other_module": [layers[place[2]] for place in places],
        "other_head": [place[3] for place in places],
        **{kind: table[~table.isnan()].tolist() for kind, table in tables.items()},
    }
    width = attention_blocks(subject.loaded.model)[0].out_weight.shape[-1]
    text = f"""How much a head reads what an earlier head writes: |OV_a QK_b| / (|OV_a| |QK_b|) and its like for keys
and values (Elhage et al. 2021). An induction head has key composition with a previous-token head.

Heads that have nothing to do with each other have about 1 / sqrt({width}) = {1 / math.sqrt(width):.3f}, not 0."""
    columns = (
        Column("q", "", "the earlier head moves what the later one asks with"),
        Column("k", "", "the earlier head moves what the later one finds keys by"),
        Column("v", "", "the earlier head moves what the later one moves on"),
    )
    return [_result(subject, "composition", "Composition of heads", text, columns, data, kind=PAIRS)]


def _output_weight(subject: Subject) -> list[Result]:
    found = output_weight(subject.loaded.model, subject.watched())
    heads = found.share.shape[1]
    reasons = [
        [found.reason(layer, head) for head in range(heads) if found.share[layer, head].isfinite()]
        for layer in range(len(found.layers))
    ]
    small = [reason for row in reasons for reason in row if reason is not None]
    told = ", ".join(f"{small.count(reason)} {reason}" for reason in dict.fromkeys(small)) or "none"
    correlations = []
    for name, what in (("relative_entropy", "breadth of attention"), ("sink_mass", "attention on the first tokens")):
        table = subject.table(name, found.layers, heads)
        if table.isfinite().any():
            pair = rank_correlation(found.weight, table), rank_correlation(found.share, table)
            correlations.append(f"with {what} {pair[0]:+.2f} and {pair[1]:+.2f}")
    both = f"{rank_correlation(found.weight, found.share):+.2f}"
    text = f"""What each head adds to the output of its layer, and why it is much or little: the mean norm of out W_O is
the product of how large the values are (value), whether attention lies on large ones (place; small where a head
rests on a sink whose value is small, Gu et al. 2025, Guo et al. 2024) and whether they agree (agreement; small
where they cancel out). The sum of norms is that of Kobayashi et al. 2020.

Heads with less than half an even share: {told}.

Rank correlation (Spearman) of the static weight |W_O| with the share of the output: {both}. Of the weight and of
the share, {"; ".join(correlations) or "the scan has no statistic to compare with"}."""
    columns = (
        Column("share", "share", "of the layer's output, by norms"),
        Column("weight", "", "static weight in the output projection, |W_O|"),
        Column("output", "norm", "mean norm of what the head adds, = value x place x agreement"),
        Column("value", "norm", "mean norm of a token's value, moved to the output"),
        Column(
            "place", "ratio", "norm of the values looked at over that of all: below 1, attention lies on small ones"
        ),
        Column("agreement", "ratio", "norm of the sum over the sum of norms: small where values cancel out"),
        Column("sink", "probability", "attention on the token that receives most of it"),
        Column("sink_value", "ratio", "norm of that token's value over the mean of its text"),
    )
    tables = {column.name: getattr(found, column.name) for column in columns}
    return [_result(subject, "output_weight", "Output weight", text, columns, subject.heads(found.layers, tables))]


def _mixing(subject: Subject) -> list[Result]:
    found = mixing_ratio(subject.loaded.model, subject.watched())
    ratios = ", ".join(f"{ratio:.2f}" for ratio in found.layer.tolist())
    text = f"""How much of what a token is after a layer's attention comes from other tokens: the norm of what they give
over that and the norm of what the token keeps, residual and normalisation taken in (Kobayashi et al. 2021). 0 = the
token keeps to itself. Of each head as if it were the only one.

All heads of a layer together, layer by layer: {ratios} ({", ".join(dict.fromkeys(found.kind))})."""
    columns = (Column("ratio", "share", "of a token's new state that comes from other tokens"),)
    data = subject.heads(found.layers, {"ratio": found.head})
    return [_result(subject, "mixing", "Mixing with other tokens", text, columns, data)]


def _positional(subject: Subject) -> list[Result]:
    found = positional_heads(subject.loaded.model, subject.watched())
    data: dict[str, Sequence[Any]] = {
        "layer": [subject.number(head.module) for head in found],
        "module": [head.module for head in found],
        "head": [head.head for head in found],
        "share": [head.share for head in found],
        "offset": [float(head.offset) for head in found],
    }
    holders = sum(head.holds for head in found)
    text = f"""The offset from a token to the one it looks at most that is commonest for a head, and the share of tokens
for which it is that one. Voita et al. 2019 call a head positional from {found[0].threshold:.0%} on: {holders} of
{len(found)} are."""
    columns = (
        Column("share", "share", "of tokens whose largest attention is at the commonest offset"),
        Column("offset", "tokens", "that offset: -1 is the token before", zero=True),
    )
    return [_result(subject, "positional", "Positional heads", text, columns, data)]


def _similarity(subject: Subject) -> list[Result]:
    heads = subject.loaded.layers * subject.loaded.heads
    cost = sum(heads**2 * _probabilities(batch) for batch in subject.batches)
    step = max(1, math.ceil(cost / _MOST_PAIRS))
    found = head_distances(subject.loaded.model, subject.watched(step))
    apart = found.mean
    number = max(1, round(math.sqrt(len(found.heads) / 2)))
    root = apart.sqrt()
    x, y = coordinates(root, 2).T if len(found.heads) > 1 else torch.zeros(2, len(found.heads))
    modules = [module for module, _ in found.heads]
    places: dict[str, list[Any]] = {
        "layer": [subject.number(module) for module in modules],
        "module": modules,
        "head": [head for _, head in found.heads],
    }
    text = f"""How differently heads attend: the Jensen-Shannon divergence of their attention at the same token, mean
over {found.rows:,} tokens, from 0 to log 2 = 0.69 nats (Clark et al. 2019). In the plane, heads are as far apart as
the root of it, as well as two dimensions can show (classical scaling); groups join the two nearest by mean distance
until {number} are left."""
    columns = (
        Column("x", "", "place in the plane", zero=True),
        Column("y", "", "place in the plane", zero=True),
        Column("cluster", "", "number of the group of heads that attend alike"),
        Column("nearest", "nats", "divergence from the head that attends most alike"),
    )
    nearest = apart.clone().fill_diagonal_(torch.inf).min(1).values if len(apart) > 1 else torch.full((1,), torch.nan)
    numbers = {"x": x, "y": y, "cluster": clusters(root, number), "nearest": nearest}
    data = {**places, **{name: table.double().tolist() for name, table in numbers.items()}}
    first, second = torch.triu_indices(len(apart), len(apart), 1).tolist()
    pairs = {name: [values[place] for place in first] for name, values in places.items()}
    pairs |= {f"other_{name}": [values[place] for place in second] for name, values in places.items()}
    pairs["divergence"] = apart[first, second].tolist()
    column = Column("divergence", "nats", "mean Jensen-Shannon divergence of the two heads' attention")
    title = "Similar heads"
    return [
        _result(subject, "similarity", title, text, columns, data, plane=("x", "y")),
        _result(subject, "head_distances", "Distances between heads", text, (column,), pairs, kind=PAIRS),
    ]


def _importance_of(subject: Subject) -> Tensor:
    objective = subject.objective
    if objective.total is not None:
        return head_importance(objective.model, subject.few, objective.total)
    return leave_one_out(objective.model, subject.few, objective.loss)


def _importance(subject: Subject) -> list[Result]:
    objective = subject.objective
    how = (
        "mean over tokens of the absolute derivative of a document's summed loss by a gate on the head (Michel et al. "
        "2019)"
        if objective.total is not None
        else "rise of the loss when that head alone is taken away (Michel et al. 2019), for the checkpoint has no "
        "language-modelling head to take a loss of"
    )
    table = _importance_of(subject)
    text = f"""How much the model depends on each head: {how}.

The loss: {objective.what} ({objective.unit})."""
    unit = objective.unit
    columns = (Column("importance", unit, "how much the loss depends on the head", zero=objective.total is None),)
    data = subject.heads(_layers(subject), {"importance": table})
    importance = _result(subject, "importance", "Importance", text, columns, data)
    return [importance, _pruning(subject, table)]


def _pruning(subject: Subject, importance: Tensor) -> Result:
    objective = subject.objective
    rankings = _rankings(subject, importance)
    heads = int(importance.isfinite().sum())
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
    return _result(subject, "pruning", "Loss against heads removed", text, columns, data, kind=CURVE)


def _rankings(subject: Subject, importance: Tensor) -> dict[str, Tensor]:
    """Name -> numbers (layers, heads), the smallest of which go first."""
    found = {"importance": importance}
    weight = output_weight(subject.loaded.model, subject.few)
    layers = _layers(subject)
    if list(weight.layers) == layers:
        found |= {"share": weight.share, "weight": weight.weight}
    breadth = subject.table("relative_entropy", layers, importance.shape[1])
    if torch.equal(breadth.isnan(), importance.isnan()):
        found["broad"] = -breadth
    random = torch.rand(importance.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {**found, "random": random.masked_fill(importance.isnan(), torch.nan)}


def _groups(subject: Subject) -> list[Result]:
    found = group_preference(subject.run, permutations=_PERMUTATIONS)
    stats = [stat for stat in dict.fromkeys(one.stat for one in found.heads) if stat not in _UNTOLD]
    heads = [one for one in found.heads if one.call == 0]
    keys = sorted({(one.layer, one.module, one.head) for one in heads}, key=lambda key: (key[0], key[2]))
    by_key = {(one.stat, one.layer, one.module, one.head): one for one in heads}
    data: dict[str, list[Any]] = {
        name: [key[place] for key in keys] for place, name in enumerate(("layer", "module", "head"))
    }
    columns = []
    for stat in stats:
        ones = [by_key.get((stat, *key)) for key in keys]
        data[stat] = [math.nan if one is None else one.eta_squared for one in ones]
        columns.append(Column(stat, "share", f"of the variance of {stat} that lies between groups"))
        if not found.why_untested:
            name = f"{stat}_p"
            data[name] = [math.nan if one is None or one.p_corrected is None else one.p_corrected for one in ones]
            columns.append(Column(name, "p", f"of {stat}, by permutation, corrected for all heads"))
    sizes = ", ".join(f"{group} {size:,}" for group, size in found.sizes.items())
    what = "rows" if found.why_untested else "documents"
    tested = f"Nothing is tested: {found.why_untested}." if found.why_untested else (
        f"Of {len(heads)} heads and statistics {len(found.found())} have a corrected p of at most 0.05."
    )  # fmt: skip
    text = f"""Whether heads behave otherwise in one group of documents than in another: the share of a statistic's
variance over {what} that lies between groups (eta squared). Chance alone gives {found.expected:.3f} on average. p
by exchanging which group a document is of, corrected for the number of heads (Westfall and Young 1993).

Groups: {sizes} ({what}). {tested}"""
    return [_result(subject, "groups", "Preferences for groups", text, tuple(columns), data)]


def _once(subject: Subject) -> int:
    return len(subject.batches)


def _forwards(subject: Subject) -> int:
    """Of importance and its curves."""
    heads = subject.loaded.layers * subject.loaded.heads
    alone = 1 if subject.objective.total is not None else heads + 1
    return len(subject.few) * (alone + len(_RANKINGS) * len(_steps(heads)))


def _steps(heads: int) -> list[int]:
    count = min(_STEPS_OF_A_CURVE, heads)
    return sorted({round(heads * place / count) for place in range(count + 1)})


def _layers(subject: Subject) -> list[str]:
    """Names of the attention modules in order of definition."""
    return [block.name for block in attention_blocks(subject.loaded.model)]


def _probabilities(batch: Mapping[str, Tensor]) -> int:
    tokens = batch.get("input_ids")
    return 0 if tokens is None else tokens.shape[0] * tokens.shape[1] ** 2


def _tables(subject: Subject) -> dict[str, Any]:
    return {"heads_sha256": subject.run.scan["heads_sha256"], **subject.run.scan.get("tables_sha256", {})}


def _result(
    subject: Subject,
    name: str,
    title: str,
    text: str,
    columns: tuple[Column, ...],
    data: Mapping[str, Sequence[Any]],
    *,
    kind: str = HEADS,
    plane: tuple[str, ...] = (),
) -> Result:
    analysis = next(one for one in ANALYSES if name in one.writes)
    paragraphs = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return Result(name, title, paragraphs, kind, columns, data, plane, analysis.made_from(subject))


ANALYSES: tuple[Analysis, ...] = (
    Analysis("circuits", ("circuits",), _circuits, data=False),
    Analysis("composition", ("composition",), _composition, data=False),
    Analysis("groups", ("groups",), _groups, data=False),
    Analysis("output_weight", ("output_weight",), _output_weight, _once),
    Analysis("mixing", ("mixing",), _mixing, _once),
    Analysis("positional", ("positional",), _positional, _once),
    Analysis("similarity", ("similarity", "head_distances"), _similarity, _once),
    Analysis("importance", ("importance", "pruning"), _importance, _forwards),
)
"""From the cheapest on."""
