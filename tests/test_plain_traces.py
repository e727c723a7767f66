"""A capture of plain torch modules leaves nothing behind, and several at once do not mix."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attncap
from tests.plain import HEADS, WIDTH, Attention, seeded
from tests.traces import traces


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException] | None) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), Attention()).eval()
    tokens = seeded(22, 2, 5, WIDTH)
    with torch.no_grad():
        before, clean = model(tokens), traces(model)
        cap = attncap.capture(model)
        if error is None:
            with cap:
                model(tokens)
        else:
            raised = error

            def fail(*_: Any, **__: Any) -> Tensor:
                raise raised

            model[1].function = fail
            with pytest.raises(error), cap:
                model(tokens)
            model[1].function = F.scaled_dot_product_attention
        assert traces(model) == clean
        assert torch.equal(model(tokens), before)
        with cap:  # and the next forward is named right
            model(tokens)
    assert cap.layers == ("0.layers.0.self_attn", "0.layers.1.self_attn", "1")


def test_an_interrupt_inside_the_block_does_not_confuse_the_next_forward() -> None:
    model, tokens = nn.Sequential(nn.Sequential(Attention())), seeded(22, 2, 5, WIDTH)
    function = model[0][0].function

    def interrupt(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with torch.no_grad(), attncap.capture(model) as cap:
        model[0][0].function = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
        model[0][0].function = function
        model(tokens)
    assert cap.layers == ("0.0",)
    assert (cap.count("entropy") == 10).all()


def test_captures_of_two_models_at_once_do_not_mix() -> None:
    one, other = nn.Sequential(Attention()), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    tokens = seeded(23, 2, 5, WIDTH)
    with torch.no_grad(), attncap.capture(one) as outer, attncap.capture(other) as inner:
        for _ in range(2):
            other(tokens, tokens, tokens)
        one(tokens)
        with pytest.raises(RuntimeError, match="captured already"), attncap.capture(one[0]):
            pass
    assert (outer.layers, inner.layers) == (("0",), ("MultiheadAttention",))
    assert (outer.count("entropy") == 10).all()
    assert (inner.count("entropy") == 20).all()


def test_threads_may_run_the_model_and_others_are_left_alone() -> None:
    model, stranger, tokens = Attention(), Attention(), seeded(24, 2, 5, WIDTH)
    results: list[Tensor] = []

    def work(module: nn.Module) -> None:
        with torch.no_grad():
            results.extend(module(tokens) for _ in range(5))

    with torch.no_grad(), attncap.capture(model) as cap:
        threads = [threading.Thread(target=work, args=(one,)) for one in (model, model, model, stranger)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 20
        assert (cap.count("entropy") == 15 * 10).all()


def test_captures_in_several_threads_do_not_mix() -> None:
    tokens, counts = seeded(25, 2, 5, WIDTH), []

    def work(forwards: int) -> None:
        model = nn.Sequential(Attention())
        with torch.no_grad(), attncap.capture(model) as cap:
            for _ in range(forwards):
                model(tokens)
        counts.append((forwards, int(cap.count("entropy")[0, 0])))

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [(1, 10), (2, 20), (3, 30)]
