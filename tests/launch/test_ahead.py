"""Batches made ahead: in order, and without a race for the generator of the model."""

from __future__ import annotations

import pytest
import torch

from launch.run.ahead import Ahead
from launch.run.errors import BadInput


def test_what_is_made_ahead_is_what_is_taken() -> None:
    made: list[range] = []

    def make(rows: range) -> list[int]:
        made.append(rows)
        return list(rows)

    ahead = Ahead(make)
    try:
        assert [ahead.take(range(n, n + 2)) for n in (0, 2, 8)] == [[0, 1], [2, 3], [8, 9]]
    finally:
        ahead.close()
    assert made[:2] == [range(2), range(2, 4)]


def draws(rows: range) -> torch.Tensor:
    return torch.randn(len(rows))


def seeds(rows: range) -> torch.Tensor:
    torch.manual_seed(rows.start)
    return torch.randn(len(rows))


@pytest.mark.parametrize("make", [draws, seeds])
def test_a_batch_that_touches_the_global_generator_is_refused(make: object) -> None:
    ahead = Ahead(make)  # type: ignore[arg-type]
    try:
        with pytest.raises(BadInput, match=r"^task: its `batch` draws from torch's global gen"):
            ahead.take(range(4))
    finally:
        ahead.close()


def test_a_generator_of_its_own_is_not() -> None:
    ahead = Ahead(lambda rows: torch.randn(2, generator=torch.Generator().manual_seed(rows.start)))
    try:
        before = torch.get_rng_state()
        assert torch.equal(ahead.take(range(2)), ahead.take(range(2)))
        assert torch.equal(before, torch.get_rng_state())
    finally:
        ahead.close()
