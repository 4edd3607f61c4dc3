"""A method from outside the repository: what docs/new_method.md builds, in a folder alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "new_method.md"

CHECKS = """
import json
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive import RoutingTape, start_step
from adaptive.blocks.method import methods
from adaptive.flops import executed_flops, nominal_flops, planned_flops
from adaptive.models import Decoder
from launch.planning.plans import plan
from launch.planning.machines import PUBLISHED
from launch.run.config import load_config
from parallel.mesh import Mesh

config = load_config("strided.yaml", ["data.path=text.txt"])
torch.manual_seed(0)
model = Decoder(config.model)
ids = torch.randint(0, 256, (3, 32))
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
    with RoutingTape(model) as tape:
        (model.token_losses(ids, ids).mean() + tape.loss()).backward()
layer = model.layers[0]
layer.dense_steps = 3
strides = [start_step(torch.nn.Sequential(model), step) or layer.stride for step in (2, 3)]
dense = load_config("strided.yaml", ["data.path=text.txt", "model.strided_depth=null"])
machine = PUBLISHED["h100"].machine(mixed=True)
plans = [plan(c, Mesh.single(), machine) for c in (config, dense)]
print(json.dumps({
    "method": methods()[-1].name,
    "counted": mode.get_total_flops(),
    "planned": planned_flops(model, 3, 32, backward=True),
    "executed": float(executed_flops(model, tape.records, 3, 32, backward=True)),
    "nominal": nominal_flops(model, 3, 32, backward=True),
    "records": [(r.name, r.kind, r.tokens, r.executed) for r in tape.records],
    "strides": strides,
    "activations": [p.activations for p in plans],
    "saved": config.resolved()["plugins"],
}))
"""


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


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_method_outside_the_repository_is_counted_recorded_and_planned(folder: Path) -> None:
    done = run(folder, "-c", CHECKS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["method"] == "strided_depth"
    assert found["planned"] == found["executed"] == found["counted"] < found["nominal"]
    routed = [[f"layers.{layer}", "strided_depth", 96, 24] for layer in range(2)]
    assert found["records"] == routed
    assert found["strides"] == [1, 4]
    assert found["activations"][0] < found["activations"][1]
    assert found["saved"] == ["strided_depth"]


def test_it_trains_by_a_recipe_on_two_ranks_and_is_watched(folder: Path) -> None:
    words = ("-m", "launch.start", "--config", "strided.yaml", "--ranks", "2")
    done = run(folder, *words, "data.path=text.txt", "output=run", "monitor.every=1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    keys = {key for line in lines for key in line}
    assert any(key.startswith("routing/layers.0") for key in keys), sorted(keys)
    assert "validation/loss" in keys
    saved = yaml.safe_load((folder / "run/run.yaml").read_text())
    assert saved["plugins"] == ["strided_depth"]
    assert saved["model"]["strided_depth"]["stride"] == 4
    # Of somebody else's run: a file that names code does not import it.
    code = "from launch.run.trust import trust; trust({}); from launch.run.config import load_saved"
    code += "; from pathlib import Path; load_saved(Path('run'))"
    refused = run(folder, "-c", code.format([]))
    assert "plugins=strided_depth: is code that a checkpoint names" in refused.stderr
    named = run(folder, "-c", code.format(["strided_depth"]))
    assert named.returncode == 0, named.stderr


def test_its_parity_is_checked(folder: Path) -> None:
    words = ("-m", "launch.parity", "--config", "strided.yaml", "data.path=text.txt")
    done = run(
        folder,
        *words,
        "--meshes",
        "tensor=2,sequence_parallel=true",
        "--steps",
        "1",
        "--limit",
        "90",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees with one rank" in done.stdout
    assert "layers.1.router.weight" in done.stdout


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("plugins=[nowhere]", "plugins=nowhere: cannot be imported: No module named 'nowhere'"),
        ("plugins=[]", "model.strided_depth: unknown key"),
        ("model.strided_depth.stride=0", "model.strided_depth.stride=0: must be at least 1"),
    ],
)
def test_a_wrong_one_is_one_line(folder: Path, override: str, line: str) -> None:
    code = f"""
from launch.run.config import load_config
from launch.run.errors import exit_on_bad_input
with exit_on_bad_input():
    load_config("strided.yaml", [{override!r}])
"""
    done = run(folder, "-c", code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
