"""Configurations by the keys of earlier versions: files are read, command lines are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.run.arguments import describe
from launch.run.config import is_same, load_config, load_saved, save_resolved
from launch.run.errors import BadInput
from launch.run.older import with_todays_keys

# Written by the last version with these keys, for
# recipes/sprint_dit.yaml phases[1].data.average.decay=0.9 data.samples_per_class=4
BEFORE = Path(__file__).parents[1] / "golden" / "run_of_sprint_dit.yaml"
RECIPE = Path(__file__).parents[2] / "recipes" / "sprint_dit.yaml"


def test_a_run_of_before_is_read_by_checkpoints_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BEFORE.read_text())
    config = load_saved(tmp_path)
    assert config == load_config(
        RECIPE, ["phases[1].average.decay=0.9", "sampling.per_class=4", "output=runs/sprint_dit"]
    )
    assert load_config(tmp_path / "run.yaml") == config
    assert (config.average.decay, config.sampling.scale) == (0.995, 1.5)
    assert [phase.average.decay for phase in config.phase_configs()] == [0.995, 0.9]
    # What its folder remembers is the same run, however the version wrote it.
    assert is_same(yaml.safe_load(BEFORE.read_text()), config)
    assert not is_same({**yaml.safe_load(BEFORE.read_text()), "output": "other"}, config)
    save_resolved(config, tmp_path / "run.yaml")
    assert load_saved(tmp_path) == config
    assert "samples_per_class" not in (tmp_path / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "data.average.decay=0.5",
            "data.average.decay: is average.decay now; give average",
        ),
        ("data.samples_per_class=2", "data.samples_per_class: is sampling.per_class now"),
        ("phases[0].data.sampling.steps=4", "is phases[0].sampling.steps now"),
    ],
)
def test_an_older_key_on_the_command_line_names_todays(override: str, line: str) -> None:
    with pytest.raises(BadInput) as refused:
        load_config(RECIPE, [override])
    assert line in str(refused.value)


def test_a_key_by_both_names_is_refused() -> None:
    tree = {"task": "diffusion", "data": {"average": {"decay": 0.5}}, "average": {}}
    with pytest.raises(BadInput, match=r"data\.average and average: give average alone"):
        with_todays_keys(tree)


def test_sections_are_of_the_tasks_that_have_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="average: unknown key"):
        load_config(None, ["average.decay=0.5"])
    save_resolved(load_config(None), tmp_path / "run.yaml")
    assert "average" not in (tmp_path / "run.yaml").read_text()
    told = describe(str(RECIPE), [])
    assert "sampling.per_class = 8" in told
    assert "sampling.scale = 1.5\n    guidance scale" in told
