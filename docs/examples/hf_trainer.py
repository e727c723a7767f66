"""Transformers' Trainer: head statistics of every evaluation, in the metrics it logs.

The capture lies around `evaluate`, so training itself keeps the model's own attention and its gradients. A callback
would not do: Trainer calls none before an evaluation. For the steps of the training itself there is one,
`attncap.monitor.trainer_callback.MonitorCallback`.
"""

import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import attncap


class CapturingTrainer(Trainer):
    """Adds each layer's mean entropy, and the largest score of all, to the metrics of an evaluation."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with attncap.capture(self.model, attncap.StatSpec(topk=0)) as cap:
            metrics = super().evaluate(*args, **kwargs)
        for name, entropy in zip(cap.layers, cap.mean("entropy").nanmean(-1).tolist(), strict=True):
            metrics[f"eval_entropy/{name}"] = entropy
        metrics["eval_max_logit"] = cap.accumulator.table("max_logit", "max").max().item()
        self.log({name: value for name, value in metrics.items() if "entropy" in name or "logit" in name})
        return metrics


torch.manual_seed(0)
sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (24, 16)).repeat(1, 2)]

with tempfile.TemporaryDirectory() as folder:
    options: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(folder, num_train_epochs=2, eval_strategy="epoch", learning_rate=5e-3, **options)
    trainer = CapturingTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate()

for entry in trainer.state.log_history:
    for name in sorted(entry):
        if name.startswith("eval_entropy") or name == "eval_max_logit":
            print(f"epoch {entry['epoch']:.0f}  {name:<40}{entry[name]:.3f}")
