"""The doctor reports what this machine has, and says when training cannot work."""

from __future__ import annotations

import platform

import pytest
import torch

from launch import doctor
from launch.planning import environment


def test_a_working_machine_is_reported_whole(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    said = capsys.readouterr().out
    for expected in (torch.__version__, platform.python_version(), "everything needed is here"):
        assert expected in said
    for section in ("machine", "torch", "packages", "operations on", "trials"):
        assert f"\n{section}" in said
    for op in ("pack", "combine", "varlen_attention"):
        assert f"\n  {op} " in said
    assert "routed decoder         forward and backward" in said


def test_what_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(environment._NEEDED, "a-package-nobody-has", "this test")
    monkeypatch.setattr(environment, "_trials", lambda: iter(()))
    with pytest.raises(SystemExit) as stop:
        doctor.main([])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "! a-package-nobody-has   not installed, needed for this test" in said
    assert said.rstrip().endswith("training cannot work: a-package-nobody-has")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's choices")
def test_why_an_implementation_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)
    found = list(environment._implementations())
    attention = next(i for i, f in enumerate(found) if f.name == "varlen_attention")
    assert found[attention].said == "reference"
    reasons = [f.said.strip() for f in found[attention + 1 : attention + 4]]
    assert reasons[0].startswith("not triton: ")
    assert "not flash: the tensor is on cpu, not on a GPU" in reasons


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_BACKEND", "tritn")
    found = [f for f in environment._implementations() if f.name == "pack"]
    assert [f.state for f in found] == [environment.BROKEN]
    assert "ADAPTIVE_BACKEND=tritn: must be" in found[0].said


def test_a_model_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> float:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(environment, "_small_step", fail)
    (found,) = (f for f in environment._trials() if f.name == "routed decoder")
    assert found.state == environment.BROKEN
    assert found.said == "RuntimeError: first line second line"


def test_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--nonsense"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nonsense\n"
