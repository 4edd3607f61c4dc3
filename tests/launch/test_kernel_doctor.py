"""The kernel doctor says what runs, reports failing checks, and needs only torch and triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor
from launch.planning import kernels as kernel_doctor

PASSING = "def test_holds():\n    pass\n"
FAILING = "def test_breaks():\n    raise AssertionError('this kernel is wrong')\n"


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the checks by files of the given contents."""

    def write(*contents: str) -> None:
        paths = []
        for number, content in enumerate(contents):
            path = tmp_path / f"test_check_{number}.py"
            path.write_text(content)
            paths.append(str(path))
        monkeypatch.setattr(kernel_doctor, "CHECKS", tuple(paths))

    return write


def test_choices_and_passed_checks_are_reported(checks, capsys) -> None:
    checks(PASSING, PASSING)
    assert kernel_doctor.examine(timing=False) == 0
    said = capsys.readouterr().out
    for op in ("pack", "grouped_linear", "varlen_cross_attention", "highest_columns"):
        assert f"\n  {op} " in said
    assert said.count("1 passed") == 2
    assert said.rstrip().endswith("kernels: all checks passed")


def test_a_failing_check_is_shown_and_fails_the_call(checks, capsys) -> None:
    checks(PASSING, FAILING)
    assert kernel_doctor.examine(timing=False) == 1
    said = capsys.readouterr().out
    assert "this kernel is wrong" in said
    assert "FAILED: " in said.splitlines()[-1]


def test_a_check_that_hangs_is_stopped(checks, capsys, monkeypatch) -> None:
    monkeypatch.setattr(kernel_doctor, "INTERPRETED_SECONDS", 1)
    monkeypatch.setattr(kernel_doctor, "CHECK_SECONDS", 1)
    checks("import time\ntime.sleep(60)\n")
    assert kernel_doctor.examine(timing=False) == 1
    assert "stopped after 1 s" in capsys.readouterr().out


def test_timings_are_shares_of_what_the_machine_can_do(tmp_path: Path) -> None:
    root = Path(kernel_doctor.__file__).parents[2]
    out = tmp_path / "kernels.json"
    ops = "pack,combine_,permute,order_by_unit"
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--only", ops, "--out", str(out)]
    done = subprocess.run(
        command, cwd=root, env=kernel_doctor._environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert {row["op"] for row in written["rows"]} == set(ops.split(","))
    for row in written["rows"]:
        assert "skipped" not in row, row
        assert 0 < row["forward_share"] < 2, row
    assert written["machine"]
    assert written["ceilings"]["bytes"] > 0


def test_timings_measured_before_a_stop_are_kept(tmp_path: Path) -> None:
    root, out = Path(kernel_doctor.__file__).parents[2], tmp_path / "kernels.json"
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=root, env=kernel_doctor._environment(), stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for said in running.stdout:
            if said.startswith("pack "):
                break
        running.terminate()
        rest = running.stdout.read()
    assert running.returncode not in (0, None)
    assert "no GPU" in rest
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["op"] == "pack"
    assert rows[0]["forward_ms"] > 0


def test_every_goal_is_said_to_be_met_missed_or_not_measured() -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks")
from kernels import verdicts
def row(op, backend, **found):
    return {"op": op, "backend": backend, "size": "T 8", "dtype": "bfloat16", **found}
rows = [
    row("pack", "triton", forward_ms=1.0, forward_share=0.9, required_share=0.8),
    row("combine", "triton", forward_ms=1.0, forward_share=0.7, required_share=0.8),
    row("varlen_attention", "triton", forward_ms=2.0, forward_share=0.5),
    row("varlen_attention", "torch", forward_ms=1.0, forward_share=0.9),
    row("parameter_attention", "triton", skipped="out of time"),
]
print(*verdicts(rows, None), *verdicts([], {"over_flops": 1.2, "flop_ratio": 0.1}), sep="\\n")
"""
    root = Path(kernel_doctor.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "MET    pack T 8 bfloat16: goal 80% of the ceiling, measured 90%",
        "MISSED combine T 8 bfloat16: goal 80% of the ceiling, measured 70%",
        "MISSED varlen_attention T 8 bfloat16: goal 0.90x torch's speed, measured 0.50x",
        "NOT MEASURED parameter_attention T 8 bfloat16: out of time",
        "NOT MEASURED block routed at 12.5%, S 4096",
        "MET    block routed at 12.5%, S 4096: goal at most 1.25x its share of FLOPs (0.100), "
        "measured 1.20x",
    ], done.stderr


def test_without_a_checkout_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernel_doctor, "CHECKS", ("tests/nothing.py",))
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--kernels"])
    assert stop.value.code == 2
    assert "needs a checkout" in capsys.readouterr().err


def test_it_runs_where_only_torch_triton_and_pytest_are_installed() -> None:
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'megatron', 'pydantic', 'omegaconf', 'tensorboard', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "from launch import doctor\n"
        "from launch.planning import kernels as kernel_doctor\n"
        "kernel_doctor._choices()\n"
    )
    root = Path(kernel_doctor.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels on" in done.stdout
