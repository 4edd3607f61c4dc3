"""Without a GPU, Triton kernels run interpreted: Triton must know before it is first imported.

What takes long depends on the machine: programs called in this process do not tell of it, and no
property has a deadline.
Files that take long begin before short ones, which `make test` spreads over two processes by file.
"""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from launch.run import terminal

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
terminal.PATIENCE = 3600.0
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

LONGEST = ("distributed", "launch", "", "adaptive/ops")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.relative_to(Path(__file__).parent).as_posix().strip(".")
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)
