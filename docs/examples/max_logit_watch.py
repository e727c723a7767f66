"""A watch over training: the largest attention score of every head, as QK-clip wants it, every few steps.

The step itself runs without a capture, on the model's own attention; every few steps the same batch runs once more
under `no_grad` inside one. QK-clip (Kimi K2) takes the largest score over all rows and sequences of a head, and scales
the head's query and key weights down where it is beyond a threshold, 100 there.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attncap

THRESHOLD = 4.0  # low, so that this small model reaches it
EVERY = 5

torch.manual_seed(0)
sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))  # dropout is refused
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
spec = attncap.StatSpec(entropy=False, sink=0, diagonal=None, topk=0)  # the largest score alone

for step in range(1, 21):
    tokens = torch.randint(0, 40, (8, 16)).repeat(1, 2)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % EVERY:
        continue
    with torch.no_grad(), attncap.capture(model, spec, keep="last") as cap:
        model(tokens)
    largest = torch.stack([cap.stats[name].max_logit.amax((0, 2)) for name in cap.layers])  # (layers, heads)
    layer, head = divmod(int(largest.argmax()), largest.shape[1])
    beyond = int((largest > THRESHOLD).sum())
    print(f"step {step:>2}  largest {largest.max():.2f} in layer {layer} head {head}, {beyond} heads over {THRESHOLD}")
