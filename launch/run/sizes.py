"""Models without memory, to look at their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from launch.run.validation import as_too_large


@contextmanager
def without_memory() -> Iterator[torch.device]:
    """What is built inside has shapes alone; nothing is drawn into it.

    Raises:
        BadInput: sizes that cannot be written down.
    """
    with torch.device("meta") as device, _NoDraws(), as_too_large("model"):
        yield device


class _NoDraws(TorchFunctionMode):
    """Leaves weights as they are: to draw none, torch would first import its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", None) in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
