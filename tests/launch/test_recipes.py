"""Every recipe is one that would run: configuration, data, model on the meta device, plan."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.comparison.config import load_comparison
from launch.comparison.runs import plan_runs
from launch.run.config import load_config
from launch.run.preflight import check_run

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_would_run(path: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    if "arms" in tree:
        comparison = load_comparison(path, [f"output={tmp_path}"])
        runs = plan_runs(comparison, RECIPES)
        each = len(tree["seeds"]) * len(comparison.budgets) * max(len(comparison.sizes), 1)
        assert len(runs) == len(tree["arms"]) * each
        return
    check_run(load_config(path, [f"output={tmp_path / 'run'}"]), ranks=2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_has_a_script_of_its_name(path: Path) -> None:
    script = path.with_suffix(".sh")
    assert os.access(script, os.X_OK)
    assert "${PYTHON:-" in script.read_text()


def test_a_script_shows_its_plan_with_the_python_it_is_given(tmp_path: Path) -> None:
    import sys

    done = subprocess.run(
        [RECIPES / "mod_lm.sh", "--dry_run", "--ranks", "4", f"output={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    # A slow machine is told what is being done meanwhile.
    command, plan = [x for x in done.stdout.splitlines() if not x.endswith(" …")]
    assert command.startswith(f"{sys.executable} -m deepspeed.launcher.runner")
    assert "--num_gpus 4" in command
    assert "4 data ranks x 1 micro-batches" in plan
    assert not list(tmp_path.iterdir())
