"""What a `Monitor` costs a training step: captured steps, steps between them, and a report.

    python -m benchmarks.monitor_cpu [--rounds N] [--threads N] [--results FOLDER]

Twins of one Llama (4 layers of 8 heads, width 512, 4 sequences of 512 tokens, float32) are trained, taking turns: one
as it is, with torch's attention, one with a monitor that captures every step, one with a monitor between two of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attncap
from benchmarks.machine import describe, medians

LAYERS, HEADS, WIDTH, BATCH, LENGTH, VOCABULARY = 4, 8, 512, 4, 512, 2000


def trainer(every: int | None) -> tuple[Callable[[], None], attncap.Monitor | None]:
    """(what trains a model one step, its monitor)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    monitor = None if every is None else attncap.Monitor(model, every=every)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step()

    return step, monitor


def main() -> None:
    """Measure, say, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="folder for monitor_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, _ = trainer(None)
    captured, monitor = trainer(1)
    between, _ = trainer(10**9)
    between()  # the first step is captured
    assert monitor is not None
    seconds = medians({"plain": plain, "captured": captured, "between": between}, options.rounds)
    seconds |= medians({"report": monitor.report}, options.rounds)
    ratios = {name: seconds[name] / seconds["plain"] for name in ("captured", "between", "report")}
    ratios["every 10th step"] = (ratios["captured"] + 9 * ratios["between"]) / 10
    result = {"machine": describe(options.threads), "seconds": seconds, "over plain": ratios}
    print(json.dumps(result, indent=1))
    if options.results:
        (options.results / "monitor_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
