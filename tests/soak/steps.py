"""One run of many tiny steps: what its ranks hold at 1,000 steps they hold at 20,000."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from tests.distributed.runs import tiny_config, write_text
from tests.soak.interruptions import Leg

AT = (200, 500, 1_000, 2_000, 3_000, 4_000, 5_000, 10_000, 15_000, 20_000)


def measure_steps(folder: Path, *, steps: int = 20_000) -> list[dict[str, Any]]:
    """Resident memory (MiB), open files and threads of each rank, and sizes of the logs (bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder)
    output = folder / "steps"
    tree = tiny_config(
        folder,
        output=str(output),
        train={"steps": steps, "log_every": 50, "evaluate_every": 1000},
        checkpoint={"every": 500, "keep": 2, "resume": "never"},
        monitor={"every": 1, "tensorboard": True},
        deepspeed={"zero_optimization": {"stage": 1}},
    )
    tree["model"] |= {"dim": 16, "num_layers": 2, "ffn_dim": 16, "num_heads": 2, "num_kv_heads": 1}
    tree["train"]["batch_size"] = 2
    recipe = folder / "steps.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    leg, rows, begun = Leg(recipe), [], time.monotonic()
    try:
        for step in [at for at in AT if at <= steps]:
            # The last figures are taken while the run still is there.
            seen = min(step, steps - 50)
            # The whole log is read each time: seldom, lest that be what is measured.
            leg.wait_until(
                f"step {step}",
                lambda seen=seen: leg.steps()[-1:] >= [seen],
                seconds=3600,
                every=2,
            )
            rows.append(_row(leg, output, seen, time.monotonic() - begun))
            print(json.dumps(rows[-1]), flush=True)
        if leg.process.wait(timeout=600):
            raise SystemExit(f"error: {leg.said[-600:]}")
    finally:
        leg.close()
    return rows


def _row(leg: Leg, output: Path, step: int, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "seconds": round(seconds)}
    for name in ("rank 0", "rank 1", "start"):
        process = leg.victim(name)
        row[name] = {
            "MiB": round(process.memory_info().rss / 2**20, 1),
            "files": process.num_fds(),
            "threads": process.num_threads(),
        }
    row["metrics.jsonl"] = (output / "metrics.jsonl").stat().st_size
    row["tensorboard"] = sum(
        path.stat().st_size for path in (output / "tensorboard").rglob("events*")
    )
    return row
