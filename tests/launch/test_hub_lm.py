"""Task hub_lm: a folder of transformers adapted, trained, resumed, sampled, exported."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from launch import convert, evaluate, generate
from launch.checkpoint.files import load_model
from launch.checkpoint.published import write_tokenizer
from launch.data.tokenizer import Tokenizer
from launch.run.config import from_mapping, load_saved
from launch.run.errors import BadInput
from launch.run.preflight import check_run
from launch.run.training import run
from launch.tasks.hub_language_model import distances
from tests.distributed.runs import Outcome, train_few, write_text
from tests.distributed.test_hub_training import ADAPT, SETTINGS, hub_config
from tests.ranks import run_ranks


def published(folder: Path, **settings: Any) -> Path:
    """A folder as `save_pretrained` leaves it, on bytes."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**SETTINGS | {"initializer_range": 0.2} | settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(Tokenizer("bytes"), folder)
    return folder


def weights_of(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "checkpoints" / f"step-{step:08}" / "model.safetensors")


def trained(tree: dict[str, Any]) -> None:
    run(from_mapping(tree))


def test_a_pretrained_folder_is_trained_resumed_sampled_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    folder = published(tmp_path / "dense")
    tree = hub_config(
        tmp_path,
        model={
            "settings": {},
            "pretrained": str(folder),
            "old_rate": 0.25,
            "distill": {"weight": 0.5},
        },
        data={"tokenizer": str(folder)},
        train={"steps": 4, "calibrate_rows": 2, "log_every": 1},
        checkpoint={"every": 2},
        monitor={"every": 1},
        deepspeed={"zero_optimization": {"stage": 1}},
    )
    run_ranks(trained, 2, tree, timeout=120)
    whole = tmp_path / "run"
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[1])
    assert {"loss/train", "loss/train/text", "loss/train/distillation"} <= set(first)
    assert 0.7 < first["throughput/executed_share_of_nominal"] < 0.95

    resumed = tmp_path / "resumed" / "checkpoints" / "step-00000002"
    shutil.copytree(whole / "checkpoints" / "step-00000002", resumed)
    run_ranks(trained, 2, tree | {"output": str(tmp_path / "resumed")}, timeout=120)
    for name, weight in weights_of(whole, 4).items():
        assert weight.equal(weights_of(tmp_path / "resumed", 4)[name]), name
    elsewhere = {
        "output": str(tmp_path / "other"),
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    shutil.copytree(resumed, tmp_path / "other" / "checkpoints" / "step-00000002")
    run_ranks(trained, 1, tree | elsewhere, timeout=120)
    for name, weight in weights_of(tmp_path / "other", 4).items():
        torch.testing.assert_close(weight, weights_of(whole, 4)[name], atol=2e-5, rtol=1e-4)

    # A checkpoint is whole without the folder, and holds no teacher.
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    model, config = load_model(whole)
    assert set(weights_of(whole, 4)) == {n for n, _ in model.named_parameters()} | {
        n for n in model.state_dict() if n.endswith("threshold")
    }
    assert config == load_saved(whole)
    generate.main([str(whole), "--prompt", "def f", "--max-tokens", "8", "--calibrate"])
    said = capsys.readouterr()
    assert "def f" in said.out
    assert "of the tokens computed in 1 routed layers" in said.err

    convert.main(["to_transformers", str(whole), "--output", str(tmp_path / "exported")])
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = torch.randint(1, 256, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits)
    (tmp_path / "short.txt").write_text("def f1(x): return x * 3 + f7(x)\n" * 6)
    losses = []
    for where in (whole, tmp_path / "exported"):
        output = tmp_path / "measured.json"
        arguments = ["--data", str(tmp_path / "short.txt"), "--context", "32"]
        evaluate.main([str(where), *arguments, "--output", str(output)])
        losses.append(json.loads(output.read_text())["sources"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    with pytest.raises(SystemExit, match="2"):
        generate.main([str(whole), "--show-routing"])
    assert "--show-routing" in capsys.readouterr().err


def test_old_weights_learn_at_their_rate_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path)
    train = {"steps": 1, "weight_decay": 0.0, "warmup_steps": 0}

    def moved(rate: float, stages: tuple[int, ...]) -> dict[int, Outcome]:
        tree = hub_config(tmp_path, model={"old_rate": rate}, train=train)
        found: dict[int, Outcome] = run_ranks(train_few, 1, tree, stages, timeout=120)[0]
        return found

    config = from_mapping(hub_config(tmp_path, train=train))
    torch.manual_seed(config.train.seed)
    begun = config.model.adapted(config.model.dense()).state_dict()

    def steps(outcome: Outcome, *, new: bool) -> torch.Tensor:
        return torch.cat(
            [
                (weight - begun[name]).abs().flatten()
                for name, weight in outcome.weights.items()
                if (".routing." in name) == new and weight.is_floating_point()
            ]
        )

    (slow,) = moved(0.25, (1,)).values()
    # Adam's first step is as long as its rate wherever there is a gradient.
    assert steps(slow, new=True).quantile(0.9) == pytest.approx(3e-3, rel=1e-2)
    assert steps(slow, new=False).quantile(0.9) == pytest.approx(0.25 * 3e-3, rel=1e-2)
    for outcome in moved(0.0, (0, 3)).values():
        assert steps(outcome, new=True).quantile(0.9) == pytest.approx(3e-3, rel=1e-2)
        assert not steps(outcome, new=False).any()


def test_exits_are_among_the_methods_of_a_run(tmp_path: Path) -> None:
    adapt = {
        "early_exit": {"layers": [1]},
        "mixture_of_depths": None,
        "skip_layer": {"layers": [0]},
    }
    found = from_mapping(hub_config(tmp_path, model={"adapt": adapt})).model.methods
    assert [method.name for method in found] == ["skip_layer", "early_exit"]


def test_distances_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    found = distances(student, teacher.detach(), temperature=2.0)
    for row in range(3):
        of = [[float(x) / 2 for x in logits[row]] for logits in (student, teacher)]
        sums = [sum(map(math.exp, logits)) for logits in of]
        q, p = (
            [math.exp(x) / total for x in logits] for logits, total in zip(of, sums, strict=True)
        )
        wanted = 4 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        assert float(found[row]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {"adapt": {"depths": {}}}}, "model: method='depths': is no method"),
        (
            {"model": {"adapt": {"mixture_of_depths": {"layers": [3]}}}},
            "layer 3 must be between 0 and 2",
        ),
        ({"model": {"adapt": {"mixture_of_depths": {"share": 1}}}}, "share: .* no such option"),
        ({"model": {"old_rate": 2}}, r"model.old_rate=2.0: must be from 0 to 1"),
        ({"model": {"old_rate": 0, "adapt": {}}}, "leaves nothing to train"),
        ({"model": {"settings": {"model_type": "alexnet"}}}, "must be one that transformers has"),
        ({"model": {"settings": {"model_type": "vit"}}}, "must be of a language model"),
        (
            {"model": {"pretrained": "/nowhere", "settings": {}}},
            "must be a folder with config.json",
        ),
        ({"model": {"pretrained": "/nowhere"}}, r"pretrained=/nowhere: has no \*.safetensors"),
        ({"model": {"distill": {"weight": 0}}}, r"model.distill.weight=0.0: must be in \(0, 1\]"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor=2: must be 1, models of transformers"),
        ({"data": {"seq_len": 64}}, "must be at most model.max_seq_len=32"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(sections: dict[str, Any], line: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    with pytest.raises(BadInput, match=line) as raised:
        check_run(from_mapping(hub_config(tmp_path, **sections)), ranks=2)
    assert "\n" not in str(raised.value)


def test_another_vocabulary_than_the_pretrained_models_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    folder = published(tmp_path / "dense", vocab_size=300)
    model = {"pretrained": str(folder), "settings": {}, "adapt": ADAPT}
    with pytest.raises(BadInput, match=r"data.tokenizer=bytes: must be the pretrained model's own"):
        check_run(from_mapping(hub_config(tmp_path, model=model)), ranks=1)
    (folder / "model.safetensors").unlink()
    published(folder, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(BadInput, match=r"is of another model than model.settings: missing keys"):
        from_mapping(
            hub_config(tmp_path, model=model | {"settings": {"num_hidden_layers": 3}})
        ).model.first_weights(0)


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_the_short_form_of_the_recipe_comes_near_the_dense_model(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "recipes" / "adapt_lm.sh"
    subprocess.run(
        [script, "--short", "--ranks", "2", f"output={tmp_path}"],
        check=True,
        timeout=600,  # took 585 s beside ten other programs, of 147 s of CPU
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )

    def losses(run_folder: Path) -> list[float]:
        lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
        return [line["validation/loss"] for line in lines if "validation/loss" in line]

    adapted = losses(tmp_path / "adapted")
    assert adapted[-1] < adapted[0]
    assert adapted[-1] < losses(tmp_path / "first")[-1] + 0.05  # of the same rows
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(exported).__name__ == "AdaptedLlamaForCausalLM"
