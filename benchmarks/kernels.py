"""How near are the kernels to what this machine can do? Every op x backend x dtype x size.

    PYTHONPATH=. python benchmarks/kernels.py [--quick] [--seconds 240] [--only OPS] [--out FILE]

For each: milliseconds forward, and forward with backward; their share of the copy bandwidth or of
the dense matmul rate measured here first; peak memory beyond the inputs. Needs torch alone (triton
and other libraries where their backends are asked for; matplotlib for the plot). On a GPU the
results go to benchmarks/results/kernels-<device>.json, row by row: what was measured before an
interruption is kept. Without one, sizes are tiny, nothing is saved unless --out says where, and the
numbers say only that everything runs.

Last, what issue 8 asks for: goal, measured, met or missed; a block routed at 12.5% included.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import Case, every_case
from measure import RESULTS, machine
from step import routed_block

from adaptive.ops.backend import explain

FLUSH_BYTES = 256 << 20  # more than any second-level cache
AHEAD_CYCLES = 3_000_000  # 1.5 ms of an H200, in which Python has launched all of an op


class Clock:
    """Medians of device time with a cold second-level cache; of wall-clock time on a CPU."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.cold = None
        if device.type == "cuda":
            self.cold = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def median(self, run: Callable[[], Any]) -> float:
        warmup, fewest, most = (3, 5, 50) if self.device.type == "cuda" else (1, 1, 50)
        for _ in range(warmup):
            run()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < fewest or (
            len(times) < most and time.perf_counter() - begun < self.seconds
        ):
            times.append(self._once(run))
        return statistics.median(times)

    def _once(self, run: Callable[[], Any]) -> float:
        if self.cold is None:
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        self.cold.zero_()
        # Small ops take longer to launch than to run: let them queue up behind this.
        torch.cuda._sleep(AHEAD_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def ceilings(clock: Clock, *, tiny: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read plus written), FLOPs a second of large products."""
    device = clock.device
    source = torch.randn((1 << 14) if tiny else (1 << 29), device=device)
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / clock.median(partial(target.copy_, source))}
    source, target = source[:0].clone(), target[:0].clone()  # the memory goes back
    size = 128 if tiny else 8192
    for dtype in [torch.float32] if tiny else [torch.bfloat16, torch.float32]:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[f"flops {name_of(dtype)}"] = 2 * size**3 / clock.median(lambda a=a, b=b: a @ b)
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(case: Case, backend: str, clock: Clock, ceiling: dict[str, float]) -> dict[str, Any]:
    """One row of the table, or the reason why there is none."""
    row: dict[str, Any] = {
        "op": case.op, "size": case.size, "dtype": name_of(case.dtype), "backend": backend,
    }  # fmt: skip
    os.environ["ADAPTIVE_BACKEND"] = case.backends[backend]
    torch.manual_seed(0)
    call, inputs = case.make(clock.device)
    example = inputs[0] if inputs else torch.zeros(1, 1, device=clock.device)
    composed = case.op == "expert_feed_forward" and backend == "torch"
    said = explain(case.op, example).get(case.backends[backend], "no such implementation")
    if said != "chosen" and not composed:
        return row | {"skipped": said}
    top = ceiling["bytes" if case.bound == "bytes" else f"flops {name_of(case.dtype)}"]
    with torch.no_grad():
        forward = clock.median(lambda: call(*inputs))
    row |= {"forward_ms": forward * 1e3, "forward_share": case.forward / forward / top}
    if case.backward:
        out = call(*inputs)
        grad = torch.randn_like(out)

        def both() -> None:
            torch.autograd.grad(call(*inputs), inputs, grad)

        del out
        total = clock.median(both)
        share = (case.forward + case.backward) / total / top
        row |= {"total_ms": total * 1e3, "total_share": share}
        if clock.device.type == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    if backend == "triton" and case.required is not None:
        row["required_share"] = case.required
    return row


HEAD = f"{'op':<23}{'backend':<10}{'dtype':<9}{'size':<44}"
HEAD += f"{'fwd ms':>9}{'share':>7}{'f+b ms':>9}{'share':>7}{'peak MiB':>10}"


def line(row: dict[str, Any]) -> str:
    start = f"{row['op']:<23}{row['backend']:<10}{row['dtype']:<9}{row['size']:<44}"
    if "skipped" in row:
        return f"{start}  not run: {row['skipped']}"
    total, share = row.get("total_ms"), row.get("total_share")
    back = f"{total:>9.3f}{share:>7.0%}" if total is not None else " " * 16
    peak = f"{row['peak_mib']:>10.0f}" if "peak_mib" in row else ""
    return f"{start}{row['forward_ms']:>9.3f}{row['forward_share']:>7.0%}{back}{peak}"


# Op -> smallest speed against torch's that issue 8 asks for. Under "torch", the experts'
# feed-forward is its composition: permute, grouped_mm, activation, grouped_mm, unpermute.
AGAINST_TORCH = {"varlen_attention": 0.9, "expert_feed_forward": 1.0}
BLOCK_GOAL = 1.25


def verdicts(rows: list[dict[str, Any]], block: dict[str, float] | None) -> list[str]:
    """What issue 8 asks, what was measured and whether that is enough, a line each."""
    said = []
    ours = [row for row in rows if row["backend"] == "triton"]
    times = {
        (r["op"], r["size"], r["dtype"]): r["forward_ms"]
        for r in rows
        if r["backend"] == "torch" and "forward_ms" in r
    }
    for row in ours:
        where = f"{row['op']} {row['size']} {row['dtype']}"
        if "skipped" in row and row["op"] in {*AGAINST_TORCH, *GOALS}:
            said.append(f"NOT MEASURED {where}: {row['skipped']}")
        if "required_share" in row:
            met, goal = row["forward_share"] >= row["required_share"], row["required_share"]
            share = f"goal {goal:.0%} of the ceiling, measured {row['forward_share']:.0%}"
            said.append(f"{verdict(met)} {where}: {share}")
        theirs = times.get((row["op"], row["size"], row["dtype"]))
        if row["op"] in AGAINST_TORCH and theirs is not None and "forward_ms" in row:
            ratio, goal = theirs / row["forward_ms"], AGAINST_TORCH[row["op"]]
            speed = f"goal {goal:.2f}x torch's speed, measured {ratio:.2f}x"
            said.append(f"{verdict(ratio >= goal)} {where}: {speed}")
    if block is None:
        return [*said, "NOT MEASURED block routed at 12.5%, S 4096"]
    over = block["over_flops"]
    said.append(
        f"{verdict(over <= BLOCK_GOAL)} block routed at 12.5%, S 4096: goal at most {BLOCK_GOAL}x "
        f"its share of FLOPs ({block['flop_ratio']:.3f}), measured {over:.2f}x"
    )
    return said


GOALS = {"pack", "combine", "grouped_linear", "parameter_attention"}


def verdict(met: bool) -> str:
    return "MET   " if met else "MISSED"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of the ceiling, a bar a row."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib: no plot")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [r for r in rows if "forward_share" in r][::-1]
    if not measured:
        return
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.22 * len(measured)))
    labels = [f"{r['op']} {r['backend']} {r['dtype']} {r['size']}" for r in measured]
    axes.barh(labels, [100 * r["forward_share"] for r in measured])
    axes.set_xlabel("forward, % of the measured copy bandwidth or matmul rate")
    axes.tick_params(axis="y", labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bfloat16 and two sizes an op")
    parser.add_argument(
        "--seconds", type=float, default=0, help="start no case after these; 0: no limit"
    )
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    begun = time.perf_counter()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    warnings.filterwarnings("ignore", message=".*runs its reference instead")
    clock = Clock(device, 0.25 if options.quick else 1.0)
    ceiling = ceilings(clock, tiny=not cuda)
    versions = machine() | {"triton": version_of("triton"), "cuda": torch.version.cuda}
    print(f"{versions['machine']}, torch {versions['torch']}, triton {versions['triton']}")
    print(", ".join(f"{name} {value / 1e12:.3f} T/s" for name, value in ceiling.items()))
    only = set(filter(None, options.only.split(",")))
    out = options.out
    if out is None and cuda:
        out = RESULTS / f"kernels-{re.sub('[^a-z0-9]+', '-', versions['machine'].lower())}.json"
    rows: list[dict[str, Any]] = []
    block: dict[str, float] | None = None

    def write() -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            written = {**versions, "ceilings": ceiling, "block": block, "rows": rows}
            half = out.with_suffix(".half")
            half.write_text(json.dumps(written, indent=1) + "\n")
            half.replace(out)  # whole, whenever this is stopped

    # A caller who runs out of time still gets the verdicts on what was measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    print(HEAD, flush=True)
    try:
        for case, backend in ordered(every_case(tiny=not cuda, quick=options.quick), only):
            row: dict[str, Any] = {
                "op": case.op, "size": case.size, "dtype": name_of(case.dtype), "backend": backend,
            }  # fmt: skip
            spent = time.perf_counter() - begun
            if options.seconds and spent > options.seconds:
                row["skipped"] = "out of time"
            else:
                try:
                    row = measure(case, backend, clock, ceiling)
                except Exception as error:  # one kernel's failure must not hide the others
                    told = str(error).splitlines() or [""]
                    row |= {"skipped": f"{type(error).__name__}: {told[0]}", "failed": True}
            rows.append(row)
            write()
            print(line(row), flush=True)
            if cuda:
                torch.cuda.empty_cache()
            if block is None and (not only or "block" in only) and len(rows) == BLOCK_AFTER:
                os.environ.pop("ADAPTIVE_BACKEND", None)
                block = routed_block(device, rounds=9 if cuda else 2)
                write()
    finally:
        print("\n".join(verdicts(rows, block)) if cuda else NO_GPU, flush=True)
    if out is not None:
        print(f"results: {out}")
        plot(rows, out.with_suffix(".png"))
    if any(row.get("failed") for row in rows):
        raise SystemExit("some kernels failed, see above")


NO_GPU = "no GPU: sizes are tiny, nothing here says how fast a kernel is"
BLOCK_AFTER = 4
"""Rows before the block is timed: late enough for the GPU to be warm, early enough for time."""


def ordered(cases: list[Case], only: set[str]) -> list[tuple[Case, str]]:
    """What goals speak of first; of each, the kernel and what it is held against."""
    pairs = [(c, b) for c in cases if not only or c.op in only for b in c.backends]
    asked = {*GOALS, *AGAINST_TORCH}
    return sorted(pairs, key=lambda pair: (pair[0].op not in asked, pair[1] == "reference"))


def version_of(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module).__version__


if __name__ == "__main__":
    main()
