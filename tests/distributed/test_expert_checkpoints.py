"""A run continues at another expert-parallel degree as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.checkpoint.files import find_checkpoint, load_model, read_state
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

MODEL = {
    "mixture_of_depths": None,
    "mixture_of_experts": {"num_experts": 4, "ffn_dim": 24, "bias_rate": 0.01},
}


def tree(folder: Path, expert: int, stage: int, **model: Any) -> dict[str, Any]:
    return tiny_config(
        folder,
        model={**MODEL, **model},
        train={"steps": 4},
        parallel={"expert": expert},
        deepspeed={"zero_optimization": {"stage": stage}},
    )


def train(config_tree: dict[str, Any], steps: int, source: str | None) -> tuple[Any, ...]:
    """Train `steps`, from a checkpoint or from the start; save at the end."""
    config = from_mapping(config_tree)
    if source is None:
        loop = make_loop(config)
    else:
        folder = find_checkpoint(source)
        loop = make_loop(config, read_state(folder))
        loop.load(folder)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(loop.step().loss)
        norms.append(loop.engine.gradient_norm)
    weights = loop.engine.full_weights()
    moments = loop.engine.full_moments()
    path = loop.save()
    loop.engine.close()
    return losses, norms, weights, moments, str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[Any, ...]:
    """One rank, four steps."""
    return run_ranks(train, 1, tree(folder, 1, 0), 4, None, timeout=120)[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam's steps are as large for tiny gradients, whose rounding errors show.
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("before", "after", "stages"),
    [
        # (ranks, expert-parallel degree)
        ((2, 2), (2, 1), (1, 2)),
        ((2, 1), (2, 2), (2, 1)),
        ((2, 2), (2, 2), (0, 0)),
        ((4, 4), (2, 2), (2, 2)),
        ((2, 2), (1, 1), (1, 0)),
    ],
)
def test_a_run_continues_at_another_expert_parallel_degree(
    folder: Path,
    tmp_path: Path,
    undisturbed: tuple[Any, ...],
    before: tuple[int, int],
    after: tuple[int, int],
    stages: tuple[int, int],
) -> None:
    losses, norms, weights, moments, _ = undisturbed
    outputs = [{"output": str(tmp_path / "run")} for _ in range(2)]
    trees = [
        tree(folder, degree, stage) | output
        for (_, degree), stage, output in zip((before, after), stages, outputs, strict=True)
    ]
    first = run_ranks(train, before[0], trees[0], 2, None, timeout=120)[0]
    second = run_ranks(train, after[0], trees[1], 2, first[4], timeout=120)[0]
    assert first[0] + second[0] == pytest.approx(losses, abs=1e-5)
    assert first[1] + second[1] == pytest.approx(norms, rel=1e-4)
    assert_same(second[2], weights)
    assert_same(second[3], moments)
    model, _ = load_model(second[4])
    assert_same({n: t for n, t in model.state_dict().items() if n in weights}, weights)


def other_number(config_tree: dict[str, Any], source: str) -> str:
    config = from_mapping(config_tree)
    loop = make_loop(config)
    try:
        loop.load(find_checkpoint(source))
    except BadInput as error:
        return str(error)
    return ""


def test_a_checkpoint_with_another_number_of_experts_is_one_clear_line(
    folder: Path, undisturbed: tuple[Any, ...]
) -> None:
    experts = {"mixture_of_experts": {**MODEL["mixture_of_experts"], "num_experts": 8}}
    message = run_ranks(other_number, 1, tree(folder, 1, 0, **experts), undisturbed[4])[0]
    assert "is a checkpoint of another model: " in message
    assert "[8, " in message
    assert "[4, " in message
    assert "\n" not in message
