"""Choices of routers on one rank and on a mesh: which differ, and whether that was a tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.checks.choices import Choice, Difference, Notes, first_difference
from parallel.checks.traces import Trace, compare
from parallel.mesh import Mesh


def differ(chosen: list[Tensor], scores: list[Tensor]) -> Difference | None:
    one, mesh = ([{"layers.1": Choice.of(c, s)}] for c, s in zip(chosen, scores, strict=True))
    return first_difference(one, mesh, tolerance=1e-5)


@pytest.mark.parametrize(("gap", "tied"), [(0.0, True), (4e-6, True), (4e-5, False)])
def test_a_token_in_another_ones_place_is_a_tie_within_rounding_or_it_is_not(
    gap: float, tied: bool
) -> None:
    scores = torch.tensor([0.9, 0.5, 0.5 + gap, -1.0])
    one, mesh = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    found = differ([one, mesh], [scores, scores])
    assert found is not None
    assert (found.step, found.name, found.tied) == (0, "layers.1", tied)
    assert "step 0, layers.1: token 1 took the place of 2 (scores 0.5 and 0.5" in found.text
    assert found.text.endswith("2 tokens differ")


def test_scores_that_moved_are_no_tie() -> None:
    """They were equal on one rank; what came before them on the mesh is wrong."""
    one, mesh = torch.tensor([True, False]), torch.tensor([False, True])
    found = differ([one, mesh], [torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.9])])
    assert found is not None
    assert not found.tied


def test_a_choice_without_a_rival_is_no_tie() -> None:
    """One more is taken on the mesh."""
    scores = torch.tensor([1.0, 1.0, 0.5])
    one, mesh = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    found = differ([one, mesh], [scores, scores])
    assert found is not None
    assert not found.tied
    assert "token 1 was taken on one side only" in found.text


def test_experts_and_what_skips_are_compared_token_by_token() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.5], [0.7, 0.1, 0.2]])
    found = differ([torch.tensor([[1], [0]]), torch.tensor([[2], [0]])], [scores, scores])
    assert found is not None
    assert found.tied
    assert "token 0's choice 1 took the place of 0's 2" in found.text
    same = torch.tensor([[0.3, 0.3], [0.0, 1.0]])
    found = differ([torch.tensor([True, True]), torch.tensor([False, True])], [same, same])
    assert found is not None
    assert found.tied
    # As Assignment writes it, a token for which nobody computes goes to expert E.
    none = Choice.of(torch.tensor([[3], [0]]), scores)
    assert none.chosen.tolist() == [[False, False, False], [True, False, False]]


def test_what_is_before_a_tie_is_compared_and_what_is_after_is_not() -> None:
    def trace(chosen: list[bool], *, wrong_gradient: bool) -> Trace:
        made = Trace(losses=[1.0, 2.0], norms=[1.0, 1.0 + 0.1 * chosen[0]])
        made.gradients = {"w": torch.tensor([1.0 + 0.1 * wrong_gradient])}
        made.weights = {"w": torch.tensor([1.0 + chosen[0]])}
        same = Choice.of(torch.tensor([True, False]), torch.tensor([1.0, 1.0]))
        last = Choice.of(torch.tensor(chosen), torch.tensor([1.0, 1.0]))
        made.choices = [{"layers.1": same}, {"layers.1": last}]
        return made

    reference = trace([True, False], wrong_gradient=False)
    tied = compare(reference, trace([False, True], wrong_gradient=False), mesh="data=2")
    assert tied.ok
    assert {row.quantity for row in tied.rows} == {"loss", "norm", "gradient"}
    assert not any(row.name == "step 1" for row in tied.rows)
    wrong = compare(reference, trace([False, True], wrong_gradient=True), mesh="data=2")
    assert wrong.disagreeing() == ["w"]


def test_micro_batches_and_calls_are_told_apart() -> None:
    notes = Notes()
    for number in range(2):
        for call in range(2):
            chosen = torch.tensor([call == 0, number == 0])
            notes.add("layers.1", chosen, None)
        notes.next()
    whole = notes.whole(Mesh.single())
    assert whole["layers.1"].chosen[:, 0].tolist() == [True, True, True, False]
    assert whole["layers.1 (call 2)"].chosen[:, 0].tolist() == [False, True, False, False]
