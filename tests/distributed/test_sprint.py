"""SPRINT training does not depend on ranks, ZeRO stage or interruption, in either stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive.models import DiffusionTransformer
from adaptive.models.diffusion.samplers import sample
from adaptive.observe.metric_log import MetricLog
from launch.checkpoint.files import read_state
from launch.checkpoint.state import RunState
from launch.data.images import tile, to_pixels
from launch.run.averaging import WeightAverage
from launch.run.config import from_mapping
from launch.run.engine import Engine
from launch.run.loop import Loop
from launch.run.ranks import StopRequest, join_ranks
from launch.tasks.diffusion import averaged_weights
from launch.tasks.registry import task_class
from parallel.mesh import Mesh
from tests.ranks import run_ranks

STEPS = 3  # of each stage


def tiny_run(folder: Path, *, stage: int = 0, **train: Any) -> dict[str, Any]:
    """Both SPRINT stages on the digits: 8 images of 16 tokens a step, then 4."""
    return {
        "task": "diffusion",
        "output": str(folder),
        "model": {
            "image_size": 8,
            "channels": 1,
            "patch_size": 2,
            "num_classes": 10,
            "dim": 32,
            "num_heads": 2,
            "encoder_depth": 1,
            "middle_depth": 1,
            "decoder_depth": 1,
        },
        "data": {"validation_fraction": 0.01},
        "average": {"decay": 0.5},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "weight_decay": 0.0,
            "move_within": 0,
            **train,
        },
        "monitor": {"tensorboard": False},
        "checkpoint": {"keep": 20},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "phases": [
            {"name": "stage 1", "model": {"keep": 0.25}},
            {"name": "stage 2", "model": {"keep": 1.0}, "train": {"batch_size": 4}},
        ],
    }


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    validation: dict[str, float]


def train_stages(tree: dict[str, Any], source: str | None = None, stop: int | None = None) -> Any:
    """Train both stages, from `source` if given, saving before the last step of each stage.

    With `stop`, end (and save) after that many steps in all.
    """
    run = from_mapping(tree)
    device = join_ranks()
    mesh = Mesh.create(**vars(run.parallel))
    state = RunState() if source is None else read_state(Path(source))
    checkpoint = None if source is None else Path(source)
    losses: list[float] = []
    for number, config in enumerate(run.phase_configs()):
        if number < state.phase:
            continue
        if number > state.phase:
            state = dataclasses.replace(state, phase=number, phase_step=0)
        task = task_class(config.task)(config, mesh=mesh, device=device)
        engine = Engine(config, task, mesh=mesh, device=device)
        loop = Loop(config, task, engine, state=state, stop=StopRequest())
        task.start_phase(engine)
        if checkpoint is not None:
            loop.load(checkpoint)
        while loop.state.phase_step < STEPS and loop.state.step != stop:
            losses.append(loop.step().loss)
        checkpoint, state = loop.save(), loop.state
        if loop.state.step == stop or number == 1:
            outcome = Outcome(
                losses,
                engine.full_weights(),
                averaged_weights(task.shared_state(engine)),
                loop.evaluate(),
            )
            engine.close()
            return outcome, str(checkpoint)
        engine.close()
    raise AssertionError("not reached")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One rank, no ZeRO, nothing accumulated."""
    tree = tiny_run(tmp_path_factory.mktemp("one"))
    return run_ranks(train_stages, 1, tree, timeout=120)[0][0]


def assert_same(outcome: Outcome, reference: Outcome, *, atol: float) -> None:
    assert outcome.losses == pytest.approx(reference.losses, abs=atol)
    assert outcome.validation == pytest.approx(reference.validation, abs=atol)
    for kind in ("weights", "average"):
        got, want = getattr(outcome, kind), getattr(reference, kind)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(
                got[name], want[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_average_is_the_written_out_recursion(reference: Outcome) -> None:
    """decay 0.5 from the start weights: it is neither the weights nor where they began."""
    assert any(
        not torch.allclose(reference.average[n], reference.weights[n], atol=1e-4)
        for n in reference.average
    )
    trained = {n for n in reference.weights if n != "trunk.fusion.mask_token"}
    assert reference.average.keys() == trained


def at_every_zero_stage(folder: Path) -> list[Outcome]:
    outcomes = []
    for stage in (0, 1, 2, 3):
        tree = tiny_run(folder / str(stage), stage=stage, micro_batch_size=2)
        outcomes.append(train_stages(tree)[0])
    return outcomes


def test_two_ranks_give_the_loss_and_average_of_one(reference: Outcome, tmp_path: Path) -> None:
    """At ZeRO 0, 1, 2 and 3, with accumulation, in both stages."""
    for outcome in run_ranks(at_every_zero_stage, 2, tmp_path, timeout=150)[0]:
        # 1e-5: float32 sums in another order.
        assert_same(outcome, reference, atol=1e-5)


def stopped_and_continued(folder: Path) -> tuple[Outcome, list[Outcome]]:
    """An undisturbed run, and runs stopped in stage 1 and in stage 2 that went on."""
    whole, _ = train_stages(tiny_run(folder / "whole", stage=1))
    joined = []
    for stop in (2, 5):
        tree = tiny_run(folder / str(stop), stage=1)
        before, checkpoint = train_stages(tree, stop=stop)
        torch.manual_seed(99)
        after, _ = train_stages(tree, checkpoint)
        joined.append(dataclasses.replace(after, losses=before.losses + after.losses))
    return whole, joined


def test_a_run_stopped_in_either_stage_continues_exactly(tmp_path: Path) -> None:
    whole, joined = run_ranks(stopped_and_continued, 2, tmp_path, timeout=150)[0]
    for outcome in joined:
        assert_same(outcome, whole, atol=0)


def test_a_checkpoint_continues_on_other_ranks_and_zero_stages(
    reference: Outcome, tmp_path: Path
) -> None:
    """The average is saved whole: two ranks at ZeRO 3 stop in stage 1, one rank goes on."""
    tree = tiny_run(tmp_path, stage=3)
    before, checkpoint = run_ranks(train_stages, 2, tree, stop=2, timeout=120)[0]
    saved = averaged_weights(load_file(Path(checkpoint) / "task.safetensors"))
    assert all(torch.equal(saved[name], value) for name, value in before.average.items())
    after, _ = run_ranks(train_stages, 1, tiny_run(tmp_path), checkpoint, timeout=120)[0]
    joined = dataclasses.replace(after, losses=before.losses + after.losses)
    assert_same(joined, reference, atol=1e-5)


def averages_at(tree: dict[str, Any]) -> tuple[list[tuple[dict, dict]], int]:
    """Weights and their average after every step of stage 1, and how much this rank holds."""
    config = from_mapping(tree).phase_configs()[0]
    device = join_ranks()
    mesh = Mesh.create()
    task = task_class(config.task)(config, mesh=mesh, device=device)
    engine = Engine(config, task, mesh=mesh, device=device)
    loop = Loop(config, task, engine, state=RunState(), stop=StopRequest())
    average = WeightAverage(engine, decay=0.75)
    seen = [(engine.full_weights(), average.gather(engine))]
    for step in range(STEPS):
        loop.step()
        average.update(engine, step + 1)
        seen.append((engine.full_weights(), average.gather(engine)))
    held = sum(shard.numel() for shard in average._shards.values())
    engine.close()
    return seen, held


@pytest.mark.parametrize("stage", [0, 3])
def test_the_average_is_sharded_and_follows_its_formula(stage: int, tmp_path: Path) -> None:
    results = run_ranks(averages_at, 2, tiny_run(tmp_path, stage=stage), timeout=120)
    seen, _ = results[0]
    want = {name: seen[0][0][name].double() for name in seen[0][1]}
    for weights, average in seen[1:]:
        want = {name: 0.75 * want[name] + 0.25 * weights[name].double() for name in want}
        for name, value in average.items():
            torch.testing.assert_close(value.double(), want[name], rtol=0, atol=1e-6)
    total = sum(value.numel() for value in seen[0][1].values())
    held = [own for _, own in results]
    assert sum(held) == total
    # ZeRO splits flattened groups, so halves differ by padding at most.
    assert max(held) <= 0.55 * total


def reported_grid(tree: dict[str, Any], folder: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture that training writes to TensorBoard, and the one that it should be."""
    from io import BytesIO

    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = from_mapping(tree).phase_configs()[0]
    device = join_ranks()
    task = task_class(config.task)(config, mesh=Mesh.create(), device=device)
    engine = Engine(config, task, mesh=Mesh.create(), device=device)
    loop = Loop(config, task, engine, state=RunState(), stop=StopRequest())
    task.start_phase(engine)
    loop.step()
    with MetricLog(folder) as log:
        task.report(engine, 1, log)
    events = EventAccumulator(str(Path(folder) / "tensorboard" / Path(folder).name))
    events.Reload()
    (event,) = events.Images("samples")
    picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)).convert("RGB"))
    model = DiffusionTransformer(config.model)
    model.load_state_dict(engine.full_weights())
    model.load_state_dict(averaged_weights(task.shared_state(engine)), strict=False)
    labels = torch.arange(10).repeat_interleave(config.sampling.per_class)
    images = sample(model, labels, config.sampling, seed=0)
    sheet = tile(to_pixels(images), config.sampling.per_class, zoom=4)
    engine.close()
    return picture.transpose(2, 0, 1), sheet.repeat(3, 2).transpose(2, 0, 1)
