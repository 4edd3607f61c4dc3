"""Structured and random keeping: exact counts in every cell, every token equally often."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import TokenLayout
from adaptive.routing.keeping import (
    cells_for,
    check_columns,
    draw_keep_ids,
    keep_packed,
    selection_of,
)
from parallel.draws import drawing_part

SHARES = [0.125, 0.25, 0.375, 0.5]
PAPER_CELLS = {0.25: ((2, 2), 1), 0.5: ((2, 2), 2), 0.375: ((4, 4), 6), 0.125: ((4, 4), 2)}


@pytest.mark.parametrize("keep", SHARES)
def test_two_dimensional_cells_are_the_papers(keep: float) -> None:
    cells = cells_for(keep, 2)
    assert (cells.shape, cells.keep) == PAPER_CELLS[keep]


@pytest.mark.parametrize("keep", SHARES)
@pytest.mark.parametrize("grid", [(16,), (8, 12), (4, 4, 6)])
def test_every_cell_keeps_its_share(keep: float, grid: tuple[int, ...]) -> None:
    cells = cells_for(keep, len(grid))
    ids = draw_keep_ids(5, grid, keep=keep)
    assert ids.shape == (5, round(keep * math.prod(grid)))
    for row in ids.tolist():
        assert row == sorted(set(row))
        per_cell: dict[tuple[int, ...], int] = {}
        for token in row:
            place, rest = [], token
            for size, side in zip(reversed(grid), reversed(cells.shape), strict=True):
                place.append(rest % size // side)
                rest //= size
            per_cell[tuple(place)] = per_cell.get(tuple(place), 0) + 1
        number_of_cells = math.prod(grid) // math.prod(cells.shape)
        assert len(per_cell) == number_of_cells
        assert set(per_cell.values()) == {cells.keep}


@pytest.mark.parametrize("keeping", ["structured", "random"])
def test_every_token_is_kept_equally_often(keeping: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = draw_keep_ids(4000, (4, 4), keep=0.25, keeping=keeping, generator=generator)
    share = torch.bincount(ids.flatten(), minlength=16) / 4000
    # Standard error sqrt(.25 * .75 / 4000) = 0.007; five of them.
    assert (share - 0.25).abs().max() < 0.035


def test_samples_are_drawn_independently() -> None:
    ids = draw_keep_ids(64, (8, 8), keep=0.25)
    assert len({tuple(row) for row in ids.tolist()}) > 60


def test_random_keeping_takes_any_share_and_any_grid() -> None:
    ids = draw_keep_ids(3, (5, 7), keep=0.3, keeping="random")
    assert ids.shape == (3, 11)
    assert all(row == sorted(set(row)) for row in ids.tolist())


def test_a_generator_repeats_the_draw() -> None:
    draws = [
        draw_keep_ids(4, (8, 8), keep=0.375, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (6, 5), "keep": 0.25}, "grid 6x5: must be divisible by the cell 2x2"),
        ({"grid": (6, 6), "keep": 0.125}, "grid 6x6: must be divisible by the cell 4x4"),
        ({"grid": (8, 8), "keep": 0.3}, "keep=0.3: structured keeping needs one of 0.125, 0.25"),
        ({"grid": (2, 2, 2, 2), "keep": 0.25}, "grid of 4 axes: structured keeping needs 1, 2"),
        ({"grid": (8, 8), "keep": 0.0, "keeping": "random"}, r"keep=0.0: must be in \(0, 1\]"),
        ({"grid": (8, 8), "keep": 0.5, "keeping": "grid"}, "keeping='grid': must be one of"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_keep_ids(2, **options)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(sum),
    st.sampled_from(SHARES),
)
def test_ragged_sequences_keep_the_share_of_every_cell(lengths: list[int], keep: float) -> None:
    layout = TokenLayout.from_lengths(lengths)
    cells = cells_for(keep, 1)
    selection = keep_packed(layout, keep=keep)
    starts = selection.cu_seqlens.tolist()
    for row, length in enumerate(lengths):
        kept = selection.positions[starts[row] : starts[row + 1]].tolist()
        full, rest = divmod(length, cells.size)
        wanted = [cells.keep] * full + ([min(rest, cells.keep)] if rest else [])
        assert [sum(p // cells.size == c for p in kept) for c in range(len(wanted))] == wanted
        assert kept == sorted(set(kept))


@pytest.mark.parametrize(("columns", "named"), [([0, 4], 4), ([-1, 2], -1), ([3, 3], 3)])
def test_columns_of_another_sequence_and_doubled_ones_are_refused(
    columns: list[int], named: int
) -> None:
    """Column 4 of four was column 0 of the next sequence."""
    message = f"keep_ids: holds {named}, must be different numbers between 0 and 3"
    with pytest.raises(ValueError, match=message):
        check_columns(torch.tensor([columns, [0, 1]]), 4)


def test_given_columns_are_put_in_order_and_keep_their_positions() -> None:
    selection = selection_of(torch.tensor([[3, 0], [2, 1]]), TokenLayout.dense(2, 4))
    assert selection.indices.tolist() == [0, 3, 5, 6]
    assert selection.positions.tolist() == [0, 3, 1, 2]
    assert selection.cu_seqlens.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((3, 2), [4, 4], r"keep_ids of shape \[3, 2\]: must be \[2, kept\]"),
        ((2, 5), [4, 4], "keeps 5 tokens, must be between 1 and 4"),
        ((2, 1), [4, 3], "needs sequences of one length"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    shape: tuple[int, int], lengths: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        selection_of(torch.zeros(shape, dtype=torch.long), TokenLayout.from_lengths(lengths))


@pytest.mark.parametrize("grid", [(12,), None])
def test_parts_of_a_batch_draw_what_the_whole_batch_draws(grid: tuple[int, ...] | None) -> None:
    """As a parity check asks: rows 2 and 3 keep the same tokens alone as among 4."""

    def kept(rows: int) -> torch.Tensor:
        torch.manual_seed(5)
        if grid is not None:
            return draw_keep_ids(rows, grid, keep=0.5)
        layout = TokenLayout.dense(rows, 12)
        return keep_packed(layout, keep=0.5).mask(rows * 12).view(rows, 12)

    whole = kept(4)
    with drawing_part(2, 2, 4):
        assert torch.equal(kept(2), whole[2:])
    assert not torch.equal(kept(2), whole[2:])
