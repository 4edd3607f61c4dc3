"""Training does not depend on how it is split: ranks, ZeRO stage, accumulation, interruption."""

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

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Outcome:
    """One rank, no ZeRO, nothing accumulated."""
    return run_ranks(train_few, 1, tiny_config(folder), (0,), timeout=120)[0][0]


def assert_same(outcome: Outcome, reference: Outcome, of: Any) -> None:
    # 1e-5: float32 sums in another order; the losses are about 5.5, weights about 0.02 to 1.
    assert outcome.losses == pytest.approx(reference.losses, abs=1e-5), of
    assert_same_norms(outcome, reference)
    assert outcome.validation == pytest.approx(reference.validation, abs=1e-5), of
    assert outcome.weights.keys() == reference.weights.keys(), of
    for name, weight in reference.weights.items():
        torch.testing.assert_close(
            outcome.weights[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{of} {n}: {m}"
        )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_number_of_ranks_and_zero_stage_trains_the_same(
    ranks: int, folder: Path, reference: Outcome
) -> None:
    # 1 rank accumulates 4 micro-batches, 2 ranks 2, 4 ranks 1.
    tree = tiny_config(folder, train={"micro_batch_size": 2})
    results = run_ranks(train_few, ranks, tree, STAGES, timeout=150)
    for stage in STAGES:
        assert_same(results[0][stage], reference, of=f"{ranks} ranks, ZeRO {stage}:")
        assert all(result[stage].losses == results[0][stage].losses for result in results)
    assert reference.losses[-1] < reference.losses[0]
    assert reference.norms_of_parts[0].keys() >= {
        "embedding",
        "layers.0/attention",
        "layers.1/ffn",
        "layers.1/norm",
        "layers.1/router",
        "norm",
    }
