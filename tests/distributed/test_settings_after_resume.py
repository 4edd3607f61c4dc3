"""A resumed run trains by the settings of its own configuration, whoever made the optimizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.checkpoint.files import read_state, read_whole
from launch.run.config import from_mapping, save_resolved
from launch.run.engine import Engine
from launch.run.loop import Loop
from launch.run.preflight import changed_settings
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

BEFORE, AFTER = 2, 2
STAGES = (0, 1, 3)  # 2 loads by the code of 1
# Far from train.beta1, beta2 and eps, which are 0.9, 0.95 and 1e-8.
OWN = {"betas": [0.5, 0.6], "eps": 1e-3}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch's AdamW": {},
    "DeepSpeed's Adam": {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, **OWN}}
    },
    "Adamax": {"optimizer": {"type": "Adamax", "params": {"lr": 1e-3, **OWN}}},
}
TORCH = {"type": "AdamW", "params": {"torch_adam": True}}
# A run's section deepspeed, and what is changed of the run when it goes on.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "weight decay": ({}, {"train": {"weight_decay": 30.0}}),
    "betas": ({}, {"train": {"beta1": 0.3, "beta2": 0.5}}),
    "eps": ({}, {"train": {"eps": 0.1}}),
    "gradient clip": ({}, {"train": {"gradient_clip": 0.01}}),
    "weight decay of DeepSpeed's": ({"optimizer": TORCH}, {"train": {"weight_decay": 30.0}}),
    "betas and eps of DeepSpeed's": (
        {"optimizer": TORCH},
        {"deepspeed": {"optimizer": {**TORCH, "params": {"torch_adam": True, **OWN}}}},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    write_text(folder)
    return folder


def tree_of(folder: Path, stage: int, name: str, **sections: Any) -> dict[str, Any]:
    train = {"steps": BEFORE + AFTER, "move_within": 0, **sections.get("train", {})}
    settings = {"zero_optimization": {"stage": stage}, **sections.get("deepspeed", {})}
    output = str(folder / f"{name}-{stage}".replace(" ", "_"))
    return tiny_config(folder, output=output, train=train, deepspeed=settings)


def losses_of(loop: Loop) -> list[float]:
    losses = [loop.step().loss for _ in range(AFTER)]
    loop.engine.close()
    return losses


def saved_and_undisturbed(tree: dict[str, Any]) -> tuple[Path, list[float]]:
    loop = make_loop(from_mapping(tree))
    for _ in range(BEFORE):
        loop.step()
    checkpoint = loop.save()
    return checkpoint, losses_of(loop)


def resumed(tree: dict[str, Any], checkpoint: Path) -> list[float]:
    loop = make_loop(from_mapping(tree), read_state(checkpoint))
    loop.load(checkpoint)
    return losses_of(loop)


def undisturbed_and_resumed(trees: list[dict[str, Any]]) -> list[tuple[list[float], list[float]]]:
    results = []
    for tree in trees:
        checkpoint, undisturbed = saved_and_undisturbed(tree)
        results.append((undisturbed, resumed(tree, checkpoint)))
    return results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_goes_on_as_the_undisturbed_one(optimizer: str, folder: Path) -> None:
    trees = [tree_of(folder, stage, optimizer, deepspeed=OPTIMIZERS[optimizer]) for stage in STAGES]
    for undisturbed, again in run_ranks(undisturbed_and_resumed, 2, trees, timeout=120)[0]:
        assert again == undisturbed


def old_and_changed(
    before: dict[str, Any], after: dict[str, Any]
) -> tuple[list[float], list[float], list[float]]:
    """Losses by the old settings; and by the new ones, resumed, and in an engine made for them."""
    checkpoint, old = saved_and_undisturbed(before)
    loop = make_loop(from_mapping(after), read_state(checkpoint))
    # What DeepSpeed has just made has its own settings, whatever moments it is given.
    loop.engine.load_whole(read_whole(checkpoint))
    return old, resumed(after, checkpoint), losses_of(loop)


def of_all(
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    return {name: old_and_changed(*pair) for name, pair in pairs.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_settings_that_changed_hold_on_every_way_of_resuming(stage: int, folder: Path) -> None:
    pairs = {}
    for name, (settings, change) in CHANGES.items():
        before = tree_of(folder, stage, name, deepspeed=settings)
        pairs[name] = before, tree_of(folder, stage, name, **{"deepspeed": settings, **change})
    for name, (old, again, made) in run_ranks(of_all, 1, pairs, timeout=120)[0].items():
        # The first loss is of the weights in the checkpoint.
        assert again[0] == pytest.approx(old[0], abs=1e-6), name
        assert again == pytest.approx(made, abs=1e-6), name
        assert abs(again[1] - old[1]) > 1e-5, name


def test_only_settings_in_force_are_said_to_have_changed(folder: Path, tmp_path: Path) -> None:
    adamax = OPTIMIZERS["Adamax"]
    for settings, said in (
        ({}, ["train.beta1: 0.3, was 0.9", "train.beta2: 0.5, was 0.95"]),
        (adamax, []),
    ):
        save_resolved(
            from_mapping(tree_of(folder, 1, "said", deepspeed=settings)), tmp_path / "run.yaml"
        )
        now = tree_of(folder, 1, "said", deepspeed=settings, **CHANGES["betas"][1])
        assert changed_settings(from_mapping(now), tmp_path) == said


class _Inner:
    """Of an optimizer: what it keeps of each parameter."""

    def __init__(self, *states: dict[str, int]) -> None:
        self.state = dict(enumerate(states))


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([], False),
        ([{}, {}], False),
        ([{"exp_avg": 1, "exp_avg_sq": 1}, {}], True),
        # Muon: Adam for vectors alone, whose moments are linked; "any" ended it at its first step.
        ([{"exp_avg": 1, "exp_avg_sq": 1}, {"momentum_buffer": 1}], False),
    ],
    ids=["none", "before the first step", "Adam", "Muon"],
)
def test_moments_are_kept_only_where_all_that_stepped_have_them(
    states: list[dict[str, int]], kept: bool
) -> None:
    engine = object.__new__(Engine)
    engine._engine = SimpleNamespace(optimizer=_Inner(*states))
    assert engine.keeps_moments is kept
