"""What every kernel launch needs: block sizes, the product of two tiles, the device.

Triton reads TRITON_INTERPRET when it is first imported; under it, kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, block: int) -> int:
    """How many blocks cover n."""
    return -(-n // block)


def interpreted_block(length: int) -> int:
    """A block for the interpreter, which takes as long for a small tile as for a large one.

    A few blocks cover any length, so that their seams are crossed at the smallest sizes.
    """
    return max(16, min(next_power_of_2(cdiv(length, 4)), 256))


def row_blocks(rows: int, width: int, elements: int = 4096) -> tuple[int, int]:
    """(rows, columns) of a tile for kernels that stream rows: about as many elements."""
    columns = max(16, min(next_power_of_2(width), elements))
    if INTERPRETED:
        return interpreted_block(rows), columns
    return max(1, min(16, elements // columns)), columns


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU current, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as exactly as torch multiplies float32 matrices."""
    # `allow_tf32` raises once somebody has set the newer switch; this one reads both.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself if the elements of a row are adjacent, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def device_function(function: Callable[..., Any]) -> Any:
    """Decorates what kernels call.

    Interpreted, it stays as it is: Triton patches its whole language anew at every call of a jitted
    function, which was most of the interpreter's time.
    """
    return function if INTERPRETED else triton.jit(function)


@device_function
def tile_dot(a, b, accumulator, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """accumulator (None: 0) + a @ b in float32. Interpreted, bfloat16 tiles have no product."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
