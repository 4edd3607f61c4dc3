"""Experts under DeepSpeed's engine train as they do on one rank with plain torch."""

from __future__ import annotations

import pytest
from torch import nn

from launch.run.errors import BadInput
from launch.run.experts import declare_experts
from launch.run.parity import deepspeed_trainer
from parallel.mesh import Mesh
from parallel.parity import Report, Settings, check_on_ranks
from tests.distributed.test_experts import SUBJECTS
from tests.ranks import run_ranks

STAGES = (0, 1, 2)


def check(name: str, degree: int, micro_batches: int) -> list[list[Report]]:
    """Reports of every ZeRO stage."""
    settings, mesh = Settings(micro_batches=micro_batches), {"expert": degree}
    return [
        check_on_ranks(SUBJECTS[name], [mesh], settings, make_trainer=deepspeed_trainer(stage))
        for stage in STAGES
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "degree", "micro_batches"),
    [
        ("top-2", 2, 2, 1),
        ("top-2", 4, 2, 2),
        ("one expert takes everything", 4, 4, 1),
        ("frozen experts", 2, 2, 2),
    ],
)
def test_deepspeed_trains_spread_experts_as_one_rank_does(
    name: str, ranks: int, degree: int, micro_batches: int
) -> None:
    reports = run_ranks(check, ranks, name, degree, micro_batches, timeout=120)[0]
    for stage, (report,) in zip(STAGES, reports, strict=True):
        assert report.ok, f"ZeRO {stage}\n{report.table()}"


def refused() -> str:
    mesh = Mesh.create(expert=2)
    try:
        declare_experts(nn.Linear(2, 2), mesh, zero_stage=3)
    except BadInput as error:
        return str(error)
    return ""


def test_zero_3_is_refused_in_one_clear_line() -> None:
    for message in run_ranks(refused, 2):
        assert message.startswith("parallel.expert=2: must be 1 with ZeRO 3")
