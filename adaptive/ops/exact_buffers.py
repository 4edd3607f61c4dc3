"""Buffers that a cast of the whole model must not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn


class ExactBuffers(nn.Module):
    """Moves and casts as any module, but for the buffers named: none gets a lower precision.

    `.bfloat16()` of a whole model rounds to 8 bits what is compared, accumulated in small steps, or
    multiplies every score.

    Class attributes:
        exact_buffers: their names.
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        exact = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.itemsize < buffer.itemsize:
                setattr(self, name, buffer.to(moved.device))
        return self
