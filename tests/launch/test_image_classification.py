"""Task image_classification, its pictures, and launch.budget_curve over a checkpoint of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adaptive import RoutingTape, TokenMergingConfig
from adaptive.observe.pictures import _COMPUTED, _SKIPPED
from launch import budget_curve
from launch.checkpoint.beginning import begin_run
from launch.checkpoint.files import load_model
from launch.run.config import load_config
from launch.run.errors import BadInput
from launch.tasks.image_classification import merging_pictures
from launch.tasks.registry import make_task

TINY = [
    "task=image_classification",
    "model.image_size=8",
    "model.channels=1",
    "model.patch_size=2",
    "model.num_classes=10",
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
]


def test_the_loss_is_the_mean_over_images_and_accuracy_is_counted() -> None:
    torch.manual_seed(0)
    task = make_task(load_config(None, TINY))
    model = task.build_model()
    batch = task.batch(range(6))
    logits = model(batch["images"])
    mean = task.loss_sum(model, batch) / task.tokens(range(6))
    torch.testing.assert_close(mean, F.cross_entropy(logits, batch["labels"]))
    held_out = task.validation_batch(range(9))
    sums = task.validation_sums(model, held_out)
    right = (model(held_out["images"]).argmax(-1) == held_out["labels"]).sum()
    assert sums["accuracy"] == (right, 9)
    assert not {*task.data.train.tolist()} & {*task.data.validation.tolist()}


def test_pictures_show_every_patch_that_is_left() -> None:
    config = load_config(None, [*TINY, "model.token_merging.amount=3"])
    task = make_task(config)
    torch.manual_seed(0)
    model = task.build_model()
    with RoutingTape(model) as tape:
        model(task.validation_batch(range(3))["images"])
    pictures = merging_pictures(tape.records, config.model)
    assert list(pictures) == ["layers.0", "layers.1"]
    # 16 patches an image, 3 fewer after each layer: less of the picture is dark each time.
    kept = [int(record.chosen.sum()) for record in tape.records[:2]]
    assert kept == [3 * 14, 3 * 11]
    shown = torch.tensor(_COMPUTED), torch.tensor(_SKIPPED)
    dark, pale = (
        [int((picture == colour).all(-1).sum()) for picture in pictures.values()]
        for colour in shown
    )
    cell = (dark[0] - dark[1]) / (kept[0] - kept[1])
    assert cell == (pale[1] - pale[0]) / (kept[0] - kept[1]) > 100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vit") / "run"
    config = load_config(None, [*TINY, f"output={output}"])
    torch.manual_seed(0)
    weights = make_task(config).build_model().state_dict()
    begin_run(config, weights, output=output)
    return output


def test_a_curve_of_one_model_at_many_budgets(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["model.token_merging.kind=bsm,random", "model.token_merging.amount=0,2,6"]
    words = [str(checkpoint), *keys, "--rows", "12", "--at-once", "5"]
    budget_curve.main([*words, "--metric", "accuracy", "--output", str(tmp_path / "curve")])
    points = json.loads((tmp_path / "curve.json").read_text())
    assert [point["settings"][1].rpartition("=")[2] for point in points] == ["0", "2", "6"] * 2
    shares = [point["share"] for point in points]
    assert shares[0] == shares[3] == 1.0
    assert 1 > shares[1] > shares[2]
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 7
    # Nothing merged is the checkpoint itself.
    task = make_task(load_config(checkpoint / "run.yaml"))
    model, _ = load_model(checkpoint)
    loss, count = task.validation_sums(model, task.validation_batch(range(12)))["loss"]
    assert points[0]["metrics"]["loss"] == pytest.approx(float(loss) / count, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.steps=1,2"], "'train.steps=1,2': must be model.KEY=VALUE,VALUE"),
        (["model.num_layers=1,2"], "makes another model: layers.1"),
        (["model.dim=32"], "size mismatch"),
        (["model.token_merging.kind=tome"], "must be"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    checkpoint: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        budget_curve.main([str(checkpoint), *words, "--rows", "4"])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_meshes_that_images_do_not_take_are_one_line() -> None:
    config = load_config(None, [*TINY, "parallel.context=2"])
    with pytest.raises(BadInput, match=r"parallel.context=2: must be 1"):
        make_task(config).check(config)
    assert replace(config.model, token_merging=TokenMergingConfig()).methods
