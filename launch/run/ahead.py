"""Batches made while the step before is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from launch.run.errors import BadInput

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Makes what is needed for rows of a stream, and meanwhile what the next as many need.

    Args:
        make: what to make of rows, a pure function of them; called in another thread. It must not
            touch torch's global generator, from which the model draws meanwhile; that it does is
            seen at the first call, while nobody else draws.

    Attributes:
        waited: seconds that the last `take` was waiting.
    """

    def __init__(self, make: Callable[[range], Made]) -> None:
        self._make, self.waited = make, 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._rows, self._next = range(0), Future[Made]()

    def take(self, rows: range) -> Made:
        """What `make` makes of the rows; an error is that of these rows."""
        begun = time.perf_counter()
        alone = rows != self._rows
        if alone:
            drawn = torch.get_rng_state()
            self._next = self._pool.submit(self._make, rows)
        made = self._next.result()
        if alone and not torch.equal(drawn, torch.get_rng_state()):
            raise BadInput(
                "task: its `batch` draws from torch's global generator or seeds it, as the model "
                "does meanwhile: must draw from a generator of its own (launch.tasks.row_generator)"
            )
        self.waited = time.perf_counter() - begun
        self._rows = range(rows.stop, rows.stop + len(rows))
        self._next = self._pool.submit(self._make, self._rows)
        return made

    def close(self) -> None:
        """Make nothing more."""
        self._pool.shutdown(cancel_futures=True)
