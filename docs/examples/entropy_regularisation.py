"""Entropy regularisation: a term of the loss that keeps heads from collapsing onto single keys.

With `differentiable=True` the statistics of the newest call carry gradients, so that a loss may contain them: here it
is lowered by a weight times the mean entropy (nats) of all heads and rows. The gradient is computed in attention's own
backward, without the N x N map. (Zhai et al. 2023 describe the collapse; their remedy is another one.)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attncap

STEPS = 60
SPEC = attncap.StatSpec(max=False, sink=0, diagonal=None, topk=0)  # the entropy alone


def train(weight: float) -> tuple[list[float], float]:
    """(mean entropy of every step, loss of the last one) of a small model that learns a few sequences by heart."""
    torch.manual_seed(0)
    texts = torch.randint(0, 40, (8, 32))
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    history = []
    with attncap.capture(model, SPEC, keep="last", differentiable=True) as cap:
        for _ in range(STEPS):
            loss = model(texts, labels=texts).loss
            entropy = torch.stack([cap.stats[name].entropy.mean() for name in cap.layers]).mean()
            (loss - weight * entropy).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(entropy.item())
    return history, loss.item()


free, regularised = train(weight=0.0), train(weight=0.1)
for name, (history, loss) in (("without", free), ("with", regularised)):
    said = "  ".join(f"{history[step]:.2f}" for step in range(9, STEPS, 10))
    print(f"{name:<8} regularisation: mean entropy every 10 steps {said}, loss {loss:.3f}")
