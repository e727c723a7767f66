"""Facts about a run, and what stands out in it, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from attncap.analysis.roles import RoleResult
from attncap.progress import plural

# role -> what its heads have, after "N heads have"; only these make a sentence.
_HAVE = {
    "previous token": "more than half of {their} attention on the previous token",
    "next token": "more than half of {their} attention on the next token",
    "self": "more than half of {their} attention on the token itself",
    "sink": "more than 30% of {their} attention on the first tokens of the text",
    "induction": "more than 30% of {their} attention on what followed the token elsewhere, that on the next token "
    "subtracted",
    "duplicate": "more than 30% of {their} attention on other occurrences of the token",
    "special tokens": "more than half of {their} attention on special tokens",
    "broadest": "almost uniform attention (relative entropy above 0.90)",
    "narrowest": "almost all of {their} attention on very few tokens (relative entropy below 0.20)",
}

# Beyond this share of the keys, looking at a document's first tokens is hardly a choice.
_SHARE_OF_FIRST_TOKENS = 0.2


@dataclass(frozen=True)
class Fact:
    """A line of the page's header."""

    name: str
    value: str


@dataclass(frozen=True)
class Contrast:
    """A head whose mean of a statistic differs between two groups."""

    title: str
    label: str
    high: float
    high_group: str
    low: float
    low_group: str

    @property
    def sentence(self) -> str:
        """As the page says it."""
        return (
            f"Groups differ most at {self.label}: its mean of “{self.title}” is {self.high:.2f} for {self.high_group} "
            f"and {self.low:.2f} for {self.low_group}."
        )


def facts_of(scan: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Model, corpus, counts and versions, as far as scan.json has them."""
    model, corpus, counts = (scan.get(name) or {} for name in ("model", "corpus", "counts"))
    facts = [
        ("Architecture", model.get("architecture")),
        ("Size", _size(model.get("layers"), model.get("heads"))),
        ("Documents", _documents(counts)),
        ("Tokens", f"{counts['tokens']:,}" if "tokens" in counts else None),
        ("Statistics by", _flat(scan.get("impl"))),
        ("Versions", _flat(scan.get("versions"))),
        ("Model fingerprint", _short(model.get("fingerprint"))),
        ("Corpus fingerprint", _short(corpus.get("fingerprint"))),
    ]
    return tuple(Fact(name, str(value)) for name, value in facts if value)


def findings_of(
    scan: Mapping[str, Any],
    roles: Iterable[RoleResult],
    breadth: Mapping[int, float] | None = None,
    contrast: Contrast | None = None,
) -> tuple[str, ...]:
    """What stands out, a sentence each: roles that heads have, roles that none has, breadth by layer, caveats.

    Args:
        breadth: layer -> mean relative entropy of its heads.
        contrast: the head that tells groups apart most.
    """
    roles = tuple(roles)
    sentences = [sentence for result in roles if result.holders and (sentence := _held(result))]
    missing = [
        f"{result.role.name} (closest: {result.ranked[0].label}, {result.role.shown(result.ranked[0].mean)})"
        for result in roles
        if not result.holders
        and result.role.threshold is not None
        and result.role.name not in ("broadest", "narrowest")
    ]
    if missing:
        sentences.append(f"No head passes the threshold for: {'; '.join(missing)}.")
    sentences += _breadth(breadth or {})
    if contrast is not None:
        sentences.append(contrast.sentence)
    sentences += _caveats(scan.get("counts") or {}, int((scan.get("spec") or {}).get("sink", 0)))
    return tuple(sentences)


def _held(result: RoleResult) -> str | None:
    have = _HAVE.get(result.role.name)
    if have is None:
        return None
    holders, total, best = result.holders, len(result.ranked), result.ranked[0]
    strongest = f"{best.label} (mean {result.role.shown(best.mean)})"
    if len(holders) == 1:
        return f"One of {total} heads has {have.format(their='its')}: {strongest}."
    others = ", ".join(head.label for head in holders[1:4])
    more = f" and {len(holders) - 4} more" if len(holders) > 4 else ""
    return f"{len(holders)} of {total} heads have {have.format(their='their')}: {strongest}, {others}{more}."


def _breadth(by_layer: Mapping[int, float]) -> list[str]:
    if len(by_layer) < 2:
        return []
    broad, narrow = max(by_layer, key=by_layer.__getitem__), min(by_layer, key=by_layer.__getitem__)
    return [
        f"Attention is broadest in layer {broad} (mean relative entropy {by_layer[broad]:.2f}) "
        f"and narrowest in layer {narrow} ({by_layer[narrow]:.2f})."
    ]


def _caveats(counts: Mapping[str, Any], sink: int) -> list[str]:
    sentences = []
    documents, tokens = counts.get("documents", 0), counts.get("tokens", 0)
    if tokens and sink * documents / tokens > _SHARE_OF_FIRST_TOKENS:
        sentences.append(
            f"Documents have {tokens / documents:.1f} tokens on average: their first {plural(sink, 'token')} "
            f"make up to {min(1.0, sink * documents / tokens):.0%} of all keys, so that a role such as sink, previous "
            "token or narrowest says little here."
        )
    if cut := counts.get("truncated_documents"):
        were = "was" if cut == 1 else "were"
        sentences.append(
            f"{cut:,} of {plural(counts.get('documents', 0), 'document')} {were} cut at the model's length."
        )
    if lost := counts.get("nonfinite_rows"):
        sentences.append(
            f"{plural(lost, 'row')} of the heads left out, for they hold numbers that are not finite: what is shown is "
            "of the others. Scan with --dtype float32, and look at the weights if that changes nothing."
        )
    if failed := counts.get("failed_documents"):
        sentences.append(f"Documents that could not be read, and are not in these numbers: {failed:,}.")
    return sentences


def _documents(counts: Mapping[str, Any]) -> str | None:
    if "documents" not in counts:
        return None
    asides = [
        f"{counts[key]:,} {word}"
        for key, word in (("truncated_documents", "cut"), ("empty_documents", "empty"), ("failed_documents", "failed"))
        if counts.get(key)
    ]
    return f"{counts['documents']:,}" + (f" ({', '.join(asides)})" if asides else "")


def _size(layers: Any, heads: Any) -> str | None:
    if isinstance(heads, (list, tuple)) and heads:
        heads = heads[0] if len(set(heads)) == 1 else f"up to {max(heads)}"
    return f"{layers} layers of {heads} heads" if layers and heads else None


def _flat(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return None if value is None else str(value)


def _short(fingerprint: Any) -> str | None:
    return None if fingerprint is None else str(fingerprint)[:16]
