"""A task one of whose ranks fails or is slow, as a user's own task would be."""

from __future__ import annotations

import os
import signal
import time

import torch.distributed as dist

from launch.tasks import Batch
from launch.tasks.language_model import LanguageModelTask


class FailingTask(LanguageModelTask):
    """Acts while the environment says FAILS or HOLDS, each `RANK:ROW`.

    FAILS: that rank cannot make the batch of the row. HOLDS: it waits there until the run is asked
    to end, so that what a test does happens at that step, however fast the machine is.
    """

    def batch(self, rows: range) -> Batch:
        for what in ("FAILS", "HOLDS"):
            rank, _, row = os.environ.get(what, "").partition(":")
            if not dist.is_initialized() or rank != str(dist.get_rank()) or int(row) not in rows:
                continue
            if what == "FAILS":
                raise ValueError(f"row {row} has no text")
            while not signal.getsignal(signal.SIGTERM).__self__.asked:  # type: ignore[union-attr]
                time.sleep(0.02)
        return super().batch(rows)
