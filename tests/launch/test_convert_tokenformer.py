"""launch.conversions.tokenformer: published weights become a run and come back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.checkpoint.files import load_model
from launch.conversions.tokenformer import load_published, save_published
from launch.convert import main
from launch.run.config import load_config
from launch.run.errors import BadInput

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenformer_lm.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in load_file(GOLDEN).items()
        if name.startswith("weights.")
    }
    path = tmp_path_factory.mktemp("published") / "weights.safetensors"
    save_file(weights, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_published_weights_become_a_run_and_come_back(
    kind: str, published: Path, tmp_path: Path
) -> None:
    source = published
    if kind == "bin":
        source = tmp_path / "weights.bin"
        torch.save(load_file(published), source)
    load_published(source, tmp_path / "run", num_heads=4)
    model, config = load_model(tmp_path / "run")
    golden = load_file(GOLDEN)
    torch.testing.assert_close(model(golden["input_ids"]), golden["logits"], atol=1e-4, rtol=0)
    assert config.model.pattention.ffn_tokens == 192
    save_published(str(tmp_path / "run"), tmp_path / "back.safetensors")
    back, before = load_file(tmp_path / "back.safetensors"), load_file(published)
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_loading_prints_the_line_that_trains_it_on(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    main(["tokenformer", "load", str(published), "--num_heads", "4", "--output", run])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"-m launch.start --config {run}/run.yaml")
    assert load_config(f"{run}/run.yaml").model.pattention is not None


def test_bad_input_is_one_line(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_published(tmp_path / "none", tmp_path / "run", num_heads=4)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.bin").write_bytes(b"junk")
    for name in ("junk.safetensors", "junk.bin"):
        with pytest.raises(BadInput, match="cannot be read"):
            load_published(tmp_path / name, tmp_path / "run", num_heads=4)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"word_embeddings\.weight: missing"):
        load_published(tmp_path / "other.safetensors", tmp_path / "run", num_heads=4)
    with pytest.raises(BadInput, match="num_heads=5: must divide dim=64"):
        load_published(published, tmp_path / "run", num_heads=5)
    assert not (tmp_path / "run").exists()
    load_published(published, tmp_path / "run", num_heads=4)
    with pytest.raises(BadInput, match="already holds checkpoints"):
        load_published(published, tmp_path / "run", num_heads=4)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "tokenformer",
                "save",
                str(tmp_path / "run"),
                str(tmp_path / "no" / "file.safetensors"),
            ]
        )
    assert ended.value.code == 2
    assert "its folder does not exist" in capsys.readouterr().err
