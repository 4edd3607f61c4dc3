"""Losses over a vocabulary that is split: those of the whole, and Megatron's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import megatron
from parallel.checks.traffic import Traffic
from parallel.mesh import Mesh
from parallel.vocab_cross_entropy import cached_rows, vocab_cross_entropy
from tests.ranks import run_ranks


def _draw(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    logits = (4 * torch.randn(tokens, vocabulary, generator=draw)).to(dtype)
    if tokens > 2:
        logits[1] -= 200  # ranks whose logits are all far below those of the first
        logits[2, 0] += 30  # a loss close to nothing
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    targets[2:3] = 0
    return logits, targets, torch.randn(tokens, generator=draw)


def _raise(logits: Tensor, ranks: int) -> None:
    """Let one rank's logits of a token be far above the others': the first's, and the last's."""
    width = logits.shape[1] // ranks
    if len(logits) > 3:
        logits[1, :width] += 200
        logits[3, -width:] += 200


def _split(
    tokens: int, vocabulary: int, dtype: torch.dtype, overwrite: bool
) -> tuple[Tensor, Tensor, dict[str, int]]:
    world = torch.distributed.get_world_size()
    mesh = Mesh.create(tensor=world)
    logits, targets, weights = _draw(tokens, vocabulary, dtype)
    _raise(logits, world)
    own = logits.chunk(world, 1)[mesh.tensor_rank].clone().requires_grad_()
    with Traffic() as traffic:
        losses = vocab_cross_entropy(own * 1, targets, mesh, overwrite=overwrite)
        losses.backward(weights.to(losses.dtype))
    assert own.grad is not None
    return losses.detach(), own.grad, traffic.by_operation()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "ranks", "dtype"),
    [
        (0, 8, 2, torch.float32),
        (1, 4, 4, torch.float32),
        (37, 3000, 3, torch.float32),
        (700, 1024, 2, torch.float32),
        (37, 3000, 2, torch.bfloat16),
        (9, 12, 2, torch.float64),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(
    tokens: int, vocabulary: int, ranks: int, dtype: torch.dtype, overwrite: bool
) -> None:
    logits, targets, weights = _draw(tokens, vocabulary, dtype)
    _raise(logits, ranks)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.backward(weights.double())
    assert exact.grad is not None
    found = run_ranks(_split, ranks, tokens, vocabulary, dtype, overwrite)
    wide = torch.promote_types(dtype, torch.float32)
    for rank, (losses, grad, traffic) in enumerate(found):
        assert losses.dtype == wide
        assert grad.dtype == dtype
        # Relative to itself: the loss of a sure token is small.
        torch.testing.assert_close(losses, expected.detach().to(wide), rtol=2e-6, atol=3e-7)
        close = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {}
        wanted = exact.grad.chunk(ranks, 1)[rank].to(dtype)
        torch.testing.assert_close(grad, wanted, **close)
        assert torch.equal(losses, found[0][0])
        # Three numbers a token, to every other rank.
        assert traffic == {"all_gather": 3 * tokens * wide.itemsize * (ranks - 1)}


def test_the_vocabulary_is_crossed_in_several_blocks() -> None:
    assert len(cached_rows(torch.empty(700, 512))) == 2


def _of_extremes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    mesh = Mesh.create(tensor=2)
    own = logits.chunk(2, 1)[mesh.tensor_rank].clone().requires_grad_()
    losses = vocab_cross_entropy(own, targets, mesh)
    losses.sum().backward()
    assert own.grad is not None
    return losses.detach(), own.grad


@pytest.mark.parametrize("hidden", [0, 3, 4, 7])
def test_a_token_that_cannot_be_is_left_out_wherever_the_vocabulary_is_cut(hidden: int) -> None:
    logits, _, _ = _draw(8, 8, torch.float32)
    logits = logits.clamp(-10, 10)
    logits[:, hidden] = -torch.inf
    targets = torch.arange(8).roll(1)
    targets[targets == hidden] = (hidden + 4) % 8
    exact = logits.clone().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    found = run_ranks(_of_extremes, 2, logits, targets)
    for (losses, grad), wanted in zip(found, exact.grad.chunk(2, 1), strict=True):
        torch.testing.assert_close(losses, expected.detach())
        torch.testing.assert_close(grad, wanted)


def test_the_loss_of_a_target_outside_the_vocabulary_is_infinite() -> None:
    """It passed for that of a target whose logit is 0."""
    logits, targets, _ = _draw(4, 8, torch.float32)
    targets[0], targets[3] = -100, 8
    for losses, _ in run_ranks(_of_extremes, 2, logits, targets):
        assert losses.isinf().tolist() == [True, False, False, True]


def _megatrons() -> tuple[float, float]:
    mesh = Mesh.create(tensor=2)
    theirs = megatron.core("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    logits, targets, weights = _draw(50, 64, torch.float32)
    own = logits.chunk(2, 1)[mesh.tensor_rank].clone().requires_grad_()
    again = own.detach().clone().requires_grad_()
    expected = theirs(again * 1, targets)
    expected.backward(weights)
    losses = vocab_cross_entropy(own * 1, targets, mesh, overwrite=True)
    losses.backward(weights)
    assert own.grad is not None
    assert again.grad is not None
    return float((losses - expected).abs().max()), float((own.grad - again.grad).abs().max())


def test_megatrons_losses_and_gradients_are_the_same() -> None:
    for losses, gradients in run_ranks(_megatrons, 2):
        assert losses < 1e-5
        assert gradients < 1e-5


def _overwritten() -> tuple[bool, bool, str]:
    mesh = Mesh.create(tensor=2)
    logits, targets, weights = _draw(5, 8, torch.float32)
    own = logits.chunk(2, 1)[mesh.tensor_rank].clone().requires_grad_()
    kept = own.detach().clone()
    vocab_cross_entropy(own, targets, mesh, overwrite=True).backward(weights)
    leaf_is_left = torch.equal(own.detach(), kept)
    made = own * 1
    losses = vocab_cross_entropy(made, targets, mesh, overwrite=True)
    losses.backward(weights, retain_graph=True)
    overwritten = not torch.equal(made.detach(), kept)
    try:
        losses.backward(weights)
    except RuntimeError as error:
        return leaf_is_left, overwritten, str(error)
    return leaf_is_left, overwritten, ""


def test_the_gradient_takes_the_place_of_logits_but_not_of_a_leaf() -> None:
    for leaf_is_left, overwritten, error in run_ranks(_overwritten, 2):
        assert leaf_is_left
        assert overwritten
        assert "modified by an inplace operation" in error
