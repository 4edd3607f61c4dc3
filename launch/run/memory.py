"""How much memory a rank holds."""

from __future__ import annotations

import psutil
import torch


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GiB of this rank: of its process, and on a GPU what torch has now and had at most.

    Reads counters; waits for nothing on the device.
    """
    found = {"memory/process_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        found["memory/allocated_gib"] = torch.cuda.memory_allocated(device) / 2**30
        found["memory/most_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
