"""QK-clip (MuonClip, Kimi K2): a head whose largest attention score S passes a threshold has its query and key weights
scaled down, so that no score runs away.

After a step of the optimizer, for every head with S > tau: gamma = tau / S, and W_q and W_k of the head are multiplied
by sqrt(gamma), which divides its scores by S / tau. S comes from an `attncap.Monitor`, over all rows and sequences of
the step, and the clip waits for no device. Where heads share a key head, multiply W_q alone by gamma.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attncap

TAU, STEPS = 4.0, 60
SPEC = attncap.StatSpec(entropy=False, sink=0, diagonal=None, topk=0)  # the largest score alone


def clip(attentions: list[torch.nn.Module], largest: Tensor) -> None:
    """`largest` (layers, heads): of every head."""
    gamma = TAU / largest.clamp(min=TAU).float()
    for attention, factors in zip(attentions, gamma.sqrt(), strict=True):
        for projection in (attention.q_proj, attention.k_proj):
            rows = projection.weight.view(len(factors), -1)  # a head's rows lie together
            rows.mul_(factors[:, None])


def train(clips: bool) -> tuple[list[float], float]:
    """(the largest score of every step, loss of the last one) of a small model that learns a few sequences by heart."""
    torch.manual_seed(0)
    texts = torch.randint(0, 40, (8, 32))
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    history = []
    with attncap.Monitor(model, SPEC) as monitor:
        for _ in range(STEPS):
            loss = model(texts, labels=texts).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            largest = monitor.tensors()["max_logit"]
            if clips:
                with torch.no_grad():
                    clip([layer.self_attn for layer in model.model.layers], largest)
            history.append(float(largest.max()))
            monitor.reset()
    return history, float(loss.detach())


free, clipped = train(clips=False), train(clips=True)
for name, (history, loss) in (("without", free), ("with", clipped)):
    said = "  ".join(f"{history[step]:5.1f}" for step in range(9, STEPS, 10))
    print(f"{name:<8} QK-clip: largest score every 10 steps {said}, loss {loss:.2f}")
