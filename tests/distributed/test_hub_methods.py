"""Methods of every place in one model of transformers, trained on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.run.config import from_mapping
from tests.distributed.runs import make_loop, write_text
from tests.distributed.test_hub_training import hub_config
from tests.ranks import run_ranks

ADAPT = {
    "mixture_of_experts": {"layers": [0], "num_experts": 2},
    "adaptive_computation": {"layers": [1]},
    "early_exit": {"layers": [2], "keys": "all"},
}


def losses(tree: dict[str, Any], stages: tuple[int, ...]) -> list[list[float]]:
    found = []
    for stage in stages:
        loop = make_loop(
            from_mapping(tree | {"deepspeed": {"zero_optimization": {"stage": stage}}})
        )
        found.append([loop.step().loss for _ in range(2)])
        loop.close()
    return found


def test_exits_experts_and_learners_train_alike_where_weights_are_split(tmp_path: Path) -> None:
    """ZeRO 3 gathers a module's weights before it runs, one that ends early too."""
    write_text(tmp_path)
    tree = hub_config(tmp_path, model={"adapt": ADAPT}, train={"steps": 2})
    whole, split = run_ranks(losses, 2, tree, (0, 3), timeout=120)[0]
    assert split == pytest.approx(whole, abs=1e-5)
    assert whole[1] < whole[0]
