"""`launch.convert upcycling`: from checkpoints of ours or transformers to a mixture and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptive.flops import planned_flops
from adaptive.models import Decoder
from launch.checkpoint.files import load_model, write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.convert import main
from launch.run.config import from_mapping, load_config
from launch.run.preflight import check_run, starting_checkpoint
from parallel.checkpoint import save_atomically
from tests.adaptive.models.test_transformers_weights import ids, random_model
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

LLAMA = (
    '{"model_type": "llama", "vocab_size": 64, "hidden_size": %s, "num_hidden_layers": 1, '
    '"num_attention_heads": 2, "intermediate_size": 32}'
)


def dense_run(folder: Path, *, tie: bool, **sections: Any) -> tuple[Decoder, Path]:
    write_text(folder)
    model = {"mixture_of_depths": None, "tie_embeddings": tie, "init_std": 0.3}
    config = from_mapping(tiny_config(folder, model=model, **sections))
    torch.manual_seed(0)
    decoder = Decoder(config.model)
    names = {name for name, _ in decoder.named_parameters()}
    weights = {name: t for name, t in decoder.state_dict().items() if name in names}
    whole = WholeState(weights, {}, {}, RunState(step=7), config)
    save_atomically(folder / "run" / "checkpoints", 7, lambda at: write_whole(at, whole))
    return decoder, folder / "run"


@pytest.mark.parametrize("tie", [True, False])
def test_a_run_of_ours_is_upcycled(
    tie: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, source = dense_run(tmp_path, tie=tie)
    main(["upcycling", str(source), str(tmp_path / "out"), "--experts", "4", "--every", "2"])
    assert "4 experts" in capsys.readouterr().out
    sparse, config = load_model(tmp_path / "out")
    assert planned_flops(config, 2, 8) == planned_flops(sparse, 2, 8)
    torch.testing.assert_close(sparse(ids()), dense(ids()), atol=1e-4, rtol=0)
    assert config.model.mixture_of_experts.routed_layers(2) == [1]


def continued(tree: dict[str, Any], source: str) -> tuple[float, float]:
    from launch.checkpoint.files import find_checkpoint

    loop = make_loop(from_mapping(tree))
    loop.load(find_checkpoint(source), moments=False)
    return loop.evaluate()["loss"], loop.step().loss


def test_an_upcycled_run_trains_on(tmp_path: Path) -> None:
    _, source = dense_run(tmp_path, tie=True)
    main(["upcycling", str(source), str(tmp_path / "out"), "--experts", "4"])
    _, config = load_model(tmp_path / "out")
    before, loss = run_ranks(continued, 1, config.resolved(), str(tmp_path / "out"))[0]
    assert loss == pytest.approx(before, rel=0.1)


def test_the_line_it_prints_continues_with_what_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of another recipe has another top_k, or experts in other layers."""
    _, source = dense_run(tmp_path, tie=True)
    main(["upcycling", str(source), str(tmp_path / "out"), "--experts", "4", "--every", "2"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"continue {sys.executable} -m launch.start --config {tmp_path}/out/run.yaml"
    config = load_config(tmp_path / "out" / "run.yaml")
    assert config.model.mixture_of_experts.top_k == 2
    assert config.output == str(tmp_path / "out")
    checkpoint = starting_checkpoint(config)
    assert checkpoint == tmp_path / "out" / "checkpoints" / "step-00000000"
    check_run(config, ranks=2)


def test_what_a_run_resumed_from_is_not_what_its_mixture_resumes_from(tmp_path: Path) -> None:
    phases = [{"name": "a", "model": {"num_layers": 2}}]
    _, source = dense_run(tmp_path, tie=True, checkpoint={"resume": "never"}, phases=phases)
    main(["upcycling", str(source), str(tmp_path / "out"), "--experts", "4"])
    config = load_config(tmp_path / "out" / "run.yaml")
    assert (config.checkpoint.resume, config.phases) == ("auto", [])


def test_a_transformers_directory_becomes_mixtral_and_comes_back(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    dense = random_model("Llama", {})
    dense.save_pretrained(tmp_path / "llama")
    expected, run = dense(ids()).logits, str(tmp_path / "run")
    main(["upcycling", str(tmp_path / "llama"), run, "--experts", "4"])
    main(["to_transformers", run, "--output", str(tmp_path / "mixtral")])
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral").eval()
    torch.testing.assert_close(theirs(ids()).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "5", "--experts", "4"], "top_k=5: must be between 1 and num_experts=4"),
        (["--top-k", "1"], "top_k=1: an upcycled mixture equals the dense model only"),
        (["--router", "tree"], "router='tree': must be linear or hyperspherical"),
    ],
)
def test_bad_options_exit_with_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = dense_run(tmp_path, tie=False)
    with pytest.raises(SystemExit) as stop:
        main(["upcycling", str(source), str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_mixtral_directory_without_a_shard_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("Mixtral", {"num_local_experts": 4}).save_pretrained(tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    lacking = {n: t for n, t in weights.items() if "layers.1." not in n}
    save_file(lacking, tmp_path / "in" / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["upcycling", str(tmp_path / "in"), str(tmp_path / "out")])
    assert "model.layers.1.input_layernorm.weight: missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: is no JSON"),
        ("config.json", "[]", "config.json: must hold the settings"),
        ("config.json", '{"model_type": "llama"}', "vocab_size: missing from the settings"),
        ("config.json", "[" * 100_000, "config.json: is no JSON: nested too deeply"),
        ("config.json", LLAMA % '"x"', "hidden_size"),
        ("config.json", LLAMA % "null", "hidden_size"),
        ("model.safetensors", "cut", "model.safetensors: cannot be read"),
    ],
)
def test_a_directory_that_cannot_be_read_is_one_line(
    file: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / file).write_text(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["upcycling", str(tmp_path / "in"), str(tmp_path / "out")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_existing_folder_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["upcycling", str(tmp_path), str(tmp_path)])
    assert "exists; give a new folder" in capsys.readouterr().err
