"""Choosing experts: order, capacity, groups and expert choice, against definitions written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptive.routing.assignment import Assignment
from adaptive.routing.token_choice import (
    ExpertGroups,
    best_of,
    capacity_of,
    experts_choose,
    token_choice,
)


def scores(tokens: int, experts: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(tokens, experts)


def pairs_by_expert(assignment: Assignment) -> list[list[int]]:
    """For each expert the tokens it takes, in its order."""
    parts = assignment.source.split(assignment.tokens_per_expert.tolist())
    return [part.tolist() for part in parts]


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_every_token_reaches_its_best_experts_and_nothing_is_dropped(
    tokens: int, experts: int, top_k: int, seed: int
) -> None:
    top_k = min(top_k, experts)
    given_TE = scores(tokens, experts, seed)
    assignment = token_choice(given_TE, top_k)
    best = given_TE.topk(top_k, -1).values if tokens else given_TE[:, :top_k]
    torch.testing.assert_close(given_TE.gather(1, assignment.expert_index), best)
    for expert, taken in enumerate(pairs_by_expert(assignment)):
        wanted = [t for t in range(tokens) if expert in assignment.expert_index[t].tolist()]
        assert taken == wanted


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ties_go_to_the_lower_expert(count: int) -> None:
    tied = torch.tensor([[0.1, 0.3, 0.3, 0.3, 0.3, 0.3]])
    assert best_of(tied, count).tolist() == [[1, 2, 3, 4, 5][:count]]


def test_padding_goes_nowhere_and_takes_no_capacity() -> None:
    given_TE = torch.tensor([[0.9, 0.1]] * 6)
    valid_T = torch.tensor([False, True, False, True, True, True])
    assignment = token_choice(given_TE, 1, valid_T=valid_T)
    assert pairs_by_expert(assignment) == [[1, 3, 4, 5], []]
    assert assignment.expert_index.squeeze(1).tolist() == [2, 0, 2, 0, 0, 0]
    # Two places: 4 valid tokens over 2 experts at factor 1. With padding counted it would be 3.
    limited = token_choice(given_TE, 1, valid_T=valid_T, capacity_factor=1.0)
    assert pairs_by_expert(limited) == [[1, 3], []]


def served(index_TK: Tensor, experts: int, capacity: int) -> set[tuple[int, int]]:
    """Places handed out one by one: all first choices, then all second choices, by token."""
    left = [capacity] * experts
    taken = set()
    for k in range(index_TK.shape[1]):
        for t in range(index_TK.shape[0]):
            expert = int(index_TK[t, k])
            if left[expert]:
                left[expert] -= 1
                taken.add((t, k))
    return taken


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, -0.5, 1.25])
def test_capacity_serves_first_choices_first_and_counts_what_is_dropped(factor: float) -> None:
    # Half of the first choices fall on expert 0.
    given_TE = scores(24, 4)
    given_TE[::2, 0] += 1
    assignment = token_choice(given_TE, 2, capacity_factor=factor)
    capacity = 2 * int(abs(factor) * math.ceil(24 / 4))
    expected = served(assignment.expert_index, 4, capacity)
    assert {divmod(p, 2) for p in assignment.pairs.tolist()} == expected
    assert int(assignment.wanted_per_expert.sum()) == 48
    assert assignment.tokens_per_expert.max() <= capacity


def test_capacity_factor_zero_takes_what_is_needed() -> None:
    given_TE = torch.tensor([[0.9, 0.1]] * 6)
    assert token_choice(given_TE, 1, capacity_factor=0).tokens_per_expert.tolist() == [6, 0]
    assert capacity_of(0, 6, 2, 1) is None


@pytest.mark.parametrize("tokens", [0, 1, 5, 8])
def test_capacity_of_is_tutels(tokens: int) -> None:
    for factor in (0.3, 1.0, 1.25, -1.25):
        expected = 2 * int(abs(factor) * ((tokens + 3) // 4))
        assert capacity_of(factor, tokens, 4, 2) == expected
        assert capacity_of(factor, torch.tensor(tokens), 4, 2) == expected


def test_bias_moves_the_choice_and_not_the_scores() -> None:
    given_TE = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    kept = given_TE.clone()
    chosen = token_choice(given_TE, 1, bias_E=torch.tensor([0.0, 0.3]))
    assert chosen.expert_index.tolist() == [[1], [0]]
    assert torch.equal(given_TE, kept)


def test_group_limited_tokens_stay_in_their_best_groups() -> None:
    given_TE = scores(50, 12)
    groups = ExpertGroups(total=4, chosen=2)
    index_TK = token_choice(given_TE, 4, groups=groups).expert_index
    for t in range(50):
        by_group = given_TE[t].view(4, 3)
        strength = by_group.topk(2, -1).values.sum(-1)
        allowed = set(strength.topk(2).indices.tolist())
        reachable = [e for e in range(12) if e // 3 in allowed]
        best = sorted(reachable, key=lambda e: -given_TE[t, e].item())[:4]
        assert index_TK[t].tolist() == best
    # The best expert of all may lie outside: the limit really limits.
    assert (index_TK[:, 0] != given_TE.argmax(1)).any()


@pytest.mark.parametrize(
    ("total", "chosen", "experts", "top_k", "message"),
    [
        (5, 2, 12, 2, "groups=5: must divide num_experts=12"),
        (4, 5, 12, 2, "chosen groups=5: must be between 1 and 4"),
        (4, 1, 12, 4, "top_k=4: must not exceed the 3 experts of 1 groups"),
    ],
)
def test_groups_that_do_not_fit_are_one_clear_line(
    total: int, chosen: int, experts: int, top_k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertGroups(total, chosen).check(experts, top_k)


def test_idle_experts_are_chosen_but_take_no_pair() -> None:
    given_TE = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.1, 0.6, 0.3]])
    assignment = token_choice(given_TE, 2, num_idle=1)
    assert assignment.expert_index.tolist() == [[2, 1], [0, 1], [1, 2]]
    assert pairs_by_expert(assignment) == [[1], [0, 1, 2]]


def test_expert_choice_gives_every_expert_its_best_tokens() -> None:
    given_TE = scores(10, 4)
    assignment = experts_choose(given_TE, 1.0, top_k=2)
    assert assignment.tokens_per_expert.tolist() == [5] * 4
    for expert, taken in enumerate(pairs_by_expert(assignment)):
        assert taken == sorted(given_TE[:, expert].topk(5).indices.tolist())
        assert all(assignment.expert_index[t, expert] == expert for t in taken)
    assert int((assignment.expert_index < 4).sum()) == 20


def test_expert_choice_passes_padding_over() -> None:
    given_TE = scores(10, 2)
    valid_T = torch.arange(10) < 4
    given_TE[4:] += 9
    taken = pairs_by_expert(experts_choose(given_TE, 1.0, valid_T=valid_T))
    assert all(t < 4 for tokens in taken for t in tokens)
    assert [len(tokens) for tokens in taken] == [2, 2]


def test_top_k_above_the_experts_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"top_k=3: must be between 1 and num_experts=2"):
        token_choice(scores(4, 2), 3)


@pytest.mark.parametrize("factor", [0.1, 0.3, 0.7, 1.1, 1.25])
def test_a_mask_changes_no_capacity(factor: float) -> None:
    for count in range(1, 900, 7):
        expected = capacity_of(factor, count, 8, 2)
        assert int(capacity_of(factor, torch.tensor(count), 8, 2)) == expected
