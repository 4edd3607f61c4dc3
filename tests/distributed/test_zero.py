"""DeepSpeed's ZeRO stages beside tensor, sequence and expert parallelism, against one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.run.errors import BadInput
from launch.run.parity import deepspeed_trainer
from launch.run.zero import check_zero
from parallel.parity import Report, Settings, check_on_ranks
from tests.distributed.subjects import FAMILIES
from tests.ranks import run_ranks

Degrees = dict[str, int | bool | str]


def check(family: str, degrees: Degrees, stage: int, micro_batches: int) -> Report:
    reports = check_on_ranks(
        replace(FAMILIES[family], rows=8),
        [degrees],
        Settings(micro_batches=micro_batches),
        make_trainer=deepspeed_trainer(stage),
    )
    return reports[0] if reports else Report("", 0, [])


CASES: list[tuple[str, int, Degrees, int, int]] = [
    ("mixture_of_depths", 4, {"tensor": 2}, 0, 1),
    ("mixture_of_depths", 4, {"tensor": 2, "sequence_parallel": True}, 1, 2),
    ("mixture_of_depths", 4, {"tensor": 2, "sequence_parallel": True}, 2, 2),
    ("mixture_of_experts", 4, {"tensor": 2, "expert": 2, "sequence_parallel": True}, 1, 1),
    ("skip_layer", 2, {}, 3, 1),
    ("mixture_of_depths", 2, {}, 3, 2),
    ("mixture_of_depths", 2, {"context": 2, "context_attention": "ring"}, 3, 2),
]
WITH_EXPERTS = ("mixture_of_experts", "hyperspherical", "mixture_of_depths_and_experts")
ALL: list[tuple[str, int, Degrees, int, int]] = [
    (family, 4, degrees, stage, 2)
    for family in FAMILIES
    for degrees in ({"tensor": 2}, {"tensor": 2, "expert": 2, "sequence_parallel": True})
    for stage in (0, 1, 2)
    if "expert" not in degrees or family in WITH_EXPERTS
]
ALL += [(family, 2, {}, 3, micro_batches) for family in FAMILIES for micro_batches in (1, 2)]


@pytest.mark.parametrize(("family", "ranks", "degrees", "stage", "micro_batches"), CASES, ids=str)
def test_zero_stage_agrees_with_one_rank(
    family: str, ranks: int, degrees: Degrees, stage: int, micro_batches: int
) -> None:
    report = run_ranks(check, ranks, family, degrees, stage, micro_batches, timeout=120)[0]
    assert report.ok, report.table()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ranks", "degrees", "stage", "micro_batches"), ALL, ids=str)
def test_every_family_at_every_zero_stage(
    family: str, ranks: int, degrees: Degrees, stage: int, micro_batches: int
) -> None:
    test_zero_stage_agrees_with_one_rank(family, ranks, degrees, stage, micro_batches)


@pytest.mark.parametrize("axis", ["tensor", "expert"])
def test_zero_3_beside_a_split_model_is_refused_in_one_line(axis: str) -> None:
    with pytest.raises(BadInput, match=rf"^parallel\.{axis}=2: must be 1 with ZeRO 3.*ZeRO 0, 1"):
        check_zero(3, **{axis: 2})
