"""Whatever starts other processes ends them, however it is ended itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed.runs import tiny_config, write_text

ROOT = Path(__file__).parents[2]
# Starts a process of its own, and goes on for a minute, deaf to SIGTERM.
CHILD = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(f"started {os.getpid()} {grandchild.pid}", flush=True)
time.sleep(60)
"""
RANKS = """
import os, signal, time
def sleep(number):
    print(f"started {os.getpid()}", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)
if __name__ == "__main__":
    from launch.run.errors import program
    from parallel.ranks import on_ranks
    program(lambda _: on_ranks(sleep, 1, signal.NUMBER))()
"""
KERNELS = """
from launch.planning import kernels
kernels.CHECKS = ("one",)
kernels.sys.executable = {child!r}
kernels._checks()
"""
COMPARE = """
import sys
from launch import compare
from launch.comparison import runs
from launch.run.children import Children
whole = Children.__init__
Children.__init__ = lambda self: whole(self, seconds=2.0)
runs.TRAIN = {child!r}
compare.main([{comparison!r}, "--jobs", "1"])
"""


@contextmanager
def all_ended(
    command: list[str], *, started: int, log: Path | None = None
) -> Iterator[psutil.Popen]:
    """A program that is to end here, and with it all that says `started PID …`."""
    process = psutil.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    pids: list[int] = []
    try:
        if log is None:
            for line in process.stdout:
                if line.startswith("started"):
                    pids += map(int, line.split()[1:])
                if len(pids) == started:
                    break
        else:
            while len(pids) < started:
                assert process.poll() is None
                with contextlib.suppress(OSError, ValueError):
                    lines = [line for line in log.read_text().splitlines() if "started" in line]
                    pids = [int(word) for line in lines for word in line.split()[1:]]
        assert len(pids) == started
        everyone = [psutil.Process(pid) for pid in pids]
        yield process
        process.wait(timeout=30)
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert not alive
    finally:
        for pid in [process.pid, *pids]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


HOW = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])


@HOW
def test_a_comparison_that_is_ended_ends_its_runs(number: int, tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    (tmp_path / "child.py").write_text(CHILD)
    tree = {
        "title": "Two",
        "recipe": "recipe.yaml",
        "operations": 2e8,
        "seeds": [0, 1],
        "arms": {"routed": []},
        "output": str(tmp_path / "runs"),
        "results": str(tmp_path / "results"),
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(tree))
    child, comparison = str(tmp_path / "child.py"), str(tmp_path / "comparison.yaml")
    program = COMPARE.format(child=child, comparison=comparison)
    log = tmp_path / "runs" / "routed-0" / "log.txt"
    with all_ended([sys.executable, "-c", program], started=2, log=log) as process:
        process.send_signal(number)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    # The second run was not begun.
    assert not (tmp_path / "runs" / "routed-1").exists()


@pytest.mark.parametrize(
    ("number", "state"),
    [(signal.SIGKILL, "SIGCONT"), (signal.SIGTERM, "SIGSTOP")],
    ids=["killed", "terminated, its rank stopped"],
)
def test_ranks_of_a_function_end_with_the_program(number: int, state: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(RANKS.replace("NUMBER", state))
    with all_ended([sys.executable, str(program)], started=1) as process:
        process.send_signal(number)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)


def test_checks_of_kernels_end_with_the_doctor(tmp_path: Path) -> None:
    child, log = tmp_path / "child", tmp_path / "log"
    (tmp_path / "child.py").write_text(CHILD)
    child.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/child.py > {log}\n")
    child.chmod(0o755)
    program = KERNELS.format(child=str(child))
    with all_ended([sys.executable, "-c", program], started=2, log=log) as process:
        process.kill()


def test_a_program_ends_with_the_script_that_started_it() -> None:
    program = (
        "import os, time; from launch.run.children import stop_with_script;"
        "stop_with_script(); print('started', os.getpid(), flush=True); time.sleep(60)"
    )
    script = f'export LAUNCHED_BY=$$; "{sys.executable}" -c "{program}"; echo more'
    with all_ended(["bash", "-c", script], started=1) as process:
        process.kill()


@pytest.mark.parametrize("name", ["acm_lm", "compare_routers"])
def test_scripts_of_several_stages_say_who_they_are(name: str) -> None:
    assert "export LAUNCHED_BY=$$" in (ROOT / "recipes" / f"{name}.sh").read_text()
