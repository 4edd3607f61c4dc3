"""fp16 skips steps that overflow: moments are found later, and Adam's step count knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.run.config import from_mapping
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks


def train_in_fp16(folder: Path, skipped: int) -> dict[str, Any]:
    """A few steps, the first ones overflowing, and a checkpoint."""
    from deepspeed.accelerator import get_accelerator

    # A CPU can, slowly; DeepSpeed says no.
    get_accelerator().is_fp16_supported = lambda: True
    halves = [torch.float, torch.half, torch.bfloat16]
    type(get_accelerator()).supported_dtypes = lambda self: halves
    # Losses of about 5.5 overflow from a scale of 2^14 on; each skipped step halves the scale.
    fp16 = {"enabled": True, "initial_scale_power": 16 + skipped, "hysteresis": 1}
    config = tiny_config(
        folder,
        model={"mixture_of_depths": None},
        train={"batch_size": 4, "steps": 12, "move_within": 0},
        deepspeed={"zero_optimization": {"stage": 1}, "fp16": fp16},
    )
    loop = make_loop(from_mapping(config))
    for _ in range(skipped + 6):
        loop.step()
    optimizer = loop.engine._engine.optimizer.optimizer
    counted = {float(s["step"]) for s in optimizer.state.values() if "step" in s}
    moments = loop.engine.full_moments()
    loop.save()
    return {
        "skipped": loop.engine._engine.skipped_steps,
        "counted": counted,
        "optimizer_steps": loop.state.optimizer_steps,
        "moments": sum(bool(m.any()) for m in moments.values()) / len(moments),
    }


@pytest.mark.parametrize("skipped", [0, 3])
def test_moments_and_their_count_survive_skipped_steps(skipped: int, tmp_path: Path) -> None:
    write_text(tmp_path)
    found = run_ranks(train_in_fp16, 1, tmp_path, skipped, timeout=120)[0]
    assert found["skipped"] >= (1 if skipped else 0)
    assert found["counted"] == {found["optimizer_steps"]}
    assert found["optimizer_steps"] == skipped + 6 - found["skipped"]
    assert found["moments"] > 0.9
