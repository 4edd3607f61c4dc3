"""Whether two commits train alike: the first steps of every recipe in both, digit by digit.

    python -m tests.compare_commits BASE NEW
    python -m tests.compare_commits BASE --record base.json    # and later, with NEW changed,
    python -m tests.compare_commits base.json NEW

BASE and NEW are working trees (`git worktree add ../base COMMIT`) or what --record wrote. Each
recipe of BASE trains in both, by this interpreter and on 2 ranks, started as its tree starts it:
by recipes/NAME.sh, earlier stages and conversions included; every arm of a comparison by
`launch.start`. --small gives all of them few and short rows, for a busy machine. The table says
whether all that metrics.jsonl holds but speeds is equal to the last digit, else the first step
that is not; the exit code is 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

STEPS = 20
SECONDS = 1200
# What a recipe begins after its first steps begins within them.
SOONER = {"duo_lm": ["model.sized_feed_forward.random_steps=10"]}
SMALL = {
    "language_model": ["data.seq_len=64", "train.batch_size=4"],
    "diffusion": ["train.batch_size=16"],
    "image_classification": ["train.batch_size=16"],
}

# A line of metrics.jsonl without its speeds.
Line = dict[str, Any]
# {"mod_lm": lines}; of a recipe with stages {"acm_lm dense": …, "acm_lm tuned": …}.
Figures = dict[str, list[Line]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="working tree, or a record")
    parser.add_argument("new", type=Path, nargs="?", help="working tree, or a record")
    parser.add_argument("--record", type=Path, metavar="JSON", help="write the last one's figures")
    parser.add_argument("--small", action="store_true", help="few and short rows")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="names of recipes")
    options = parser.parse_args()
    last = base = figures(options.base, options.only, small=options.small)
    if options.new is not None:
        recipes = options.only or sorted({case.split()[0] for case in base})
        last = figures(options.new, recipes, small=options.small)
    if options.record is not None:
        options.record.write_text(json.dumps(last) + "\n", encoding="utf-8")
    if options.new is not None:
        rows = [(case, verdict(base[case], last.get(case))) for case in base]
        print("\n".join(["| recipe | losses |", "|---|---|", *(f"| {c} | {v} |" for c, v in rows)]))
        raise SystemExit(any(not said.startswith("equal") for _, said in rows))


def figures(place: Path, only: list[str] | None, *, small: bool) -> Figures:
    """What each recipe of a tree logs in its first steps; read, where `place` is a record."""
    if place.is_file():
        record = json.loads(place.read_text(encoding="utf-8"))
        return {c: lines for c, lines in record.items() if only is None or c.split()[0] in only}
    found: Figures = {}
    for recipe in sorted((place.resolve() / "recipes").glob("*.yaml")):
        if only is not None and recipe.stem not in only:
            continue
        for case, command in commands(recipe, small=small):
            with tempfile.TemporaryDirectory() as output:
                problem = run(place, [*command, f"output={output}/run"])
                for log in sorted(Path(output).rglob("metrics.jsonl")):
                    stage = "" if log.parent.name == "run" else f" {log.parent.name}"
                    found[case + stage] = read_log(log)
            if problem is not None:
                found[case] = []
            print(f"{place}: {case}: {problem or 'trained'}", file=sys.stderr, flush=True)
    return found


def commands(recipe: Path, *, small: bool) -> Iterator[tuple[str, list[str]]]:
    """(case, command) of a recipe; one for each arm of a comparison."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    start = [sys.executable, "-m", "launch.start", "--config"]
    if "arms" in content:
        file = recipe.with_name(content["recipe"])
        of_recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        for arm, changes in content["arms"].items():
            words = [*content["common"], *changes]
            if any(word.startswith("train.growth=") for word in words):
                of_recipe["train"].pop("growth", None)
            words += shortened(of_recipe, small=small)
            yield f"{recipe.stem} {arm}", [*start, str(file), *words]
        return
    words = [*shortened(content, small=small), *SOONER.get(recipe.stem, [])]
    if recipe.stem.startswith("compare_"):  # the script of its name trains variants of it
        yield recipe.stem, [*start, str(recipe), *words]
    else:
        yield recipe.stem, ["bash", str(recipe.with_suffix(".sh")), *words]


def shortened(content: dict[str, Any], *, small: bool, steps: int = STEPS) -> list[str]:
    """Overrides that end a recipe after its first steps; phases and growths share them."""
    words = ["monitor.every=1", "monitor.tensorboard=false", "checkpoint.every=0"]
    words += SMALL[content["task"]] if small else []
    phases = content.get("phases", [])
    for number, phase in enumerate(phases):
        words.append(f"phases[{number}].train.steps={steps // len(phases)}")
        if small and "batch_size" in phase["train"]:
            words.append(f"phases[{number}].train.batch_size=16")
    if not phases:
        words.append(f"train.steps={steps}")
    growth = content["train"].get("growth", [])
    if growth:
        share = steps // (len(growth) + 1)
        sooner = [{**stage, "step": share * n} for n, stage in enumerate(growth, start=1)]
        words.append(f"train.growth={json.dumps(sooner)}")
    return words


def run(tree: Path, command: list[str]) -> str | None:
    """Run a command in a tree; what it said last, where it failed."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tree.resolve()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment.pop("OUTPUT", None)
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode == 0:
        return None
    said = done.stdout.strip().splitlines() or [""]
    return f"exit code {done.returncode}: {said[-1]}"


def read_log(log: Path) -> list[Line]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    clocked = ("throughput/", "memory/", "data/waiting")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in lines]


def _by_step_and_key(lines: list[Line]) -> dict[tuple[int, str], list[Any]]:
    """All values, in order: a line that is there twice is no line that is there once."""
    found: dict[tuple[int, str], list[Any]] = {}
    for line in lines:
        for key in line.keys() - {"step"}:
            found.setdefault((line["step"], key), []).append(line[key])
    return found


def verdict(base: list[Line], new: list[Line] | None) -> str:
    """`equal …`, or the first step that differs and by what."""
    if not base or not new:
        return f"not trained in {'the base' if not base else 'the new tree'}"
    old, now = _by_step_and_key(base), _by_step_and_key(new)
    for (step, key), value in old.items():
        if (step, key) in now and repr(value) != repr(now[step, key]):
            return f"step {step} differs: {key} {value!r}, now {now[step, key]!r}"
    steps = {step for step, _ in old}
    if missing := steps - {step for step, _ in now}:
        return f"step {min(missing)} is not there"
    lost = sorted({key for _, key in old.keys() - now})
    said = f"equal: {len(steps)} steps, {len(old.keys() & now)} figures"
    return said + (f"; no longer logged: {', '.join(lost)}" if lost else "")


if __name__ == "__main__":
    main()
