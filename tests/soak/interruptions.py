"""Runs on two ranks that are killed, stopped and asked to end, again and again, to their end.

A series is one run in one folder: it is started, something happens to it at a random step, and it
is started again, until it has taken all its steps. Each start but the last is a try. Then its log
must be, line for line and digit for digit, that of a run to which nothing happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.checkpoint.files import read_state
from launch.run.children import SCRIPT
from parallel.checkpoint import newest_intact
from tests.distributed.runs import tiny_config, write_text
from tests.soak.record import LOST, SURVIVED, Record, Try

ROOT = Path(__file__).parents[2]
# More steps than a series gets through: a run that finishes cannot be interrupted.
STEPS, EVERY = 160, 4
# Of a series: so many are interrupted, then one goes to the end.
TRIES = 8
VICTIMS = ("rank 0", "rank 1", "launcher", "launcher's starter", "start")
# What may follow: exit codes, and words that the program says.
KILLS = [f"kill -9 {victim}" for victim in VICTIMS] + [
    f"kill -9 {victim} while a checkpoint is written" for victim in VICTIMS[:3]
]
SIGNALS = ["SIGTERM", "SIGTERM while it starts", "SIGSTOP a rank", "SIGSTOP a rank, then SIGTERM"]


ENDED = ("as asked", "stopped before the first step", "finished in")


class Lost(AssertionError):  # noqa: N818 -- named for what it says
    """Something that was promised did not hold."""


def configuration(folder: Path, name: str) -> dict[str, Any]:
    return tiny_config(
        folder,
        output=str(folder / name),
        train={"steps": STEPS, "log_every": 1, "evaluate_every": 24, "hang_seconds": 10.0},
        checkpoint={"every": EVERY, "keep": 3},
        monitor={"every": 1, "tensorboard": True},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


class Leg:
    """One start of a run."""

    def __init__(self, recipe: Path) -> None:
        self.output = Path(yaml.safe_load(recipe.read_text())["output"])
        self.log = open(recipe.with_suffix(".log"), "a+b")  # noqa: SIM115
        self._from = self.log.seek(0, os.SEEK_END)
        command = [sys.executable, "-m", "launch.start", "--ranks", "2", "--config", str(recipe)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment[SCRIPT] = str(os.getpid())  # it stops when this program is ended
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, cwd=ROOT
        )

    @property
    def said(self) -> str:
        return Path(self.log.name).read_bytes()[self._from :].decode(errors="replace")

    def steps(self) -> list[int]:
        words = [line.split() for line in self.said.splitlines() if line.startswith("step ")]
        return [int(word[1].split("/")[0]) for word in words if "/" in word[1]]

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def victim(self, name: str) -> psutil.Process:
        if name == "start":
            return psutil.Process(self.process.pid)
        wanted = {
            "rank 0": "--local_rank=0",
            "rank 1": "--local_rank=1",
            "launcher": "deepspeed.launcher.launch",
            "launcher's starter": "deepspeed.launcher.runner",
        }[name]
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if wanted in words and words[0] != "sh":
                    return process
        raise Lost(f"{name}: is not there")

    def wait_until(
        self, what: str, ready: Any, *, seconds: float = 300, every: float = 0.005
    ) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise Lost(
                    f"ended with {self.process.returncode} before {what}: {self.said[-400:]}"
                )
            if time.monotonic() > deadline:
                raise Lost(f"never came to {what}")
            time.sleep(every)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.log.close()


def series(
    number: int, kinds: list[str], *, folder: Path, part: str, record: Record, seed: int
) -> None:
    """Interrupt one run once for each kind, then let it end; goes on where the record ends."""
    name = f"{part}-{seed}-{number}"
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(configuration(folder, name)))
    found = check_reached(folder / name, 0)
    reached = found if isinstance(found, int) else 0
    for try_number, kind in enumerate(kinds, start=number * TRIES):
        if record.has(part, try_number):
            continue
        leg, begun, verdict = Leg(recipe), time.monotonic(), SURVIVED
        try:
            said = interrupt(leg, kind, random.Random(f"{seed} {part} {try_number}"), reached)
        except (Lost, psutil.Error) as problem:
            verdict, said = LOST, f"{type(problem).__name__}: {problem}"
        finally:
            leg.close()
        found = check_reached(leg.output, reached)
        if isinstance(found, int):
            reached = found
        else:
            verdict, said = LOST, f"{said}; {found}"
        seconds = round(time.monotonic() - begun, 1)
        record.add(Try(part, kind, try_number, verdict, said, seconds))
    begun = time.monotonic()
    leg = Leg(recipe)
    try:
        code = leg.process.wait(timeout=900)
        problem = f"the last leg ended with {code}: {leg.said[-300:]}" if code else None
    finally:
        leg.close()
    problem = problem or difference(leg.output, folder / "undisturbed")
    record.add(
        Try(
            f"{part}, at last",
            "the whole log and TensorBoard's curve as if undisturbed",
            number,
            SURVIVED if problem is None else LOST,
            problem or f"{STEPS} steps, each once, {len(kinds)} interruptions",
            round(time.monotonic() - begun, 1),
        )
    )


def interrupt(leg: Leg, kind: str, chance: random.Random, reached: int) -> str:
    """Do it, and see that the run ends as is promised."""
    starts = "starts" in kind
    if starts:
        time.sleep(chance.uniform(0.5, 20.0))
    else:
        step = reached + chance.randint(1, 6)
        leg.wait_until(f"step {step}", lambda: leg.steps()[-1:] >= [step])
    if "written" in kind:
        root = leg.output / "checkpoints"
        leg.wait_until("a checkpoint", lambda: any(root.glob(".writing-*")))
        time.sleep(chance.uniform(0.0, 0.06))
    everyone, begun = leg.processes(), time.monotonic()
    if kind.startswith("kill"):
        leg.victim(kind.removeprefix("kill -9 ").partition(" while")[0]).kill()
    if "SIGSTOP" in kind:
        leg.victim(chance.choice(VICTIMS[:2])).suspend()
        time.sleep(chance.uniform(0.0, 1.0))
    if "SIGTERM" in kind:
        leg.process.send_signal(signal.SIGTERM)
    try:
        code = leg.process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        raise Lost("did not end") from None
    seconds = time.monotonic() - begun
    _, alive = psutil.wait_procs(everyone, timeout=10)
    if alive:
        raise Lost(f"left behind: {alive}")
    said = leg.said
    last = said.strip().splitlines()[-1][:160] if said.strip() else ""
    if "SIGTERM" in kind:
        if seconds > 30:
            raise Lost(f"took {seconds:.1f} s to end")
        if code == 0 and not any(words in said for words in ENDED):
            raise Lost(f"exit code 0: {last}")
        if code != 0 and "SIGSTOP" not in kind:
            raise Lost(f"exit code {code}: {last}")
    elif code == 0:
        raise Lost(f"exit code 0: {last}")
    elif kind == "SIGSTOP a rank" and "is stopped (SIGSTOP)" not in said:
        raise Lost(f"the rank was not named: {last}")
    elif "start" not in kind.split() and "\nerror: " not in said:
        raise Lost(f"exit code {code} without a word: {last}")
    return f"exit code {code} after {seconds:.1f} s"


def check_reached(output: Path, before: int) -> int | str:
    """The step of the newest checkpoint; a line when one was lost, or steps of the log were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_intact(output / "checkpoints")
    step = 0 if newest is None else read_state(newest).step
    if step < before:
        return f"the newest checkpoint is of step {step}, it was of {before}"
    there = [one for one in trained_steps(output) if one <= step]
    if there != list(range(1, step + 1)):
        missing = sorted(set(range(1, step + 1)) - set(there))
        twice = len(there) - len(set(there))
        return f"of {step} steps the log misses {missing}, and has {twice} twice"
    return step


def trained_steps(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [line["step"] for line in found if "loss/train" in line]


def difference(output: Path, undisturbed: Path) -> str | None:
    """How the log of a run differs from that of one that nothing happened to; None: not at all."""
    ours, theirs = (_lines(path / "metrics.jsonl") for path in (output, undisturbed))
    if len(ours) != len(theirs):
        return f"the log has {len(ours)} lines, not {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            return f"the log of step {one['step']} differs"
    return _events_differ(output, undisturbed)


def _lines(path: Path) -> list[dict[str, Any]]:
    """All but what a clock has measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not re.search("second|memory|waiting", k)}
        for line in lines
    ]


def _events_differ(output: Path, undisturbed: Path) -> str | None:
    """Whether TensorBoard shows another curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = []
    for path in (output, undisturbed):
        events = EventAccumulator(
            str(path / "tensorboard" / path.name), size_guidance={"scalars": 0}
        )
        events.Reload()
        curves.append([(point.step, point.value) for point in events.Scalars("loss/train")])
    return None if curves[0] == curves[1] else f"TensorBoard shows {len(curves[0])} other points"


def prepare(folder: Path) -> None:
    """Train the run that nothing happens to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.py").is_file():
        write_text(folder)
    output = folder / "undisturbed"
    if trained_steps(output)[-1:] == [STEPS]:
        return
    recipe = folder / "undisturbed.yaml"
    recipe.write_text(yaml.safe_dump(configuration(folder, "undisturbed")))
    leg = Leg(recipe)
    try:
        if leg.process.wait(timeout=600):
            raise SystemExit(f"error: the undisturbed run failed\n{leg.said}")
    finally:
        leg.close()
