"""Threads that run one captured model at the same time: each has its own batch, and all are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncap
from tests import maps, models

KINDS = ("llama", "bert")


def interleaved(middle: nn.Module, first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
    """What both give, where `second` runs in a thread of its own while `first` waits before the module `middle`."""
    found: list[Any] = [None, None]
    meanwhile = threading.Thread(target=lambda: found.__setitem__(1, second()))

    def wait(_module: nn.Module, _args: Any) -> None:
        if threading.current_thread() is not meanwhile:
            meanwhile.start()
            meanwhile.join()

    handle = middle.register_forward_pre_hook(wait)
    try:
        found[0] = first()
    finally:
        handle.remove()
    assert meanwhile.ident is not None
    return found


def call(model: nn.Module, **batch: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            outputs = model(**batch)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_each_thread_of_a_transformers_model_has_its_own_batch(kind: str) -> None:
    model = models.text_model(kind)
    batches = [models.tokens(2, 7, seed=1, padding="right"), models.tokens(3, 9, seed=2, padding="right")]
    length = {"length": lambda batch: batch["input_ids"].float()}
    with attncap.capture(model, maps.FULL, features=length) as expected:
        wanted = [call(model, **batch)() for batch in batches]
    layers = dict(model.named_modules())
    middle = layers[expected.layers[1].rpartition(".self_attn")[0] or expected.layers[1]]
    with attncap.capture(model, maps.FULL, features=length) as cap:
        found = interleaved(middle, *(call(model, **batch) for batch in batches))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
    for stat in expected.accumulator.stats:
        assert torch.equal(cap.count(stat), expected.count(stat)), stat
        torch.testing.assert_close(cap.mean(stat), expected.mean(stat))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_thread_of_torchs_encoder_has_its_own_padding() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2).eval()
    padding = [torch.arange(6) >= torch.tensor([[6], [kept]]) for kept in (3, 5)]
    inputs = [{"src": torch.randn(2, 6, 16), "src_key_padding_mask": mask} for mask in padding]
    wanted = [call(encoder, **one)() for one in inputs]
    with attncap.capture(encoder) as cap:
        found = interleaved(encoder.layers[1], *(call(encoder, **one) for one in inputs))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (cap.count("entropy") == 6 + 3 + 6 + 5).all()


def test_no_call_of_many_threads_is_lost() -> None:
    model = models.text_model("llama")
    batch = models.tokens(1, 3, seed=1)

    def work() -> None:
        for _ in range(20):
            call(model, **batch)()

    with attncap.capture(model, attncap.StatSpec(), keep="all") as cap:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (cap.count("entropy") == 4 * 20 * 3).all()
    assert [len(cap.stats[name]) for name in cap.layers] == [80, 80]
