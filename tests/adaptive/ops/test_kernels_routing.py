"""The routing kernels against Python's own sort, with ties and every odd float."""

import math

import pytest
import torch

from adaptive.ops.kernels import routing
from adaptive.ops.ranking import _highest_by_sort, _order_by_sort
from tests.adaptive.ops.kernel_checks import DEVICE


def sorted_columns(row: list[float], count: int) -> list[int]:
    """By falling score, NaN first, earlier columns first; the chosen ones ascending."""

    def falling(column: int) -> tuple[bool, float, int]:
        score = row[column]
        return (not math.isnan(score), 0.0 if math.isnan(score) else -score, column)

    return sorted(sorted(range(len(row)), key=falling)[:count])


@pytest.mark.parametrize("function", [routing.highest_columns, _highest_by_sort])
@pytest.mark.parametrize(
    "scores",
    [
        [[3.0]],
        [[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0]],
        [[-1.0, float("nan"), float("-inf"), float("inf"), -2.0, -1.0, 1e-40]],
        torch.randn(3, 37).tolist(),
        torch.randint(0, 4, (2, 70)).float().sub(2).tolist(),
    ],
)
def test_exactly_k_columns_are_chosen_with_ties_to_the_earlier(function, scores) -> None:
    table = torch.tensor(scores, device=DEVICE)
    for count in {1, (len(scores[0]) + 1) // 2, len(scores[0])}:
        expected = [sorted_columns(row, count) for row in table.tolist()]
        assert function(table, count).tolist() == expected


def test_rows_longer_than_a_block_and_strided_rows() -> None:
    scores = torch.randint(0, 50, (2, 5000), generator=torch.Generator().manual_seed(0)).float()
    strided = scores.to(DEVICE).repeat(1, 2)[:, :5000]
    got = routing.highest_columns(strided, 600)
    assert got.tolist() == [sorted_columns(row, 600) for row in scores.tolist()]


@pytest.mark.parametrize(("rows", "width"), [(300, 5), (131, 70), (5, 1025)])
def test_many_rows_share_a_program(rows: int, width: int) -> None:
    scores = torch.randint(0, 9, (rows, width), generator=torch.Generator().manual_seed(rows))
    table = scores.float().to(DEVICE)
    got = routing.highest_columns(table, width // 3)
    assert got.tolist() == [sorted_columns(row, width // 3) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_compared_as_they_are(dtype) -> None:
    scores = torch.randn(2, 33, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    expected = [sorted_columns(row, 9) for row in scores.float().tolist()]
    assert routing.highest_columns(scores, 9).tolist() == expected


@pytest.mark.parametrize("function", [routing.order_by_unit, _order_by_sort])
@pytest.mark.parametrize(("entries", "units"), [(0, 3), (1, 1), (37, 5), (600, 130), (90, 512)])
@pytest.mark.parametrize("one", [True, False])
def test_entries_are_grouped_by_unit_in_their_order(function, entries, units, one) -> None:
    generator = torch.Generator().manual_seed(entries)
    ids = torch.randint(units, (entries,), generator=generator)
    if one:
        ids.fill_(units - 1)
    order, counts = function(ids.to(DEVICE), units)
    assert order.tolist() == sorted(range(entries), key=lambda n: (ids[n].item(), n))
    assert counts.tolist() == [int((ids == u).sum()) for u in range(units)]
    assert order.dtype == counts.dtype == torch.int64
