"""Results of analyses of a run's heads, with the words that the report shows; see `attncap.analysis.catalogue`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attncap.analysis.blocks import attention_blocks
from attncap.analysis.circuits import circuits, composition
from attncap.analysis.groups import group_preference
from attncap.analysis.mixing import mixing_ratio
from attncap.analysis.output_weight import output_weight, rank_correlation
from attncap.analysis.patterns import positional_heads
from attncap.analysis.results import GROUP, PAIRS, Column, Result, described
from attncap.analysis.similarity import clusters, coordinates, head_distances
from attncap.analysis.subject import Subject
from attncap.analysis.syntax import dependency_accuracy, read_conllu, word_encoder
from attncap.types import UnsupportedError

PERMUTATIONS = 2000
_MOST_PAIRS = 1e10  # of heads, times probabilities: a minute or two of a core
_FEWEST_DEPENDENCIES = 10  # of a relation whose best head is worth naming
_UNTOLD = ("lse", "max_logit", "collision", "topk_mass", "received_mass", "null_mass")  # of groups


def circuits_results(subject: Subject) -> list[Result]:
    """From the weights: copying scores and norms."""
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
    return [described("circuits", "Circuits", text, columns, subject.heads(found.layers, tables))]


def composition_results(subject: Subject) -> list[Result]:
    """From the weights: which heads read what earlier ones write."""
    tables = {kind: composition(subject.loaded.model, kind) for kind in "qkv"}
    layers = subject.layers
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
    return [described("composition", "Composition of heads", text, columns, data, kind=PAIRS)]


def output_weight_results(subject: Subject) -> list[Result]:
    """Each head's share of its layer's output, and why it is large or small."""
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
    return [described("output_weight", "Output weight", text, columns, subject.heads(found.layers, tables))]


def mixing_results(subject: Subject) -> list[Result]:
    """How much of a token's new state comes from others."""
    found = mixing_ratio(subject.loaded.model, subject.watched())
    ratios = ", ".join(f"{ratio:.2f}" for ratio in found.layer.tolist())
    text = f"""How much of what a token is after a layer's attention comes from other tokens: the norm of what they give
over that and the norm of what the token keeps, residual and normalisation taken in (Kobayashi et al. 2021). 0 = the
token keeps to itself. Of each head as if it were the only one.

All heads of a layer together, layer by layer: {ratios} ({", ".join(dict.fromkeys(found.kind))})."""
    columns = (Column("ratio", "share", "of a token's new state that comes from other tokens"),)
    data = subject.heads(found.layers, {"ratio": found.head})
    return [described("mixing", "Mixing with other tokens", text, columns, data)]


def positional_results(subject: Subject) -> list[Result]:
    """The commonest offset of each head's largest attention."""
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
    return [described("positional", "Positional heads", text, columns, data)]


def similarity_results(subject: Subject) -> list[Result]:
    """Distances between heads, groups of them, and places in the plane."""
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
        described("similarity", title, text, columns, data, plane=("x", "y")),
        described("head_distances", "Distances between heads", text, (column,), pairs, kind=PAIRS),
    ]


def groups_results(subject: Subject) -> list[Result]:
    """Shares of variance between the scan's groups of documents."""
    found = group_preference(subject.run, permutations=PERMUTATIONS)
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
    return [described("groups", "Preferences for groups", text, tuple(columns), data)]


def syntax_results(subject: Subject) -> list[Result]:
    """How well heads find the dependencies of given sentences."""
    if subject.loaded.tokenizer is None or not subject.loaded.tokenizer.is_fast:
        raise UnsupportedError("model: has no fast tokenizer, which is what tells the words of tokens")
    sentences = read_conllu(subject.conllu)
    encode = word_encoder(subject.loaded.tokenizer, subject.loaded.device, subject.loaded.max_tokens)
    found = dependency_accuracy(subject.loaded.model, encode, sentences)
    best = [
        f"{one.relation} ({one.count:,}) layer {subject.number(one.module)} head {one.head}, {one.direction}, "
        f"{one.accuracy:.2f} against {one.baseline:.2f} of offset {one.offset:+d}"
        for one in found.best(_FEWEST_DEPENDENCIES)
    ]
    text = f"""How often the word a head looks at most is the one that a word depends on, by relation (Clark et al.
    2019), and the other way round: the word that looks at it most. Attention between words is summed over the tokens
    looked at and averaged over those that look.

    {len(sentences):,} sentences, {found.left_out:,} of them left out. The best of many heads is good by chance where a
    relation has few dependencies. The best heads: {"; ".join(best) or "no relation is there often enough"}."""
    columns = (
        Column("to_head", "share", "of words whose largest attention is on the word they depend on"),
        Column("from_head", "share", "of words that are looked at most by the word they depend on"),
        Column("baseline", "share", "of words whose head is at the commonest offset"),
    )
    data: dict[str, list[Any]] = {
        name: [] for name in ("layer", "module", "head", GROUP, "to_head", "from_head", "baseline")
    }
    for place, relation in enumerate(found.relations):
        to_head, from_head = found.accuracy[place]
        baseline = torch.full_like(to_head, found.baseline[place]).masked_fill(to_head.isnan(), torch.nan)
        part = subject.heads(found.layers, {"to_head": to_head, "from_head": from_head, "baseline": baseline})
        part[GROUP] = [relation] * len(part["layer"])
        for name, values in data.items():
            values += part[name]
    return [described("syntax", "Dependencies", text, columns, data)]


def _probabilities(batch: Mapping[str, Tensor]) -> int:
    tokens = batch.get("input_ids")
    return 0 if tokens is None else tokens.shape[0] * tokens.shape[1] ** 2
