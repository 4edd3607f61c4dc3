"""Losses of tokens in blocks: exact, in 32 bits, without another matrix as large as the logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive.ops.cross_entropy import cross_entropy

BLOCK = 1 << 18


@pytest.fixture(autouse=True)
def no_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is torch's."""
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)


def draw(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and weights of the losses."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = torch.randn(tokens, vocabulary, generator=generator) * 3
    return (
        logits,
        torch.randint(vocabulary, (tokens,), generator=generator),
        torch.rand(tokens, generator=generator) - 0.5,
    )


def exactly(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of their weighted sum, in float64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    (grad,) = torch.autograd.grad((losses * weights.double()).sum(), logits)
    return losses.detach(), grad


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [(0, 7), (1, 1), (1, 5), (37, 1000), (300, 1031), (3, BLOCK + 1)],
)
def test_losses_and_gradients_in_blocks(
    tokens: int, vocabulary: int, dtype: torch.dtype, overwrite: bool
) -> None:
    logits, targets, weights = draw(tokens, vocabulary)
    logits = logits.to(dtype).requires_grad_()
    losses = cross_entropy(logits * 1, targets, overwrite=overwrite)
    (losses * weights).sum().backward()
    expected, expected_grad = exactly(logits.detach(), targets, weights)
    assert losses.dtype == torch.float32
    assert logits.grad is not None
    # torch's own sum of very many exponentials is off by 2e-5 too.
    of_torch = F.cross_entropy(logits.detach().float(), targets, reduction="none")
    close = float((of_torch.double() - expected).abs().max()) if tokens else 0.0
    torch.testing.assert_close(losses.double(), expected, atol=1e-7 + close, rtol=0)
    rounding = 1e-6 + 2 * close if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.double(), expected_grad, atol=1e-7, rtol=rounding)


def test_logits_are_overwritten_only_where_that_is_said_and_they_are_nobody_elses() -> None:
    logits, targets, _ = draw(5, 11)
    kept = logits.clone()
    leaf = logits.requires_grad_()
    for computed, overwrite in ((leaf, True), (leaf * 1, False)):
        cross_entropy(computed, targets, overwrite=overwrite).sum().backward()
        assert torch.equal(computed.detach(), kept)
    one_row = (torch.zeros(11, requires_grad=True) * 1).expand(5, 11)
    cross_entropy(one_row, targets, overwrite=True).sum().backward()
    assert torch.equal(one_row.detach(), torch.zeros(5, 11))
    computed = leaf * 1
    losses = cross_entropy(computed, targets, overwrite=True)
    losses.sum().backward(retain_graph=True)
    assert not torch.equal(computed.detach(), kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@contextmanager
def largest_result() -> Iterator[list[int]]:
    """Elements of the largest new tensor that any operator returned."""
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
                largest[0] = max(largest[0], result.numel())
            return result

    with Watch():
        yield largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_matrix_as_large_as_the_logits_is_made(dtype: torch.dtype) -> None:
    logits, targets, weights = draw(600, 1024)
    leaf = logits.to(dtype).requires_grad_()
    computed = leaf.view_as(leaf)
    with largest_result() as largest:
        (cross_entropy(computed, targets, overwrite=True) * weights).sum().backward()
    assert BLOCK // 2 < largest[0] <= BLOCK


def test_compilers_and_transforms_see_torchs_operators() -> None:
    logits, targets, _ = draw(4, 9)

    def mean(x: Tensor) -> Tensor:
        return cross_entropy(x, targets).mean()

    expected = torch.func.jacrev(torch.func.grad(mean))(logits.double())
    got = torch.func.jacrev(torch.func.grad(mean))(logits)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)
