"""`model.generate` inside a capture: the same tokens, and the statistics of prefill and decode told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import attncap
from tests import maps, models
from tests.architectures import ARCHITECTURES, SERVED, inputs
from tests.test_architectures import built, capturing

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

NEW = 5
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
}
GENERATING = [entry.name for entry in SERVED if entry.family in ("decoder", "encoder-decoder")]
GENERATING += ["whisper", "moonshine", "speech_to_text", "llava", "qwen2_vl", "gemma3", "mllama", "idefics"]
SPECIAL = ["llama", "mistral", "gemma2", "gpt_oss", "cohere2", "deepseek_v3", "falcon", "t5", "whisper"]
CASES = [(name, mode) for name in GENERATING for mode in MODES if name in SPECIAL or mode in ("static", "beams")]
NOT_THE_PROMPT = ("use_cache", "decoder_input_ids", "decoder_attention_mask")


def prompt_of(name: str, model: Any) -> dict[str, Any]:
    """A padded batch to go on from: sources are padded on the right, prompts on the left."""
    entry = ARCHITECTURES[name]
    padding = "left" if "left" in entry.paddings and entry.family != "encoder-decoder" else "right"
    batch = inputs.inputs_of(entry, model, padding).batch
    return {argument: value for argument, value in batch.items() if argument not in NOT_THE_PROMPT}


def generate(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """(sequences, tokens); never ends before NEW tokens."""
    torch.manual_seed(0)
    options = {"do_sample": False, "disable_compile": True, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=NEW, **options)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_tokens_are_those_without_a_capture(name: str, mode: str) -> None:
    model = built(name)
    batch = prompt_of(name, model)
    # In some releases sdpa leaves out the softcap, which a capture applies as eager attention does.
    plain = maps.eager(model) if name == "gemma2" else model
    try:
        expected = generate(plain, batch, **MODES[mode])
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"Transformers {transformers.__version__} cannot do this itself: {error}")
    cap, context = capturing(ARCHITECTURES[name], model)
    with context, cap:
        assert torch.equal(generate(model, batch, **MODES[mode]), expected)
    assert (cap.count("entropy", phase="decode").sum(1) > 0).any()


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gemma4_text", "falcon", "t5", "bart"]
)
def test_both_phases_are_those_of_the_eager_maps(name: str) -> None:
    model = built(name)
    twin, batch = maps.eager(model), prompt_of(name, model)
    with maps.eager_calls(twin) as calls:
        expected = generate(twin, batch)
    with attncap.capture(model, maps.FULL, keep="all") as cap:
        assert torch.equal(generate(model, batch), expected)
    prompt = batch["attention_mask"].bool()
    for layer, module in enumerate(cap.layers):
        crosses = "encoder_attn" in module or "EncDecAttention" in module
        decoded, position = {"prefill": [], "decode": []}, 0
        for stats, call in zip(cap.stats[module], calls[module], strict=True):
            rows, keys = call.prob.shape[2:]
            counted = prompt if rows == prompt.shape[1] else torch.ones(inputs.BATCH, rows, dtype=torch.bool)
            maps.assert_stats_match(
                stats, call.prob, counted, lse=call.lse, offset=position if crosses else keys - rows
            )
            entropy = maps.entropy_of(stats, call.prob).transpose(0, 1)[:, counted]
            decoded["decode" if position and rows == 1 else "prefill"].append(entropy)
            position += rows
        for phase, values in decoded.items():
            kept = torch.cat(values, -1) if values else torch.zeros(call.prob.shape[1], 0)
            assert cap.count("entropy", phase)[layer].tolist() == [kept.shape[1]] * kept.shape[0]
            torch.testing.assert_close(
                cap.mean("entropy", phase)[layer], kept.double().mean(-1), **maps.TOLERANCE, equal_nan=True
            )


@pytest.mark.parametrize("name", SPECIAL)
def test_a_static_cache_gives_the_statistics_of_a_dynamic_one(name: str) -> None:
    model = built(name)
    batch, found = prompt_of(name, model), []
    for mode in ("greedy", "static"):
        with attncap.capture(model, maps.FULL) as cap:
            generate(model, batch, **MODES[mode])
        found.append(cap)
    dynamic, static = found
    received = () if name in ("falcon", "whisper", "t5") else ("received_mass",)
    of_rows = ("entropy", "relative_entropy", "diagonal_mass", "distance", "offset_mass[-1]", "max_prob", "lse")
    for stat in (*of_rows, *received):
        for phase in ("prefill", "decode", None):
            assert torch.equal(dynamic.count(stat, phase), static.count(stat, phase))
            one, other = dynamic.mean(stat, phase), static.mean(stat, phase)
            torch.testing.assert_close(one, other, **maps.TOLERANCE, equal_nan=True)


def test_the_phases_add_up_to_the_whole() -> None:
    model = built("llama")
    batch = prompt_of("llama", model)
    with attncap.capture(model) as cap:
        generate(model, batch)
    prefill, decode = (cap.count("entropy", phase) for phase in ("prefill", "decode"))
    assert (prefill == batch["attention_mask"].sum()).all()
    assert (decode == inputs.BATCH * (NEW - 1)).all()  # the prompt gave the first token
    assert torch.equal(cap.count("entropy"), prefill + decode)
    parts = prefill * cap.mean("entropy", "prefill") + decode * cap.mean("entropy", "decode")
    torch.testing.assert_close(cap.mean("entropy"), parts / (prefill + decode))
    assert cap.accumulator.modules == cap.layers
    assert cap.accumulator.groups == ("all",)


def test_several_rows_after_a_cache_are_prefill() -> None:
    model = built("llama")
    ids = models.tokens(2, 9, seed=1)["input_ids"]
    with attncap.capture(model) as cap, torch.no_grad():
        past = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:8], past_key_values=past)
        model(ids[:, 8:], past_key_values=past)
    assert (cap.count("entropy", phase="prefill") == 2 * 8).all()
    assert (cap.count("entropy", phase="decode") == 2).all()


def test_layers_keep_their_places_in_a_phase_in_which_they_did_not_run() -> None:
    model = built("bart")
    with attncap.capture(model) as cap:
        generate(model, prompt_of("bart", model))
    decoded = cap.count("entropy", phase="decode")
    for layer, name in enumerate(cap.layers):
        assert bool(decoded[layer].any()) == name.startswith("model.decoder")
        assert bool(cap.mean("entropy", phase="decode")[layer].isnan().all()) == name.startswith("model.encoder")


def test_a_phase_that_did_not_run_has_counted_nothing() -> None:
    model = built("llama")
    with attncap.capture(model) as cap, torch.no_grad():
        model(**models.tokens(2, 4, seed=1))
    assert (cap.count("entropy", phase="prefill") == 8).all()
    assert (cap.count("entropy", phase="decode") == 0).all()
    assert cap.mean("entropy", phase="decode").shape == cap.mean("entropy").shape
    assert cap.mean("entropy", phase="decode").isnan().all()
    with pytest.raises(ValueError, match="phase: expected one of prefill, decode or None, got 'training'"):
        cap.mean("entropy", phase="training")
    with pytest.raises(ValueError, match="stat: expected one of"):
        cap.mean("distance", phase="decode")
