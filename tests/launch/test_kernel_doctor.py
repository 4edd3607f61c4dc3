"""The kernel doctor says what runs, reports failing checks, and needs only torch and triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor, kernel_doctor

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
    root = Path(kernel_doctor.__file__).parents[1]
    out = tmp_path / "kernels.json"
    ops = "pack,combine_,order_by_unit"
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
        "from launch import doctor, kernel_doctor\n"
        "kernel_doctor._choices()\n"
    )
    root = Path(kernel_doctor.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels on" in done.stdout
