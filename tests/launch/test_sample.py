"""`launch.sample` and `launch.quality`, from a checkpoint on disk to the files they write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.samplers import SamplingConfig, sample
from launch import quality
from launch.checkpoint.files import save_tensors, write_description
from launch.checkpoint.state import RunState
from launch.data.images import to_pixels
from launch.run.config import from_mapping
from launch.sample import main
from parallel.checkpoint import save_atomically

MODEL = {"image_size": 8, "channels": 1, "patch_size": 2, "num_classes": 10, "dim": 16}
MODEL |= {"num_heads": 2, "encoder_depth": 1, "middle_depth": 1, "decoder_depth": 1}


def models() -> tuple[DiffusionTransformer, DiffusionTransformer]:
    """As if trained, and as if averaged: two different models."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = DiffusionTransformer(DiffusionConfig(**MODEL))
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        made.append(model)
    made[1].trunk.fusion.mask_token.copy_(made[0].trunk.fusion.mask_token)
    return made[0], made[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sampling = {"steps": 3, "scale": 1.5}
    tree = {"task": "diffusion", "model": MODEL, "sampling": sampling}
    trained, averaged = models()
    state = {f"average.{name}": p.detach() for name, p in averaged.named_parameters()}

    def write(at: Path) -> None:
        save_tensors(dict(trained.state_dict()), at / "model.safetensors")
        save_tensors(state, at / "task.safetensors")
        write_description(at, RunState(step=1), from_mapping(tree))

    save_atomically(folder / "checkpoints", 1, write, keep=1)
    return folder


def fail(capsys: pytest.CaptureFixture[str], program: object, *arguments: object) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as stop:
        program([str(word) for word in arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("weights", ["average", "trained"])
def test_archive_holds_the_samples_of_the_weights_asked_for(
    weights: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "s.npz"
    words = [run_folder, "--npz", archive, "--labels", "3,7", "--per-class", 2, "--seed", 5]
    main([str(word) for word in [*words, "--weights", weights, "--batch-size", 3]])
    found = np.load(archive)
    assert found["labels"].tolist() == [3, 3, 7, 7]
    assert (found["arr_0"].shape, found["arr_0"].dtype) == ((4, 8, 8, 1), np.uint8)
    model = models()[weights == "average"]
    config = SamplingConfig(steps=3, scale=1.5)
    want = to_pixels(sample(model, torch.tensor([3, 3, 7, 7]), config, seed=5))
    # Batches of another size may round another way.
    assert np.abs(found["arr_0"].astype(int) - want.astype(int)).max() <= 1
    out = capsys.readouterr().out
    assert re.search(r"4 images in [\d.]+ s: [\d.]+ images/s, [\d.,]+ MFLOP an image", out)


def test_picture_has_one_row_a_class(run_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "s.png"
    main([str(run_folder), "--png", str(picture), "--per-class", "3", "--guidance", "none"])
    with Image.open(picture) as image:
        assert (image.mode, image.size) == ("L", (4 * (3 * 9 + 1), 4 * (10 * 9 + 1)))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--labels", "1,10"], "error: --labels=1,10: '10' must be between 0 and 9"),
        (["--labels", "cat"], "error: --labels=cat: 'cat' must be between 0 and 9"),
        (["--labels", "\u00b2"], "error: --labels=\u00b2: '\u00b2' must be between 0 and 9"),
        (["--per-class", "0"], "error: --per-class=0: must be at least 1"),
        (["--steps", "0"], "error: --steps=0: must be at least 1"),
        (["--scale", "-1"], "error: --scale=-1.0: must be 0 or more and finite"),
        (
            ["--png", "/nowhere/at/all.png"],
            "error: --png=/nowhere/at/all.png: its folder does not exist",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(
    words: list[str], line: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(capsys, main, run_folder, *words) == line


def test_other_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no intact checkpoint" in fail(capsys, main, tmp_path)
    tree = {"task": "diffusion", "model": MODEL}

    def write(at: Path) -> None:
        save_tensors(dict(models()[0].state_dict()), at / "model.safetensors")
        write_description(at, RunState(step=1), from_mapping(tree))

    save_atomically(tmp_path / "checkpoints", 1, write, keep=1)
    assert "holds no averaged weights; use --weights=trained" in fail(capsys, main, tmp_path)


def test_quality_is_measured_for_both_kinds_of_guidance(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "q.json"
    words = [run_folder, "--samples", 64, "--steps", 1, "--sampler", "euler", "--json", figures]
    quality.main([str(word) for word in words])
    rows = {row["guidance"]: row for row in json.loads(figures.read_text())}
    assert list(rows) == ["real images", "path_drop", "classifier_free"]
    assert rows["real images"]["accuracy"] > 0.9
    # A model that was never trained is found out.
    assert rows["path_drop"]["accuracy"] < 0.5
    cost = [rows[name]["operations_per_image"] for name in ("path_drop", "classifier_free")]
    # Depth 1/1/1: (2 + 1 + 2) / 6 of the blocks.
    assert cost[0] / cost[1] == pytest.approx(5 / 6, abs=0.02)
    assert "accuracy" in capsys.readouterr().out


def test_too_few_samples_for_a_covariance_are_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(capsys, quality.main, run_folder, "--samples", 10)
    assert line == "error: --samples=10: must be at least 64"


def test_training_reports_a_grid_of_averaged_samples(tmp_path: Path) -> None:
    from tests.distributed.test_sprint import reported_grid, tiny_run
    from tests.ranks import run_ranks

    grid, want = run_ranks(reported_grid, 1, tiny_run(tmp_path), str(tmp_path), timeout=60)[0]
    assert grid.shape == (3, 4 * (10 * 9 + 1), 4 * (8 * 9 + 1))
    assert np.array_equal(grid, want)
