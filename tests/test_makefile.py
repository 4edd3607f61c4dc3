"""`make train` gives a recipe every key of its command line, as it was written."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def keys(folder: Path, *words: str) -> list[str]:
    """What the recipe's Python is called with behind --config FILE."""
    python = folder / "python"
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "--silent", "train", f"PYTHON={python}", *words],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[4:]


@pytest.mark.parametrize(
    "words",
    [
        ["output=runs/other", "task=diffusion", "phases=[]"],
        ["data.path=my corpus/*.txt", "model.mixture_of_depths.schedule=[1, 3]"],
        ["phases[0].train.steps=5", "data.path=it's $HOME\\", "deepspeed.bf16={enabled: true}"],
        # The order matters: the second makes the section that the first removed.
        ["model.mixture_of_depths=null", "model.mixture_of_depths.capacity=0.5"],
        ["stpes=3", "output="],
    ],
)
def test_make_passes_every_key_on_as_it_was_written(words: list[str], tmp_path: Path) -> None:
    assert keys(tmp_path, *words) == words


def test_make_keeps_its_own_variables(tmp_path: Path) -> None:
    own = ["RECIPE=moe_lm", "VENV=there", "TESTS=tests/launch", "OMP_NUM_THREADS=1"]
    assert keys(tmp_path, *own, "train.steps=3") == ["train.steps=3"]
