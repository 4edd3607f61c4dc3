"""The sharded average of the weights on every mesh, against the formula over whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.run.averaging import WeightAverage
from launch.run.config import from_mapping
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks


def average_of_a_run(
    folder: Path, axes: dict[str, Any], stage: int, decay: float, warmup: bool
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], bool]:
    """Whole weights and averages after every step; whether loading gives the shards back."""
    config = tiny_config(
        folder,
        model={"mixture_of_experts": {"num_experts": 4, "ffn_dim": 24}},
        parallel=axes,
        train={"batch_size": 8, "steps": 3, "move_within": 0},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    loop = make_loop(from_mapping(config))
    average = WeightAverage(loop.engine, decay=decay, warmup=warmup)
    weights, averages = [loop.engine.full_weights()], [average.gather(loop.engine)]
    for step in range(2):
        loop.step()
        average.update(loop.engine, step + 1)
        weights.append(loop.engine.full_weights())
        averages.append(average.gather(loop.engine))
    shards = {name: shard.clone() for name, shard in average._shards.items()}
    parts: list[Any] = [averages[-1]]
    torch.distributed.broadcast_object_list(parts, 0)
    for shard in average._shards.values():
        shard.zero_()
    average.load(loop.engine, parts[0])
    same = all(torch.equal(average._shards[name], shard) for name, shard in shards.items())
    loop.engine.close()
    return weights, averages, same


@pytest.mark.parametrize(
    ("axes", "stage"),
    [
        ({}, 1),
        ({"tensor": 2}, 1),
        ({"context": 2}, 0),
        ({"context": 2}, 1),
        ({"context": 2}, 3),
        ({"expert": 2}, 0),
        ({"expert": 2}, 1),
    ],
    ids=str,
)
def test_the_average_follows_its_formula(axes: dict[str, Any], stage: int, tmp_path: Path) -> None:
    write_text(tmp_path)
    # Without ZeRO, of the rates that the warm-up takes, 2 / 11 and 3 / 12, the first is below 0.2.
    warmup = stage == 0
    decay, decays = (0.2, [2 / 11, 0.2]) if warmup else (0.75, [0.75, 0.75])
    results = run_ranks(average_of_a_run, 2, tmp_path, axes, stage, decay, warmup, timeout=120)
    assert all(same for _, _, same in results)
    weights, averages, _ = results[0]
    wanted = {name: weights[0][name].double() for name in averages[0]}
    for rate, whole, average in zip([1.0, *decays], weights, averages, strict=True):
        wanted = {n: rate * w + (1 - rate) * whole[n].double() for n, w in wanted.items()}
        for name, value in average.items():
            torch.testing.assert_close(value.double(), wanted[name], atol=1e-6, rtol=1e-5)
