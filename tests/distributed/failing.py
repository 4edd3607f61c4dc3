"""A task one of whose ranks fails, as a bug in a user's own task would."""

from __future__ import annotations

import os

import torch.distributed as dist

from launch.tasks import Batch
from launch.tasks.language_model import LanguageModelTask

ROW = 364


class FailingTask(LanguageModelTask):
    """Rank 1 cannot make the batch of row ROW, while the environment says FAILS."""

    def batch(self, rows: range) -> Batch:
        failing = "FAILS" in os.environ and dist.is_initialized()
        if failing and dist.get_rank() == 1 and ROW in rows:
            raise ValueError(f"row {ROW} has no text")
        return super().batch(rows)
