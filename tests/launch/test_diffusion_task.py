"""The diffusion task: rows that depend on nothing but their number, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.preflight import check_run
from launch.tasks.diffusion import DiffusionTask
from parallel.mesh import Mesh

MODEL = {"image_size": 8, "channels": 1, "patch_size": 2, "num_classes": 10, "dim": 32}
MODEL |= {"num_heads": 2, "encoder_depth": 1, "middle_depth": 1, "decoder_depth": 1}


def tree(**sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"task": "diffusion", "model": MODEL}
    for section, values in sections.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def task_of(**sections: Any) -> DiffusionTask:
    config = from_mapping(tree(**sections))
    return DiffusionTask(config, mesh=Mesh.single(), device=torch.device("cpu"))


def test_a_row_is_the_same_in_every_batch() -> None:
    task = task_of()
    whole, part = task.batch(range(10, 18)), task_of().batch(range(13, 15))
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name][3:5]), name
    assert not torch.equal(whole["noise"], task_of(train={"seed": 1}).batch(range(10, 18))["noise"])


def test_stage_two_keeps_every_token_and_draws_the_same_noise() -> None:
    sparse = task_of().batch(range(4))
    dense = task_of(model={"keep": 1.0}).batch(range(4))
    assert sparse["keep_ids"].shape == (4, 4)
    assert dense["keep_ids"].tolist() == [list(range(16))] * 4
    for name in ("images", "noise", "t", "y", "drop_path"):
        assert torch.equal(sparse[name], dense[name]), name


def test_path_drop_and_class_drop_reach_the_batch() -> None:
    batch = task_of(model={"path_drop": 1.0}, data={"class_drop": 1.0}).batch(range(5))
    assert batch["drop_path"].all()
    assert (batch["y"] == 10).all()
    batch = task_of(model={"path_drop": 0.0}, data={"class_drop": 0.0}).batch(range(50))
    assert not batch["drop_path"].any()
    assert (batch["y"] < 10).all()


def test_dropped_paths_stay_on_the_host_where_they_decide_what_is_computed() -> None:
    task = task_of()
    moved = task.on_device(task.batch(range(3)), "meta")
    assert {name for name, tensor in moved.items() if tensor.device.type == "cpu"} == {"drop_path"}


def test_held_out_times_cover_the_training_distribution() -> None:
    task = task_of()
    batch = task.validation_batch(range(task.validation_rows))
    normal = torch.logit(batch["t"])
    assert abs(float(normal.mean())) < 1e-3
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    assert not batch["drop_path"].any()
    assert batch["keep_ids"].shape[1] == 16


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"image_size": 6}}, "model.grid 3x3: must be divisible by the cell 2x2"),
        ({"model": {"keep": 0.3}}, "model.keep=0.3: structured keeping needs one of 0.125"),
        ({"model": {"num_classes": 7}}, "must be below model.num_classes=7"),
        ({"model": {"channels": 3}}, "the digits are 1x8x8, the model takes 3x8x8"),
        ({"sampling": {"steps": 0}}, "sampling.steps=0: must be at least 1"),
        ({"data": {"path": "/nowhere"}}, "data.path=/nowhere: no such folder"),
        ({"model": {"keeping": "cells"}}, "model.keeping='cells': must be one of"),
        ({"data": {"features": "x.npy"}}, "data.features and model.alignment: give both or none"),
    ],
)
def test_bad_input_is_refused_in_one_line(sections: dict, message: str, tmp_path: Path) -> None:
    def check() -> None:
        config = from_mapping({**tree(**sections), "output": str(tmp_path / "run")})
        check_run(config, ranks=1)

    with pytest.raises(BadInput) as refused:
        check()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_features_to_align_to_arrive_with_their_images(tmp_path: Path) -> None:
    features = np.arange(1797, dtype=np.float32)[:, None, None] * np.ones((1, 16, 6), np.float32)
    np.save(tmp_path / "features.npy", features)
    aligned = {"feature_dim": 6, "layer": 2, "hidden_dim": 8}
    data = {"features": str(tmp_path / "features.npy")}
    task = task_of(model={"alignment": aligned}, data=data)
    batch = task.batch(range(6))
    wanted = [task.data.train_index(0, row) for row in range(6)]
    assert batch["features"][:, 3, 2].tolist() == wanted
    model = task.build_model()
    from adaptive import RoutingTape

    with RoutingTape(model) as tape:
        loss = task.loss_sum(model, batch)
    (loss + tape.loss()).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(BadInput, match=r"features.npy: is 1797x16x6, must be 1797x16x7"):
        task_of(model={"alignment": {**aligned, "feature_dim": 7}}, data=data).batch(range(1))
