"""A method from outside the repository: what docs/new_method.md builds, in a folder alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive import RoutingTape, start_step
from adaptive.blocks.method import methods
from adaptive.flops import executed_flops, nominal_flops, planned_flops
from adaptive.models import Decoder
from launch.planning.machines import PUBLISHED
from launch.planning.plans import plan
from launch.run.config import load_config, load_saved
from launch.run.errors import exit_on_bad_input
from launch.run.parity import RecipeSubject
from launch.run.trust import UntrustedCode, trust
from parallel.mesh import Mesh
from parallel.parity import Report, Settings, check_on_ranks
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "new_method.md"
TEXT = "data.path=text.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and a text; nothing of it lies in the repository."""
    folder = tmp_path_factory.mktemp("own")
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (folder / "strided_depth.py").write_text(code)
    (folder / "strided.yaml").write_text(recipe)
    (folder / "text.txt").write_text("a method of one's own, from nothing to a trained run\n" * 400)
    return folder


def counted(folder: Path) -> dict[str, Any]:
    """In a process of its own: whoever imports the method has it."""
    os.chdir(folder)
    config = load_config("strided.yaml", [TEXT])
    model = Decoder(config.model)
    ids = torch.randint(0, 256, (3, 32))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, RoutingTape(model) as tape:
        (model.token_losses(ids, ids).mean() + tape.loss()).backward()
    layer: Any = model.layers[0]
    layer.dense_steps = 3
    dense = load_config("strided.yaml", [TEXT, "model.strided_depth=null"])
    machine = PUBLISHED["h100"].machine(mixed=True)
    return {
        "method": methods()[-1].name,
        "counted": counter.get_total_flops(),
        "planned": planned_flops(model, 3, 32, backward=True),
        "executed": float(executed_flops(model, tape.records, 3, 32, backward=True)),
        "nominal": nominal_flops(model, 3, 32, backward=True),
        "records": [(r.name, r.kind, r.tokens, r.executed) for r in tape.records],
        "strides": [start_step(torch.nn.Sequential(model), n) or layer.stride for n in (2, 3)],
        "activations": [plan(c, Mesh.single(), machine).activations for c in (config, dense)],
        "saved": config.resolved()["plugins"],
    }


def test_a_method_outside_the_repository_is_counted_recorded_and_planned(folder: Path) -> None:
    (found,) = run_ranks(counted, 1, folder)
    assert found["method"] == "strided_depth"
    assert found["planned"] == found["executed"] == found["counted"] < found["nominal"]
    routed = [(f"layers.{layer}", "strided_depth", 96, 24) for layer in range(2)]
    assert found["records"] == routed
    assert found["strides"] == [1, 4]
    assert found["activations"][0] < found["activations"][1]
    assert found["saved"] == ["strided_depth"]


def of_somebody_else(folder: Path) -> str:
    """Why a run's own file does not import what it names; once the user names it, it does."""
    os.chdir(folder)
    with pytest.raises(UntrustedCode) as refused:
        load_saved(Path("run"))
    assert "strided_depth" not in sys.modules
    trust(["strided_depth"])
    load_saved(Path("run"))
    return str(refused.value)


def test_it_trains_by_a_recipe_on_two_ranks_and_is_watched(folder: Path) -> None:
    words = ("--config", "strided.yaml", "--ranks", "2", TEXT, "output=run", "monitor.every=1")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "launch.start", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    assert any(key.startswith("routing/layers.0") for key in keys), sorted(keys)
    assert "validation/loss" in keys
    saved = yaml.safe_load((folder / "run/run.yaml").read_text())
    assert saved["plugins"] == ["strided_depth"]
    assert saved["model"]["strided_depth"]["stride"] == 4
    (refused,) = run_ranks(of_somebody_else, 1, folder)
    assert "plugins=strided_depth: is code that a checkpoint names" in refused


def parity(folder: Path) -> list[Report]:
    os.chdir(folder)
    subject = RecipeSubject(load_config("strided.yaml", [TEXT]), rows=8)
    mesh = {"tensor": 2, "sequence_parallel": True}
    return check_on_ranks(subject, [mesh], Settings(steps=1))


def test_its_parity_is_checked(folder: Path) -> None:
    (report,) = run_ranks(parity, 2, folder)[0]
    assert report.ok, report.table()
    assert any(row.name == "layers.1.router.weight" for row in report.rows)


def refusal(folder: Path, override: str) -> str:
    os.chdir(folder)
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        pytest.raises(SystemExit, match="2"),
        exit_on_bad_input(),
    ):
        load_config("strided.yaml", [override])
    return said.getvalue()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("plugins=[nowhere]", "plugins=nowhere: cannot be imported: No module named 'nowhere'"),
        ("plugins=[]", "model.strided_depth: unknown key"),
        ("model.strided_depth.stride=0", "model.strided_depth.stride=0: must be at least 1"),
    ],
)
def test_a_wrong_one_is_one_line(folder: Path, override: str, line: str) -> None:
    (said,) = run_ranks(refusal, 1, folder, override)
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1
