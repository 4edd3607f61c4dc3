"""Short runs of a tiny language model on this process group, for the tests of training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.checkpoint.contents import WEIGHTS
from launch.checkpoint.files import save_tensors, write_description
from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from launch.run.engine import Engine
from launch.run.loop import Loop
from launch.run.ranks import StopRequest, join_ranks
from launch.run.sections import RunConfig
from launch.tasks.registry import task_class
from parallel.checkpoint import save_atomically
from parallel.mesh import Mesh


def write_text(folder: Path) -> Path:
    """60 kB of text that has something to learn and takes no time to encode."""
    lines = [f"def f{n % 97}(x): return x * {n % 31} + f{n * 7 % 97}(x)\n" for n in range(1500)]
    path = folder / "text.py"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tiny_config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A Mixture-of-Depths decoder with every kind of parameter: [8 rows of 32 bytes] a step."""
    config: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {
            "dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_dim": 48,
            "max_seq_len": 32,
            "tie_embeddings": True,
            "mixture_of_depths": {"capacity": 0.25},
        },
        "data": {
            "path": str(folder / "text.py"),
            "seq_len": 32,
            "validation_rows": 6,
            "cache": str(folder / "cache"),
        },
        "train": {"steps": 3, "batch_size": 8, "warmup_steps": 1, "learning_rate": 3e-3},
        "monitor": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    for section, values in sections.items():
        config[section] = (
            {**config.get(section, {}), **values} if isinstance(values, dict) else values
        )
    return config


@dataclasses.dataclass
class Outcome:
    """Losses and norms of every step, weights after the last, validation metrics, state."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    validation: dict[str, float]
    state: RunState
    norms_of_parts: list[dict[str, float]] = dataclasses.field(default_factory=list)


def assert_same_norms(outcome: Outcome, reference: Outcome) -> None:
    """Of the whole gradient and of its parts, which together are the whole."""
    assert outcome.norms == pytest.approx(reference.norms, rel=1e-4)
    assert len(outcome.norms_of_parts) == len(outcome.norms)
    for parts, norm, wanted in zip(
        outcome.norms_of_parts, outcome.norms, reference.norms_of_parts, strict=True
    ):
        assert parts == pytest.approx(wanted, rel=1e-4, abs=1e-7)
        assert sum(part**2 for part in parts.values()) ** 0.5 == pytest.approx(norm, rel=1e-5)


def make_loop(config: RunConfig, state: RunState | None = None) -> Loop:
    device = join_ranks()
    mesh = Mesh.create(**vars(config.parallel))
    task = task_class(config.task)(config, mesh=mesh, device=device)
    engine = Engine(config, task, mesh=mesh, device=device)
    return Loop(config, task, engine, state=state or RunState(), stop=StopRequest())


def train_few(tree: dict[str, Any], stages: tuple[int, ...]) -> dict[int, Outcome]:
    """Train the same configuration at several ZeRO stages, one after another."""
    outcomes = {}
    for stage in stages:
        tree = {**tree, "deepspeed": {"zero_optimization": {"stage": stage}}}
        config = from_mapping(tree)
        loop = make_loop(config)
        losses, norms, parts = [], [], []
        for _ in range(config.train.steps):
            report = loop.step(gradient_norms=True)
            losses.append(report.loss)
            parts.append(report.gradient_norms)
            loop.check_moved()
            norms.append(loop.engine.gradient_norm or 0.0)
        weights = loop.engine.full_weights()
        outcomes[stage] = Outcome(losses, norms, weights, loop.evaluate(), loop.state, parts)
        loop.engine.close()
        torch.manual_seed(0)
    return outcomes


def write_untrained(config: RunConfig, state: RunState) -> None:
    """A checkpoint of `config.output` that says where a run is, of one weight."""

    def write(folder: Path) -> None:
        write_description(folder, state, config)
        save_tensors({"weight": torch.zeros(1)}, folder / WEIGHTS)

    save_atomically(Path(config.output) / "checkpoints", state.step, write)
