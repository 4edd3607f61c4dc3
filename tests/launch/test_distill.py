"""`launch.convert distillation`: a dense run becomes a TokenFormer run, and bad input one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from adaptive.blocks.pattention import PattentionConfig
from adaptive.models.convert.distillation import DistillationConfig
from launch.checkpoint.files import find_checkpoint, load_model
from launch.checkpoint.models import load_decoder
from launch.conversions.distillation import distill_decoder
from launch.convert import main
from launch.run.config import from_mapping, load_saved
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

FITTING = DistillationConfig(max_tokens=512, steps=10)


def save_dense(folder: Path) -> Path:
    """A few steps of a routed decoder, so that wrapped layers are distilled too."""
    loop = make_loop(from_mapping(tiny_config(folder)))
    for _ in range(2):
        loop.step()
    return loop.save()


def resume(folder: Path) -> float:
    """The loss of the first step of the run in `folder`."""
    config = load_saved(folder)
    loop = make_loop(config)
    loop.load(find_checkpoint(folder))
    return loop.step().loss


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    write_text(folder)
    return run_ranks(save_dense, 1, folder, timeout=60)[0]


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_dense_run_becomes_a_tokenformer_that_trains_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = checksums(source.parent.parent)
    sizes = PattentionConfig(tokens=64, ffn_tokens=128)
    reports, before, after, _ = distill_decoder(
        load_decoder(source), tmp_path / "new", pattention=sizes, fitting=FITTING
    )
    assert checksums(source.parent.parent) == checked
    said = capsys.readouterr().out
    assert [report.name for report in reports[5:7]] == [
        "layers.1.block.attention.query",
        "layers.1.block.attention.key",
    ]
    assert len(reports) == 10
    assert all(report.name in said for report in reports)
    # Projections behind a norm are linear in the direction of their input, hence nearly exact.
    assert reports[0].error < 0.01
    assert abs(after - before) < 0.05
    assert f"held-out loss {before:.4f} -> {after:.4f}" in said
    model, config = load_model(tmp_path / "new")
    assert config.model.pattention == sizes
    assert model.layers[0].ffn.num_tokens == 128
    first = run_ranks(resume, 1, tmp_path / "new", timeout=60)[0]
    assert abs(first - after) < 0.2


def test_bad_input_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["distillation", *map(str, words)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    sizes = ["--tokens", 8, "--ffn-tokens", 8]
    new = tmp_path / "new"
    main(["distillation", *map(str, [source, "--output", new, *sizes, "--steps", 0])])
    assert "already holds checkpoints" in refused(source, "--output", new, *sizes)
    line = refused(new, "--output", tmp_path / "b", *sizes)
    assert "must be a decoder of linear layers, without model.pattention" in line
    sizes[1] = 0
    line = refused(source, "--output", tmp_path / "c", *sizes)
    assert line == "error: --tokens=0: must be at least 1\n"
