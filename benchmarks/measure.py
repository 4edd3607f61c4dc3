"""How benchmarks measure: interleaved rounds in one process, medians, JSON with the machine's name.

    times = interleave({"dense": run_dense, "routed": run_routed}, rounds=15)
    save("routed_block", {"seconds": medians(times), …})

Ratios come from interleaved rounds because a machine's speed drifts: what ran first would win.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces every profile

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile

RESULTS = Path(__file__).parent / "results"
# A script's own folder comes first on the path, and ours has a parallel.py beside the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def interleave(
    cases: dict[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every case in every round; each round runs every case once, in turn from either
    end: what runs after a case that fills the caches differs from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name, run in _order(cases, number):
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleave_on_ranks(
    cases: dict[str, Callable[[], Any]], rounds: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """`interleave` on every rank of a process group: a case lasts as long as its slowest rank."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name, run in _order(cases, number):
            dist.barrier()
            start = time.perf_counter()
            run()
            taken = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number >= warmup:
                seconds[name].append(float(taken))
    return seconds


def _order(cases: dict[str, Callable[[], Any]], number: int) -> list[tuple[str, Callable[[], Any]]]:
    return list(cases.items()) if number % 2 else list(cases.items())[::-1]


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(seconds: dict[str, list[float]], case: str, baseline: str) -> float:
    """Median over rounds of `case / baseline`, both of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[case], seconds[baseline], strict=True))


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that one run holds at once beyond what was there before, every allocation counted.

    That is activations and gradients; parameters and the input exist already. A run that begins by
    freeing the gradients of the one before holds as much as a first one. CPU only.
    """
    with profile(profile_memory=True, use_kineto=True) as profiler:
        run()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = least = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        least = min(least, held)
        peak = max(peak, held - least)
    return peak


def machine() -> dict[str, Any]:
    """What a figure needs beside it to mean anything."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {
        "machine": name,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # above the cores, seconds are of a loaded machine
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>.json and say where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), **result}, indent=1) + "\n")
    print(f"results: {path}")
    return path


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
