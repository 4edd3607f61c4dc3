"""A blend of three sources whose run is killed: the rows and the losses of an undisturbed one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from adaptive.observe.metric_log import read_metrics
from launch.run.config import from_mapping
from launch.run.training import run
from launch.run.trust import trust
from tests.distributed.runs import tiny_config
from tests.distributed.started import Started
from tests.ranks import run_ranks

STEPS, BATCH, STOP = 25, 40, 10
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}
LETTERS = {"a": "abcdefgh", "b": "ijklmnop", "c": "qrstuvwx"}
"""What a row begins with tells which source it is of."""


def run_tree(tree: dict[str, Any]) -> None:
    trust([tree["task"]])
    run(from_mapping(tree))


def losses(output: Path) -> list[tuple[int, float]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [(line["step"], line["loss/train"]) for line in lines if "loss/train" in line]


def rows(output: Path) -> list[tuple[int, str, str]]:
    """(row, its source, a sum of it) of each row of the run that ranks have made."""
    sources = {letter: name for name, letters in LETTERS.items() for letter in letters}
    lines = [line.split() for file in output.glob("rows/*.txt") for line in file.open()]
    made = [(int(row), sources[letter], total) for row, letter, total in lines]
    return [one for one in made if one[0] < STEPS * BATCH]


def test_three_sources_keep_their_shares_when_the_run_is_killed(tmp_path: Path) -> None:
    """1,000 rows on two ranks; `kill -9` of everything when it has taken 400 of them."""
    random = np.random.default_rng(0)
    for name, letters in LETTERS.items():
        text = "".join(random.choice(list(letters), 20_000))
        (tmp_path / f"{name}.txt").write_text(text)
    sources = [{"path": str(tmp_path / f"{n}.txt"), "weight": w} for n, w in WEIGHTS.items()]
    tree = tiny_config(
        tmp_path,
        task="tests.distributed.noted:NotedTask",
        data={"path": None, "sources": sources},
        train={"steps": STEPS, "batch_size": BATCH, "log_every": 1},
        checkpoint={"every": 4},
        monitor={"every": 1},
    )
    run_ranks(run_tree, 2, {**tree, "output": str(tmp_path / "whole")}, timeout=120)
    whole = rows(tmp_path / "whole")
    assert sorted(row for row, *_ in whole) == list(range(STEPS * BATCH))

    tree["output"] = str(tmp_path / "killed")
    held = Started(tree, tmp_path, holds=(1, STOP))
    try:
        held.wait_for(f"step {STOP}/{STEPS}")
    finally:
        held.close()
    run_ranks(run_tree, 2, tree, timeout=120)

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    noted = rows(tmp_path / "killed")
    assert set(noted) == set(whole)
    # From the checkpoint of step 8 on, what had been taken is taken again; nothing before.
    times = Counter(row for row, *_ in noted)
    assert all(times[row] == 1 for row in range(8 * BATCH))
    assert all(times[row] == 2 for row in range(8 * BATCH, STOP * BATCH))
    counts = Counter[str]()
    for row, source, _ in sorted(set(noted)):
        counts[source] += 1
        for name, weight in WEIGHTS.items():
            assert abs(counts[name] - weight * (row + 1)) < 1, f"row {row}"
    assert counts == {"a": 700, "b": 200, "c": 100}
