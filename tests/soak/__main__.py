"""Try to lose something: `make soak`, or `python -m tests.soak [PART …]`.

    python -m tests.soak kills --tries 100 --jobs 2
    python -m tests.soak damage steps --folder /tmp/soak

Parts: kills, signals, disk (root: it mounts small file systems), damage, configurations, steps; all
by default. Tries are a function of --seed and their number. What was tried stands in
FOLDER/tries.jsonl, and the same command goes on behind it; --results writes the table. Exit code 1
when something was lost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.soak import interruptions
from tests.soak.damage import damage_one
from tests.soak.disk import fill
from tests.soak.record import LOST, SURVIVED, Record, Try
from tests.soak.steps import measure_steps

PARTS = {
    "kills": 100,
    "signals": 16,
    "disk": 10,
    "damage": 200,
    "configurations": 500,
    "steps": 20_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", help="by default all")
    parser.add_argument("--tries", type=int, help=f"of each part; default {PARTS}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of two ranks each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--results", type=Path, help="write RESULTS.json and print the table")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part}: must be one of {', '.join(PARTS)}")
    record = Record(options.folder)
    parts = options.parts or list(PARTS)
    if {*parts} - {"steps", "configurations"}:
        interruptions.prepare(options.folder)
    for part in parts:
        tries = options.tries or PARTS[part]
        given = {"folder": options.folder, "record": record, "seed": options.seed}
        if part in ("kills", "signals"):
            _interrupt(part, tries, options, record)
        elif part == "disk":
            for number in range(record.count("disk"), tries):
                fill(number, **given)
        elif part == "damage":
            for number in range(record.count("checkpoints"), tries):
                damage_one(number, **given)
        elif part == "configurations" and not record.count(part):
            _configurations(tries, **given)
        elif part == "steps":
            path = options.folder / "steps.json"
            path.write_text(json.dumps(measure_steps(options.folder, steps=tries), indent=1))
    print(record.table())
    if options.results is not None:
        steps = options.folder / "steps.json"
        found = {
            "seed": options.seed,
            "tries": [asdict(one) for one in record.tries],
            "steps": json.loads(steps.read_text()) if steps.is_file() else [],
        }
        options.results.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(any(one.verdict == LOST for one in record.tries))


def _configurations(tries: int, *, folder: Path, record: Record, seed: int) -> None:
    from tests.launch.configuration_fuzz import fuzz

    with tempfile.TemporaryDirectory(dir=folder) as at:
        figures = fuzz(Path(at), seed=seed, count=tries)
    said = f"slowest answer {figures.slowest:.1f} s"
    kinds = ["refused in one line"] * figures.refused
    kinds += ["accepted, with a reason"] * figures.accepted
    found = [(kind, SURVIVED, said) for kind in kinds]
    found += [("neither", LOST, fault) for fault in figures.faults]
    for number, one in enumerate(found):
        record.add(Try("configurations", one[0], number, one[1], one[2], figures.slowest))


def _interrupt(part: str, tries: int, options: argparse.Namespace, record: Record) -> None:
    """Series of interruptions that are not in the record yet."""
    kinds = interruptions.KILLS if part == "kills" else interruptions.SIGNALS
    series = []
    for number in range((tries + interruptions.TRIES - 1) // interruptions.TRIES):
        first = number * interruptions.TRIES
        count = min(interruptions.TRIES, tries - first)
        if not record.has(f"{part}, at last", number):
            series.append((number, [kinds[(first + n) % len(kinds)] for n in range(count)]))
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(
            lambda one: interruptions.series(
                *one, folder=options.folder, part=part, record=record, seed=options.seed
            ),
            series,
        ):
            pass


if __name__ == "__main__":
    main()
