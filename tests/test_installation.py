"""Installing brings `import adaptive`, programs and recipes, and overwrites no other package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from launch.run.config import load_config
from launch.run.errors import BadInput

ROOT = Path(__file__).parent.parent
BUILT = ["adaptive", "parallel", "launch", "recipes", "tests", "docs", "benchmarks"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]


def run(
    *command: str | Path, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    # Not where the sources are: building leaves build/ and *.egg-info there.
    source = tmp_path_factory.mktemp("source")
    for name in BUILT:
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    calls = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    done = run(sys.executable, "-c", calls, cwd=source)
    assert done.returncode == 0, done.stderr[-2000:]
    return source / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index"]
    done = run(*pip, "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    return target


def test_refuses_to_overwrite_another_package(tmp_path: Path) -> None:
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "RECORD").write_text("launch/__init__.py,,\nother-1.0.dist-info/METADATA,,\n")
    done = run(sys.executable, "setup.py", "--quiet", "--name", path=tmp_path)
    assert done.returncode == 1
    assert "launch: already installed by other; adaptive-transformers brings" in done.stderr


def test_installs_where_the_names_are_free() -> None:
    done = run(sys.executable, "setup.py", "--quiet", "--name")
    assert (done.returncode, done.stdout.split()[-1]) == (0, "adaptive-transformers"), done.stderr


def test_distributions_hold_what_runs_and_no_strays(built: Path) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes == {
        Path(n).name for n in names if n.startswith("launch/recipes/") and "yaml" in n
    }
    assert {"launch/recipes/deepspeed/zero3_bf16.json", "adaptive/py.typed"} <= names
    assert {"parallel/py.typed", "launch/py.typed"} <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"adaptive", "parallel", "launch"}
    with tarfile.open(archive) as opened:
        sources = {name.partition("/")[2] for name in opened.getnames()}
    assert {"recipes/mod_lm.sh", "launch/run/console.py", "LICENSE", "CHANGELOG.md"} <= sources
    tops = {name.split("/")[0] for name in sources if name}
    known = {"adaptive", "parallel", "launch", "recipes", "setup.cfg", "PKG-INFO", *FILES}
    assert tops - {"adaptive_transformers.egg-info"} == known


def test_the_installed_command_trains_a_recipe_by_its_name(installed: Path, tmp_path: Path) -> None:
    adaptive = installed / "bin" / "adaptive"
    listed = run(adaptive, "--help", cwd=tmp_path, path=installed)
    assert listed.returncode == 0, listed.stderr
    for program in ("train", "generate", "doctor", "convert"):
        assert f"\n  {program} " in listed.stdout
    words = ["train", "--config", "mod_lm", "--deepspeed-config", "zero3_bf16", "--dry-run"]
    planned = run(adaptive, *words, cwd=tmp_path, path=installed)
    assert planned.returncode == 0, planned.stderr
    # A slow machine is told what is being done meanwhile.
    command, plan = [line for line in planned.stdout.splitlines() if not line.endswith(" …")]
    assert f"{installed}/launch/train.py --config {installed}/launch/recipes/mod_lm.yaml" in command
    assert "900 steps" in plan


def test_an_unknown_program_is_one_line(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "launch.run.console", "trian", cwd=tmp_path, path=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: trian: must be one of train, budget_curve, compare")


def test_a_path_wins_over_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("mod_lm").train.steps == 900
    (tmp_path / "mod_lm").write_text("train: {steps: 7}\n")
    config = load_config("mod_lm")
    assert (config.train.steps, config.output) == (7, "runs/mod_lm")
    with pytest.raises(BadInput, match="mod_ml: no such file, and no recipe; there are acm_lm, "):
        load_config("mod_ml")
