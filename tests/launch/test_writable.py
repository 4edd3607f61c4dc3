"""What can be written is found out without a trace; what cannot is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.run.errors import BadInput
from launch.run.writable import check_file, check_folder


def test_checks_leave_nothing_behind(tmp_path: Path) -> None:
    check_folder("output", tmp_path / "not" / "yet")
    check_folder("output", tmp_path)
    check_file("--json", tmp_path / "new.json")
    check_file("--json", tmp_path / "new" / "new.json", makes_folder=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text("kept")
    check_file("--json", tmp_path / "old.json")
    assert (tmp_path / "old.json").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(BadInput, match=r"output=.*new: .* cannot be written: Permission denied"):
        check_folder("output", tmp_path / "new")


def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written: File name too long"):
        check_folder("output", tmp_path / ("x" * 5000))
    with pytest.raises(BadInput, match="cannot be written: File name too long"):
        check_file("--json", tmp_path / ("x" * 5000) / "a.json")


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/nowhere/at/all.json", "its folder does not exist"),
        ("/proc/all.json", "/proc cannot be written"),
        ("/tmp", "must name a file"),
        ("", "must name a file"),
    ],
)
def test_files_that_cannot_be_written_are_refused(path: str, rule: str) -> None:
    with pytest.raises(BadInput, match=f"--json={path}: .*{rule}"):
        check_file("--json", path)


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for path in ("gone", "gone/run"):
        with pytest.raises(BadInput, match=r"gone is a link to nothing"):
            check_folder("output", tmp_path / path)
