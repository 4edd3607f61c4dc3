"""A disk that is full at some moment of a run: one line, and the run goes on when there is room."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import yaml

from tests.soak.interruptions import Leg, Lost, check_reached, configuration, difference
from tests.soak.record import LOST, SURVIVED, Record, Try


def fill(number: int, *, folder: Path, record: Record, seed: int) -> None:
    """One run on a file system of a random size, which is made larger when it was full."""
    chance = random.Random(f"{seed} disk {number}")
    kilobytes, begun = chance.randint(150, 1800), time.monotonic()
    name = f"disk-{seed}-{number}"
    tree, at = configuration(folder, name), folder / name
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    at.mkdir(exist_ok=True)
    _mount(at, f"size={kilobytes}k")
    try:
        said, verdict = _filled(recipe, at), SURVIVED
        _mount(at, "remount,size=64m")
        leg = Leg(recipe)
        try:
            code = leg.process.wait(timeout=600)
        finally:
            leg.close()
        problem = difference(at, folder / "undisturbed") if code == 0 else leg.said[-300:]
        if problem is not None:
            said, verdict = f"{said}; at last {problem}", LOST
    except Lost as problem:
        said, verdict = str(problem), LOST
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=False)
    seconds = round(time.monotonic() - begun, 1)
    record.add(Try("disk", "full", number, verdict, f"{kilobytes} kB: {said}", seconds))


def _filled(recipe: Path, output: Path) -> str:
    leg = Leg(recipe)
    try:
        code = leg.process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        raise Lost("did not end") from None
    finally:
        leg.close()
    lines = [line for line in leg.said.splitlines() if line.startswith("error: ")]
    if code == 0:
        raise Lost("the disk was never full")
    if len(lines) != 1 or "Traceback" in leg.said:
        raise Lost(f"exit code {code}, {len(lines)} lines: {leg.said[-600:]}")
    if "space" not in lines[0]:
        raise Lost(f"does not say why: {lines[0]}")
    found = check_reached(output, 0)
    if not isinstance(found, int):
        raise Lost(f"{found}; {lines[0]}")
    return lines[0][:160]


def _mount(at: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)], check=True)
