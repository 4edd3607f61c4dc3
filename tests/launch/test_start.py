"""What a start needs to know of hostfiles."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from launch.run.errors import BadInput
from launch.run.launcher import count_ranks


def hostfile(folder: Path, text: str) -> argparse.Namespace:
    path = folder / "hosts"
    path.write_text(text, errors="surrogateescape")
    return argparse.Namespace(hostfile=str(path), ranks=None)


def test_ranks_of_several_nodes_are_those_of_the_hostfile(tmp_path: Path) -> None:
    text = "node-1 slots=8\n# spare\n\nnode-2 slots=4  # half\n"
    assert count_ranks(hostfile(tmp_path, text), gpus=2) == 12


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("node-1 8\n", "hosts:1: must be HOST slots=COUNT"),
        ("node-1 slots=8\nnode-2 slots=x\n", "hosts:2: must be HOST slots=COUNT"),
        ("# nobody\n", "hosts: names no host"),
        ("\udcff slots=1\n", "hosts: 'utf-8' codec can't decode"),
    ],
)
def test_a_wrong_hostfile_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(line)):
        count_ranks(hostfile(tmp_path, text), gpus=2)
