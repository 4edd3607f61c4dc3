"""Recomputation inside recomputation, again and again, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import MixtureOfDepths, MixtureOfExperts, RoutingTape, SkipLayer, checkpoint
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.recompute import recomputing

DIM = 16


class Residual(nn.Module):
    """x + tanh(W x)."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x).tanh()


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "depths": lambda: MixtureOfDepths(Residual(), DIM, capacity=0.5),
    "experts": lambda: MixtureOfExperts(DIM, 24, 4, top_k=1, jitter=0.2),
    "skip": lambda: SkipLayer(Residual(), DIM, keys="executing"),
    "both": lambda: SkipLayer(
        MixtureOfDepths(Residual(), DIM, capacity=0.5), DIM, keys="executing"
    ),
}


def gradients(
    module: nn.Module, wrap: Callable[..., Any], backwards: int
) -> tuple[Tensor, list[Tensor]]:
    """Output and summed gradients of the input and of every parameter."""
    torch.manual_seed(1)
    x = torch.randn(2, 8, DIM, requires_grad=True)
    leaves = [x, *module.parameters()]
    torch.manual_seed(2)
    with RoutingTape() as tape:
        y = wrap(module, x)
        loss = y.square().sum() + tape.loss()
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for number in range(backwards):
        last = number == backwards - 1
        grads = torch.autograd.grad(loss, leaves, retain_graph=not last, allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            sum_ += 0 if grad is None else grad
    return y.detach(), total


def plainly(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).tanh()


def once(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(plainly, module, x)


def nested(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: checkpoint(module, x).tanh(), x)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("wrap", [once, nested])
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_without_recomputation(
    name: str, wrap: Callable[..., Any], backwards: int
) -> None:
    torch.manual_seed(0)
    module = MAKERS[name]()
    expected, expected_grads = gradients(module, plainly, backwards)
    got, grads = gradients(module, wrap, backwards)
    assert torch.equal(got, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-6)


def test_a_first_pass_inside_a_repetition_repeats() -> None:
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(recomputing())
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(lambda x: checkpoint(inner, x).cos(), x).sum().backward()
    assert seen[0] is False
    assert all(seen[1:])


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("name", ["dense", "depths"])
def test_a_recomputing_decoder_compiles(name: str, taped: bool) -> None:
    from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig

    torch.manual_seed(0)
    depths = MixtureOfDepthsConfig(capacity=0.5) if name == "depths" else None
    config = DecoderConfig(
        dim=DIM, num_layers=2, num_heads=2, vocab_size=32, mixture_of_depths=depths, recompute=True
    )
    model = Decoder(config)
    ids = torch.randint(32, (2, 8))

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        if taped:
            with RoutingTape(model) as tape:
                loss = call(ids).square().sum() + tape.loss()
        else:
            loss = call(ids).square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = run(model)
    torch._dynamo.reset()
    got = run(torch.compile(model, backend="aot_eager"))
    assert len(got) == len(expected)
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)
