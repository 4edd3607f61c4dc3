"""Runs of mixtures of experts train the same at every ZeRO stage and expert degree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import (
    Outcome,
    assert_same_norms,
    tiny_config,
    train_few,
    write_text,
)
from tests.ranks import run_ranks

EXPERTS = {
    "num_experts": 4,
    "ffn_dim": 24,
    "router": "hyperspherical",
    "z_coefficient": 0.01,
    "bias_rate": 0.01,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_text(folder)
    return folder


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    model = {"mixture_of_depths": None, "mixture_of_experts": EXPERTS}
    return tiny_config(folder, model=model, **sections)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Outcome:
    return run_ranks(train_few, 1, tree(folder), (0,), timeout=120)[0][0]


@pytest.mark.parametrize(
    ("ranks", "expert", "stages"), [(1, 1, (3,)), (2, 1, (2, 3)), (2, 2, (0, 1, 2))]
)
def test_every_stage_and_expert_degree_trains_the_same(
    ranks: int, expert: int, stages: tuple[int, ...], folder: Path, reference: Outcome
) -> None:
    # 1 rank accumulates 4 micro-batches, 2 ranks 2.
    config = tree(folder, train={"micro_batch_size": 2}, parallel={"expert": expert})
    outcomes = run_ranks(train_few, ranks, config, stages, timeout=150)[0]
    for stage in stages:
        outcome = outcomes[stage]
        assert outcome.losses == pytest.approx(reference.losses, abs=1e-5), stage
        assert_same_norms(outcome, reference)
        assert outcome.validation == pytest.approx(reference.validation, abs=1e-5), stage
        assert outcome.weights.keys() == reference.weights.keys()
        for name, weight in reference.weights.items():
            torch.testing.assert_close(outcome.weights[name], weight, rtol=0, atol=1e-5)
