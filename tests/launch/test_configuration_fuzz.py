"""Configurations that are wrong in one place, drawn from all that the schema allows to write."""

from __future__ import annotations

from pathlib import Path

from tests.launch.configuration_fuzz import attempts, fuzz


def test_what_is_wrong_is_one_line_and_what_passes_has_a_reason(tmp_path: Path) -> None:
    """A few of thousands; `make soak` tries 500."""
    figures = fuzz(tmp_path, seed=0, count=60)
    assert figures.faults == []
    assert figures.refused + figures.accepted == 60


def test_every_section_is_tried(tmp_path: Path) -> None:
    sections = {attempt.key.split(".")[0] for attempt in attempts(tmp_path)}
    assert sections >= {"task", "output", "model", "data", "train", "parallel", "monitor"}
    assert sections >= {"checkpoint", "deepspeed", "phases"}
