"""What a capture of plain torch modules cannot see is named, and what it could mistake for attention is not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import attncap
from attncap import UnsupportedError
from tests.plain import WIDTH, Attention, seeded


class ByHand(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = F.dropout(torch.softmax(query @ key.transpose(-1, -2), dim=-1), 0.0)
        return (prob @ value).transpose(1, 2).flatten(2)


class ByEinsum(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = torch.einsum("bhqd,bhkd->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", prob, value).flatten(2)


class Turned(Attention):
    """The product of the transposed map and values, as models of pictures write it; fewer keys than rows."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.projected(tokens, tokens)
        prob = torch.softmax(query @ key[:, :, 1:].mT, dim=-1)
        return (value[:, :, 1:].mT @ prob.mT).permute(0, 3, 1, 2).flatten(2)


class LinearAttention(nn.Linear):
    pass


class ByFlex(Attention):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return flex_attention(*self.projected(tokens, tokens)).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_is_not_captured_is_named_once_with_the_reason() -> None:
    parts = {"hand": ByHand(), "einsum": ByEinsum(), "turned": Turned(), "flex": ByFlex()}
    parts |= {"linear": LinearAttention(WIDTH, WIDTH)}
    parts |= {"script": torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(1, WIDTH)), "good": Attention()}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    cap = attncap.capture(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torch.no_grad(), cap:
            model(seeded(16, 2, 5, WIDTH))
            model(seeded(16, 2, 5, WIDTH))
    (one,) = (warning for warning in told if "not captured" in str(warning.message))
    assert one.filename == __file__
    message = str(one.message)
    for name, reason in (
        ("hand", "multiplies a softmax itself"),
        ("einsum", "multiplies a softmax itself"),
        ("turned", "multiplies a softmax itself"),
        ("linear", "ran without an attention call"),
        ("flex", "calls flex_attention"),
        ("script", "is TorchScript"),
    ):
        assert f"{name} {reason}" in message
    assert "good" not in message
    assert cap.layers == ("good",)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        with torch.no_grad(), cap:
            model(seeded(16, 2, 5, WIDTH))
    assert not [warning for warning in again if "not captured" in str(warning.message)]


def test_a_model_of_which_nothing_can_be_captured_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"made no attention call .* ByHand multiplies a softmax itself"):  # noqa: SIM117
        with torch.no_grad(), attncap.capture(model := ByHand()):
            model(seeded(16, 2, 5, WIDTH))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(1, WIDTH))
    with pytest.raises(UnsupportedError, match=r"model: .* is TorchScript, inside which no call can be seen"):
        attncap.capture(scripted)


def test_calls_outside_every_module_are_named_where_nothing_else_was_captured() -> None:
    tokens = seeded(17, 1, 2, 5, 4)
    model = Attention()
    with pytest.warns(UserWarning, match=r"outside the forward of any module of the model \(1\)"):  # noqa: SIM117
        with attncap.capture(model):
            F.scaled_dot_product_attention(tokens, tokens, tokens)
    with torch.no_grad(), attncap.capture(model) as cap:
        F.scaled_dot_product_attention(tokens, tokens, tokens)
        model(seeded(17, 2, 5, WIDTH))
    assert (cap.count("entropy") == 10).all()


def test_a_softmax_that_is_no_attention_is_not_named() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.gate = Attention(), nn.Linear(WIDTH, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            tokens = self.attn(tokens)
            return torch.softmax(self.gate(tokens), dim=-1) * (tokens @ tokens.transpose(1, 2)).mean()

    model = Mixture()
    with torch.no_grad(), warnings.catch_warnings(), attncap.capture(model):
        warnings.simplefilter("error")
        model(seeded(18, 2, 5, WIDTH))
