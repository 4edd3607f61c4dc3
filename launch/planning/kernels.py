"""The kernels on this machine: `python -m launch.doctor --kernels`, from a checkout.

Says which implementation of every operation runs and why, runs the kernels' tests (compiled on a
GPU, interpreted without one), then times every operation against what the machine can do. Needs
torch, triton and pytest, nothing else of ours. One call, less than 8 minutes on a GPU machine.
Exit status 1 when a check fails, 2 when something needed is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from adaptive.ops.backend import explain, operations
from launch.run.children import Child, end
from launch.run.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    "tests/adaptive/ops/test_kernels_grouped_linear.py",
    "tests/adaptive/ops/test_kernels_pack.py",
    "tests/adaptive/ops/test_kernels_parameter_attention.py",
    "tests/adaptive/ops/test_kernels_ring_attention.py",
    "tests/adaptive/ops/test_kernels_routing.py",
    "tests/adaptive/ops/test_kernels_varlen_attention.py",
    "tests/adaptive/blocks/test_static_routing.py",
)
CHECK_SECONDS, TIMING_SECONDS = 200, 200
"""Limits on a GPU machine: with starting up, a call stays below 8 minutes there."""
GRACE_SECONDS = 35
"""For the case in progress when the time is up, and for goals and plot."""
INTERPRETED_SECONDS = 900
"""Limit of the checks where they run interpreted."""


def examine(*, timing: bool = True) -> int:
    """All of it, printed as it goes. Returns the exit status: 0, or 1 when a check failed.

    Args:
        timing: also time; False: checks alone.

    Raises:
        BadInput: if this is no checkout, or triton or pytest is not installed.
    """
    missing = [check for check in CHECKS if not (ROOT / check).is_file()]
    if missing:
        raise BadInput(f"--kernels: needs a checkout with its tests: {ROOT / missing[0]} is absent")
    for name in ("triton", "pytest"):
        if find_spec(name) is None:
            raise BadInput(f"--kernels: needs {name}, which is not installed")
    _choices()
    failed = _checks()
    if timing:
        failed += _timing()
    print("\nkernels: " + ("FAILED: " + ", ".join(failed) if failed else "all checks passed"))
    return 1 if failed else 0


def _choices() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    where = torch.cuda.get_device_name() if cuda else "cpu (no GPU: kernels run interpreted)"
    print(f"kernels on {where}, torch {torch.__version__}")
    for op in operations():
        heads = op.endswith("attention") and op != "parameter_attention"
        shape = (64, 8, 64) if heads else (64, 512)
        said = explain(op, torch.zeros(shape, dtype=dtype, device=device))
        chosen = next(name for name, state in said.items() if state == "chosen")
        others = "; ".join(f"{n}: {s}" for n, s in said.items() if s != "chosen")
        print(f"  {op:<24}{chosen:<11}{others}")


def _checks() -> list[str]:
    """Those test files that fail. Each has a process of its own; they share the cores."""
    environment = _environment()
    limit = CHECK_SECONDS if torch.cuda.is_available() else INTERPRETED_SECONDS
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    waiting, running, failed = list(CHECKS), {}, []
    end = time.monotonic() + limit
    print("\nchecks", flush=True)
    while waiting or running:
        while waiting and len(running) < max(1, cores // 2):
            check = waiting.pop(0)
            command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p",
                       "no:cacheprovider", "--tb=short", check]  # fmt: skip
            running[check] = Child(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        check, process = next(iter(running.items()))
        try:
            output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += f"stopped after {limit} s in all\n"
        del running[check]
        lines = output.strip().splitlines()
        print(f"  {check}: {lines[-1] if lines else 'no output'}", flush=True)
        if process.returncode:
            print("\n".join(f"    {line}" for line in lines[-40:]), flush=True)
            failed.append(check)
    return failed


def _timing() -> list[str]:
    print("\ntiming", flush=True)
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--seconds", str(TIMING_SECONDS)]
    if "OUT" in os.environ:
        command += ["--out", str(Path(os.environ["OUT"]) / "kernels.json")]
    # It starts nothing new after its seconds. If one case outlasts them, what was measured is
    # already printed and written; asked to stop, it adds which goals were met.
    with Child(command, cwd=ROOT, env=_environment()) as running:
        try:
            status = running.wait(TIMING_SECONDS + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            end([running], seconds=10)
            return ["benchmarks/kernels.py: out of time"]
    return ["benchmarks/kernels.py"] if status else []


def _environment() -> dict[str, str]:
    """The caller's, with this checkout importable and no backend forced."""
    environment = dict(os.environ)
    environment.pop("ADAPTIVE_BACKEND", None)
    environment["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    return environment
