"""The configuration: one definition of every key, and the same run again from what it wrote."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adaptive.models.decoder.model import DecoderConfig
from launch.data.text import TextConfig
from launch.run.arguments import documentation, parse
from launch.run.config import (
    SECTIONS,
    RunConfig,
    from_mapping,
    load_config,
    load_saved,
    save_resolved,
)
from launch.run.engine import engine_settings
from launch.run.optimizer import audit_groups, learning_rate_at, parameter_groups
from launch.run.sections import TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"


def test_overrides_reach_nested_sections_and_keep_the_rest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        yaml.safe_dump({"model": {"dim": 64, "mixture_of_depths": {"capacity": 0.5}}})
    )
    config = load_config(
        recipe, ["model.mixture_of_depths.weight=sigmoid", "train.learning_rate=3e-4"]
    )
    assert config.model.dim == 64
    assert config.model.mixture_of_depths.capacity == 0.5
    assert config.model.mixture_of_depths.weight == "sigmoid"
    assert config.train.learning_rate == 3e-4
    assert config.output == "runs/mine"
    assert load_config(recipe, ["model.mixture_of_depths=null"]).model.mixture_of_depths is None


def test_what_a_run_writes_gives_the_same_run(tmp_path: Path) -> None:
    config = load_config(RECIPES / "mod_lm.yaml", ["model.mixture_of_depths.schedule=[1, 3]"])
    save_resolved(config, tmp_path / "run.yaml")
    assert load_saved(tmp_path) == config


def test_a_run_names_its_plugins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text("loaded = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ADAPTIVE_TRUSTED_CODE", "own_method")
    config = load_config(RECIPES / "mod_lm.yaml", ["plugins=[own_method]"])
    save_resolved(config, tmp_path / "run.yaml")
    assert load_saved(tmp_path).plugins == ["own_method"]
    assert load_saved(tmp_path) == config


def test_phases_lay_their_keys_over_the_run_and_over_one_another() -> None:
    config = from_mapping(
        {
            "train": {"steps": 100, "batch_size": 4},
            "phases": [
                {"name": "first", "train": {"steps": 10}, "model": {"dim": 64}},
                {"name": "second", "train": {"batch_size": 8}, "optimizer": "restart"},
            ],
        }
    )
    first, second = config.phase_configs()
    assert (first.train.steps, first.train.batch_size, first.model.dim) == (10, 4, 64)
    assert (second.train.steps, second.train.batch_size, second.model.dim) == (10, 8, 64)


def test_overrides_reach_a_phase_of_the_run() -> None:
    words = ["phases[0].train.steps=5", "phases.1.train.steps=7", "phases[1].model.num_heads=8"]
    first, second = load_config(RECIPES / "sprint_dit.yaml", words).phase_configs()
    assert (first.train.steps, second.train.steps) == (5, 7)
    assert (first.model.num_heads, second.model.num_heads) == (4, 8)
    assert second.train.batch_size == 256
    grown = load_config(RECIPES / "tokenformer_grow.yaml", ["train.growth[0].step=200"])
    assert grown.phase_configs()[0].train.steps == 200


def test_an_override_that_some_phase_leaves_in_force_is_taken() -> None:
    # The second phase has its own batch size; the first sets keep to what is asked for.
    words = ["train.batch_size=64", "model.keep=0.25", "train.log_every=7"]
    first, second = load_config(RECIPES / "sprint_dit.yaml", words).phase_configs()
    assert (first.train.batch_size, second.train.batch_size) == (64, 256)
    assert (first.train.log_every, second.train.log_every) == (7, 7)


def test_help_shows_what_holds_in_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help", "--config", str(RECIPES / "sprint_dit.yaml")], program="test")
    said = capsys.readouterr().out
    assert "\ntrain.steps = 900 in phases[0] stage 1, 150 in phases[1] stage 2\n" in said
    assert "\ntrain.beta2 = 0.95\n" in said


def test_deepspeed_json_is_laid_over_the_section(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    words = ["--deepspeed_config", str(path), "deepspeed.zero_optimization.overlap_comm=true"]
    parsed = parse(words, program="test")
    assert parsed.config.deepspeed == {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "bf16": {"enabled": True},
    }
    # The launcher starts each rank with these words: they must make the same configuration.
    assert parse(parsed.words, program="test").config == parsed.config


@pytest.mark.parametrize("path", sorted((RECIPES / "deepspeed").glob("*.json")), ids=str)
def test_the_deepspeed_files_fit_the_recipes(path: Path) -> None:
    words = ["--config", str(RECIPES / "mod_lm.yaml"), "--deepspeed_config", str(path)]
    settings = engine_settings(parse(words, program="test").config, 2)
    assert settings["bf16"] == {"enabled": True}
    assert settings["train_batch_size"] > 0


@pytest.mark.parametrize(
    "kind",
    [
        RunConfig,
        DecoderConfig,
        TextConfig,
        *(k for k in SECTIONS.values() if dataclasses.is_dataclass(k)),
    ],
)
def test_every_key_says_what_it_is(kind: Any) -> None:
    docs = documentation(kind)
    sections = {"model", "data", *SECTIONS} - {"phases"} if kind is RunConfig else set()
    for field in dataclasses.fields(kind):
        if field.name not in sections:
            assert docs.get(field.name), f"{kind.__name__}.{field.name}"


def test_help_lists_every_key_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help", "--config", str(RECIPES / "mod_lm.yaml")], program="test")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    config = load_config(RECIPES / "mod_lm.yaml")
    assert f"train.steps = {config.train.steps}\n" in said
    assert "model.mixture_of_depths.capacity = " in said
    for section in ("model", "data", "train", "parallel", "monitor", "checkpoint"):
        for field in dataclasses.fields(getattr(config, section)):
            assert f"{section}.{field.name} = " in said


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    train = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate_at(step, train) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[110] == pytest.approx(0.1)


def test_only_matrices_decay_and_every_parameter_has_one_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = parameter_groups(model, TrainConfig(weight_decay=0.2))
    by_decay = {group["weight_decay"]: group["params"] for group in groups}
    assert [p.ndim for p in by_decay[0.2]] == [2]  # type: ignore[attr-defined]
    assert [p.ndim for p in by_decay[0.0]] == [1, 1, 1]  # type: ignore[attr-defined]
    assert "24 parameters, each in exactly one group" in audit_groups(model, groups)
    with pytest.raises(ValueError, match=r"0.weight: must be in one optimizer group, is in 0"):
        audit_groups(model, groups[1:])
    with pytest.raises(ValueError, match=r"0.weight: must be in one optimizer group, is in 2"):
        audit_groups(model, [*groups, groups[0]])
