"""A task that notes what its rows hold."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch.distributed as dist

from launch.tasks import Batch
from tests.distributed.failing import FailingTask


class NotedTask(FailingTask):
    """Ranks write down their rows in OUTPUT/rows: number, first token and a sum of each."""

    def batch(self, rows: range) -> Batch:
        made = super().batch(rows)
        if not dist.is_initialized():
            return made
        noted = Path(self.config.output) / "rows" / f"{dist.get_rank()}.txt"
        noted.parent.mkdir(exist_ok=True, parents=True)
        with noted.open("a") as out:
            for row, ids in zip(rows, made["input_ids"], strict=True):
                out.write(f"{row} {chr(int(ids[0]))} {zlib.crc32(ids.numpy().tobytes())}\n")
        return made
