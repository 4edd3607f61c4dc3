"""The most operations that a rank's device does here: what large products reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices, the mean over ranks. Collective.

    All ranks compute at once, as in training. Takes about half a second.
    """
    size = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    taken: list[float] = []
    dist.barrier()
    begun = time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    rate = torch.tensor(2 * size**3 / statistics.median(taken), dtype=torch.float64, device=device)
    dist.all_reduce(rate)
    return float(rate) / dist.get_world_size()


def dtype_of(deepspeed: Mapping[str, Any]) -> torch.dtype:
    """In what a run of this section `deepspeed` computes its products."""
    for names, dtype in ((("bf16", "bfloat16"), torch.bfloat16), (("fp16",), torch.float16)):
        if any(deepspeed.get(name, {}).get("enabled") for name in names):
            return dtype
    return torch.float32
