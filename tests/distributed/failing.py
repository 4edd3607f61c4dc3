"""A task one of whose ranks fails or is slow, as a user's own task would be."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.tasks import Batch
from launch.tasks.language_model import LanguageModelTask


class FailingTask(LanguageModelTask):
    """Acts while the environment says FAILS or HOLDS, each `RANK:ROW`.

    FAILS: that rank cannot make the batch of the row. HOLDS: it waits there until the run is asked
    to end, so that what a test does happens at that step, however fast the machine is. POISONS,
    `ROW`: the gradient of that row is infinite, where the rank is that has it, its loss is not.
    DIES, `RANK:ROW:FILE`: that rank kills itself there (-9), unless the file is there already.
    SPIKES, `FIRST:STOP`: the loss of these rows is ten times as large.
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
        rank, _, place = os.environ.get("DIES", "").partition(":")
        row, _, file = place.partition(":")
        if dist.is_initialized() and rank == str(dist.get_rank()) and int(row) in rows:
            with suppress(FileExistsError):
                Path(file).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        batch = dict(super().batch(rows))
        first, _, stop = os.environ.get("SPIKES", "0:0").partition(":")
        marks = torch.zeros(len(rows), 2)
        for place, row in enumerate(rows):
            marks[place, 0] = str(row) == os.environ.get("POISONS")
            marks[place, 1] = int(first) <= row < int(stop)
        return {**batch, "marks": marks}

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss_sum(model, batch)
        if "marks" in batch:
            if batch["marks"][:, 0].any():
                loss.register_hook(lambda gradient: gradient * float("inf"))
            if batch["marks"][:, 1].any():
                loss = loss * 10
        return loss
