"""What a scan is going to be: its tags, whether the model can be captured, scan.json, and which runs are the same."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

import attncap
from attncap import dispatch, tags
from attncap.annotations import TagFunction
from attncap.capture import Capture
from attncap.corpus import Corpus, ShardSize, Survey
from attncap.extras import require
from attncap.models import LoadedModel, ModelError
from attncap.shards import Work
from attncap.store import RUN_FORMAT
from attncap.types import StatSpec, UnsupportedError
from attncap.validation import Extras

DEFAULT_TAGS = ("induction", "duplicate", "special_tokens")
TAG_NAMES = (*DEFAULT_TAGS, "segment")

# A finished run is what it is; another version only matters where it would add to what an earlier one began.
_MATTERS_WHILE_RUNNING = ("versions.", "impl")


def tag_functions(
    loaded: LoadedModel, wanted: tuple[str, ...] | None, say: Callable[[str], None]
) -> dict[str, TagFunction]:
    """The functions behind the names of tags; None stands for `DEFAULT_TAGS`, less what the tokenizer does not allow.

    Raises:
        ModelError: a tag that was asked for needs what the tokenizer does not give.
    """
    found: dict[str, TagFunction] = {}
    for name in DEFAULT_TAGS if wanted is None else wanted:
        lacking = _lacking(name, loaded.tokenizer)
        if lacking is None:
            found[name] = _tag_function(name, loaded.tokenizer)
        elif wanted is None:
            say(f"{loaded.name}: {lacking}; going on without the tag {name}")
        else:
            raise ModelError(f"{loaded.name}: {lacking}; leave {name} out of --tags")
    return found


def _lacking(tag: str, tokenizer: Any) -> str | None:
    """Why a tag is not to be had with a tokenizer."""
    if tokenizer is None:
        return "it reads images, which have no tokens"
    if tag == "special_tokens" and not tokenizer.all_special_ids:
        return "its tokenizer has no special tokens"
    if tag == "segment" and "token_type_ids" not in tokenizer.model_input_names:
        return "its tokenizer gives no token_type_ids, so there are no segments"
    return None


def _tag_function(name: str, tokenizer: Any) -> TagFunction:
    if name == "special_tokens":
        return tags.token_set(tokenizer.all_special_ids)
    ready: dict[str, TagFunction] = {
        "induction": tags.induction,
        "duplicate": tags.duplicate,
        "segment": tags.segment,
    }
    return ready[name]


def check_capturable(loaded: LoadedModel, spec: StatSpec, functions: Mapping[str, TagFunction]) -> None:
    """Open a capture once, before anything is read or written.

    Raises:
        ModelError: the model's attention cannot be captured.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of is said when the scan opens its own
            with Capture(loaded.model, spec, tags=functions):
                pass
    except UnsupportedError as error:
        raise ModelError(f"{loaded.name}: cannot be scanned ({error})") from error


def make_plan(
    work: Work, corpus: Corpus, survey: Survey, size: ShardSize, model_options: Mapping[str, Any]
) -> dict[str, Any]:
    """scan.json as it stands before the first shard."""
    loaded = work.loaded
    dtype = next(loaded.model.parameters()).dtype
    return {
        "format": RUN_FORMAT,
        "status": "running",
        "model": {
            "name": loaded.name,
            "fingerprint": loaded.fingerprint,
            "architecture": loaded.architecture,
            "layers": loaded.layers,
            "heads": loaded.heads,
        },
        "corpus": {
            "sources": list(corpus.sources),
            "fingerprint": survey.fingerprint,
            "options": asdict(corpus.options),
            "documents": survey.documents,
            "groups": survey.groups,
            "faults": list(survey.faults),
        },
        "spec": {**asdict(work.spec), "offsets": list(work.spec.offsets)},
        "tags": list(work.tags),
        "features": [],
        "limits": {"max_tokens": work.max_tokens},
        "options": {
            "shard": asdict(size),
            "batch_tokens": work.batch_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": work.device.type,
            "keep": list(work.keep),
            "model": dict(model_options),
            **({"tensor_parallel": work.team.size} if work.team.size > 1 else {}),
        },
        "versions": {
            "attncap": attncap.__version__,
            "attncap_kernels": dispatch.kernel_hash(),
            "torch": str(torch.__version__),
            "transformers": require("transformers", "scan").__version__,
            "python": platform.python_version(),
        },
        "impl": _implementation(work, dtype),
        "counts": {"empty_documents": survey.empty, "failed_documents": survey.failed},
        "progress": {},
        "heads_sha256": None,
    }


PLAIN_ROWS = 512


def _implementation(work: Work, dtype: torch.dtype) -> str:
    """What auto takes for a plain call of the model's layers, which decides the bits of the results."""
    config, heads = work.loaded.model.config, work.loaded.heads
    head_dim = getattr(config, "head_dim", None) or max(1, getattr(config, "hidden_size", heads) // heads)
    # As many rows as documents have: kernels that are made for many leave few to others.
    tensor = torch.empty(1, 1, PLAIN_ROWS, head_dim, dtype=dtype, device=work.device)
    return dispatch.choose("auto", tensor, tensor, tensor, work.spec, Extras())


def identity(scan_json: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run. Names are left out: contents have fingerprints."""
    kept = ("format", "spec", "tags", "features", "limits", "options", "versions", "impl")
    found = {name: scan_json.get(name) for name in kept}
    for name in ("model", "corpus"):
        part = dict(scan_json.get(name) or {})
        for incidental in ("name", "sources", "faults"):
            part.pop(incidental, None)
        found[name] = part
    return found


def differences(known: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """In what the run of a scan.json is another one than the planned; empty where it is the same."""
    complete = known.get("status") == "complete"
    before, now = _flat(identity(known)), _flat(identity(plan))
    return [
        f"{name} is {_short(before.get(name))} there and {_short(now.get(name))} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not (complete and name.startswith(_MATTERS_WHILE_RUNNING))
    ]


def names_another(damaged: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """Whether what is left of a scan.json has the fingerprint of another model or corpus."""
    parts = [(damaged.get(name), plan[name]["fingerprint"]) for name in ("model", "corpus")]
    return any(isinstance(part, Mapping) and part.get("fingerprint", now) != now for part, now in parts)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    """A value for a message; of a digest the beginning is enough."""
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text
