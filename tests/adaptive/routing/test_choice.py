"""Expert choice: exactly k, earlier first among ties, in original order, never padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.routing.choice import (
    capacity_tokens,
    expert_choice,
    expert_choice_packed,
    threshold_choice,
)
from adaptive.routing.layout import TokenLayout, layout_from_mask


def best(scores: list[float], keep: int) -> list[int]:
    """The k best columns by Python's sort, which is stable."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(ranked[:keep])


scores_lists = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=60)
@given(rows=scores_lists, data=st.data())
def test_exactly_k_under_ties(rows: list[list[float]], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(rows[0])))
    selection = expert_choice(torch.tensor(rows), keep)
    expected = [b * len(row) + i for b, row in enumerate(rows) for i in best(row, keep)]
    assert selection.indices.tolist() == expected
    assert selection.positions.tolist() == [i % len(rows[0]) for i in expected]
    assert selection.cu_seqlens.tolist() == [keep * b for b in range(len(rows) + 1)]
    assert selection.cu_seqlens.dtype == torch.int32


@settings(max_examples=60)
@given(rows=scores_lists, data=st.data())
def test_padding_is_never_chosen(rows: list[list[float]], data: st.DataObject) -> None:
    valid = [[data.draw(st.booleans()) for _ in row] for row in rows]
    capacity = data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.875, 1.0]))
    layout = TokenLayout.dense(len(rows), len(rows[0]))
    # Padding with the highest scores is the trap.
    scores = torch.tensor(rows).masked_fill(~torch.tensor(valid), math.inf)
    selection = expert_choice_packed(
        scores.flatten(), layout, capacity, torch.tensor(valid).flatten()
    )
    expected = []
    for b, row in enumerate(rows):
        columns = [i for i in range(len(row)) if valid[b][i]]
        if columns:
            keep = capacity_tokens(capacity, len(columns))
            chosen = best([row[i] for i in columns], keep)
            expected += [b * len(row) + columns[i] for i in chosen]
    assert selection.indices.tolist() == expected


def test_packed_and_padded_choose_the_same_tokens() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False] * 2 + [True] * 5])
    scores = torch.randn(3, 7)
    padded = expert_choice_packed(scores.flatten(), TokenLayout.dense(3, 7), 0.5, valid.flatten())
    layout, taken = layout_from_mask(valid)
    packed = expert_choice_packed(scores.flatten()[taken], layout, 0.5)
    assert taken[packed.indices].tolist() == padded.indices.tolist()
    assert packed.cu_seqlens.tolist() == padded.cu_seqlens.tolist()


@pytest.mark.parametrize(
    ("capacity", "seq_len", "kept"), [(0.125, 4, 1), (0.125, 12, 2), (1, 5, 5)]
)
def test_capacity_rounds_half_up_and_keeps_at_least_one(
    capacity: float, seq_len: int, kept: int
) -> None:
    assert capacity_tokens(capacity, seq_len) == kept


def test_fixed_capacity_never_reads_a_number_back() -> None:
    """Shapes on the meta device have no values to read: any host synchronisation raises."""
    scores = torch.empty(32, device="meta")
    selection = expert_choice_packed(scores, TokenLayout.dense(2, 16, "meta"), 0.25)
    assert selection.indices.shape == (8,)


def test_threshold_choice_is_strict_and_local_to_the_token() -> None:
    layout = TokenLayout.from_lengths([3, 2])
    logits = torch.tensor([0.0, 0.1, -1.0, 5.0, 0.0])
    selection = threshold_choice(logits, layout, 0.0)
    assert selection.indices.tolist() == [1, 3]
    assert selection.cu_seqlens.tolist() == [0, 1, 2]
    assert threshold_choice(logits - 9, layout, 0.0).tokens == 0


@pytest.mark.parametrize("capacity", [0, -0.5, 1.5, float("nan")])
def test_capacity_outside_its_range_is_refused(capacity: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        capacity_tokens(capacity, 8)


def test_too_few_valid_tokens_are_refused() -> None:
    valid = torch.tensor([[True, False, False]])
    with pytest.raises(ValueError, match="capacity=2: a sequence has only 1 valid tokens"):
        expert_choice(torch.zeros(1, 3), 2, valid)
