"""Every family on every mesh that the ranks allow: the same loss, gradients, norm and update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.segments import SegmentsConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from parallel.parity import Report, Settings, Subject, check_on_ranks
from tests.distributed.subjects import FAMILIES, QUIET, SUBJECTS, TINY, splits_on
from tests.ranks import run_ranks

Degrees = dict[str, Any]
RING = {"context_attention": "ring"}

# Every axis alone, and all that go together.
MESHES: list[tuple[int, Degrees, int]] = [
    (2, {}, 2),
    (2, {"tensor": 2}, 1),
    (2, {"tensor": 2, "sequence_parallel": True}, 1),
    (4, {"tensor": 2, "expert": 2, "sequence_parallel": True}, 2),
    (4, {"tensor": 2, "context": 2}, 1),
    (4, {"tensor": 2, "context": 2, "sequence_parallel": True}, 1),
    (2, {"context": 2, **RING}, 1),
]
# The rest of what four ranks allow.
FURTHER: list[tuple[int, Degrees, int]] = [
    (4, {}, 1),
    (4, {"tensor": 4}, 1),
    (4, {"tensor": 4, "sequence_parallel": True}, 2),
    (4, {"tensor": 2}, 2),
    (4, {"tensor": 2, "sequence_parallel": True}, 1),
    (4, {"expert": 2}, 2),
    (4, {"expert": 4}, 1),
    (4, {"tensor": 2, "expert": 2}, 1),
    (2, {"context": 2}, 1),
    (4, {"context": 2, "expert": 4}, 2),
    (4, {"context": 4}, 1),
    (4, {"context": 4, **RING}, 1),
    (4, {"tensor": 2, "context": 2, **RING}, 1),
    (4, {"context": 2, "expert": 4, **RING}, 2),
    (4, {"tensor": 2, "context": 2, "sequence_parallel": True, **RING}, 1),
    (4, {"tensor": 2, "context": 2, "expert": 2, "sequence_parallel": True}, 2),
]


def check(names: list[str], degrees: Degrees, micro_batches: int = 1) -> dict[str, Report]:
    """On each rank; the reports of rank 0, by subject."""
    # 9 rows of 24 tokens do not end with the share of 2 or 4 ranks; micro-batches must divide.
    uneven = "context" in degrees and micro_batches == 1
    found = {}
    for name in names:
        subject = replace(SUBJECTS[name], rows=9 if uneven else 8)
        rate = 0.1 if name == "sprint" else 1.0
        settings = Settings(micro_batches=micro_batches, learning_rate=rate)
        found[name] = checked(subject, degrees, settings)
    return found


def checked(subject: Subject, degrees: Degrees, settings: Settings | None = None) -> Report:
    reports = check_on_ranks(subject, [degrees], settings)
    return reports[0] if reports else Report("", 0, [])


def assert_agrees(reports: dict[str, Report]) -> None:
    wrong = [f"{name}\n{report.table()}" for name, report in reports.items() if not report.ok]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(("ranks", "degrees", "micro_batches"), MESHES, ids=str)
def test_every_family_on_a_mesh_agrees_with_one_rank(
    ranks: int, degrees: Degrees, micro_batches: int
) -> None:
    names = [name for name in sorted(SUBJECTS) if splits_on(name, degrees)]
    assert_agrees(run_ranks(check, ranks, names, degrees, micro_batches, timeout=150)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "degrees", "micro_batches"), FURTHER, ids=str)
def test_every_other_mesh_of_four_ranks_agrees_with_one_rank(
    ranks: int, degrees: Degrees, micro_batches: int
) -> None:
    test_every_family_on_a_mesh_agrees_with_one_rank(ranks, degrees, micro_batches)


def test_ring_of_four_ranks_agrees_with_one_rank() -> None:
    names = ["documents", "mixture_of_depths", "skip_layer"]
    assert_agrees(run_ranks(check, 4, names, {"context": 4, **RING})[0])


NOISY = {
    "segments": replace(TINY, num_layers=3, segments=SegmentsConfig(prior=0.4)),
    "gumbel": replace(TINY, skip_layer=SkipLayerConfig(density=0.25)),
    "random sizes": replace(TINY, sized_feed_forward=SizedFeedForwardConfig(random_steps=9)),
    "random depths": replace(
        TINY, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25, choice="random")
    ),
    "jitter": replace(TINY, mixture_of_experts=MixtureOfExpertsConfig(num_experts=4, jitter=0.3)),
}


def check_noise(degrees: Degrees) -> dict[str, Report]:
    # 9 rows of 24 tokens do not end with the share of 2 or 4 ranks.
    subject = replace(FAMILIES["dense"], rows=9 if "context" in degrees else 8)
    return {
        name: checked(replace(subject, config=config), degrees)
        for name, config in NOISY.items()
        if name not in FAMILIES or splits_on(name, degrees)
    }


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"context": 2}),
        (4, {"tensor": 2, "context": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_ranks_that_share_sequences_draw_what_one_rank_draws(ranks: int, degrees: Degrees) -> None:
    """Seeded alike, each once drew the same numbers for tokens of its own."""
    assert_agrees(run_ranks(check_noise, ranks, degrees)[0])


def check_exact_gradient(degrees: Degrees) -> Report:
    skip = SkipLayerConfig(schedule=QUIET, density=0.25, skipped_gradient="exact")
    experts = MixtureOfExpertsConfig(num_experts=4, bias_rate=0.02)
    config = replace(TINY, skip_layer=skip, mixture_of_experts=experts)
    subject = replace(FAMILIES["dense"], config=config, rows=8)
    return checked(subject, degrees, Settings(steps=4))


@pytest.mark.parametrize("degrees", [{}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_biases_inside_an_exact_skip_layer_move_alike(degrees: Degrees) -> None:
    """Its second forward counted the tokens of each rank for itself."""
    report = run_ranks(check_exact_gradient, 2, degrees)[0]
    assert report.ok, report.table()


def check_three_heads() -> Report:
    config = replace(FAMILIES["mixture_of_depths"].config, dim=48, num_heads=3, num_kv_heads=3)
    subject = replace(FAMILIES["mixture_of_depths"], config=config, rows=9)
    return checked(subject, {"context": 2, **RING})


def test_ring_of_two_ranks_takes_three_heads() -> None:
    """Which Ulysses refuses: test_context_parallel.py."""
    report = run_ranks(check_three_heads, 2)[0]
    assert report.ok, report.table()
