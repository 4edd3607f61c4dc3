"""Matrix products on a CPU, by whichever of torch's two libraries is the faster one.

torch multiplies float32 matrices on x86 through MKL, which takes its AVX2 path on processors that
are not Intel's. torch also carries oneDNN, which compiles for the vector width it finds: on an AMD
EPYC with AVX-512 it is 2.2 times as fast (docs/matrix_products.md). The choice depends on the
machine and the shape only, never on a measurement: ranks that repeat each other's computation must
get the same numbers.

oneDNN compiles a product once per shape, in about 0.25 ms, and keeps the last thousand. Callers
whose number of rows changes from step to step round it up by `rounded_rows`, with rows of zeros, so
that shapes come back.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.flop_formulas import flop_formula

_ROW_MULTIPLE = 16
_WORTH_COMPILING = 128**3
"""Multiplications from which oneDNN's dearer call pays."""


def product(
    a_MK: Tensor, b_KN: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`a @ b + bias`, [M, N]; not differentiable by autograd.

    Args:
        a_MK: [M, K].
        b_KN: [K, N], same dtype and device.
        bias: [N] or None.
        out: [M, N], memory that may be used for the result. The result is what is returned;
            whether it lies there depends on the library.
    """
    worth = worth_compiling(a_MK.shape[0], b_KN)
    if worth and by_onednn(a_MK) and _whole(a_MK) and _whole(b_KN):
        if bias is None and not a_MK.is_contiguous() and _dearer_to_copy(a_MK, b_KN):
            transposed_MN = _onednn(b_KN.t(), a_MK, None, "none", [], "").t()
            return transposed_MN.contiguous() if out is None else out.copy_(transposed_MN)
        return _onednn(a_MK, b_KN.t(), bias, "none", [], "")
    if bias is not None:
        return torch.addmm(bias, a_MK, b_KN)
    return torch.mm(a_MK, b_KN, out=out) if out is not None else torch.mm(a_MK, b_KN)


def add_product(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """`total += a @ b`, in place."""
    if by_onednn(a_MK):
        total_MN.add_(product(a_MK, b_KN))
    else:
        # Not addmm_, which FLOP counters do not know.
        torch.addmm(total_MN, a_MK, b_KN, out=total_MN)


def rounded_rows(rows: int, weight: Tensor) -> int:
    """How many rows to multiply by `weight` where `rows` of them mean anything."""
    if not (by_onednn(weight) and worth_compiling(rows, weight)):
        return rows
    return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def worth_compiling(rows: int, weight: Tensor) -> bool:
    """Whether a product of that many rows and `weight`, [K, N] or [N, K], is large enough."""
    return rows * weight.shape[0] * weight.shape[1] >= _WORTH_COMPILING


def _dearer_to_copy(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether `a` is so large that `(bᵀ aᵀ)ᵀ`, and a copy of that, is cheaper than `a b`.

    oneDNN's call copies a first factor that is a transposed view.
    """
    (m, k), n = a_MK.shape, b_KN.shape[1]
    return k * (m - n) > 2 * m * n


def _whole(matrix: Tensor) -> bool:
    """Whether it is no slice of a wider matrix: oneDNN takes a thousand times as long for those."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def by_onednn(x: Tensor) -> bool:
    """Whether large products of tensors like `x` go to oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and torch has oneDNN."""
    if not torch.backends.mkldnn.is_available() or _onednn is None:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() != "GenuineIntel"


def _vendor() -> str:
    """The vendor_id of the first processor; Intel's where none can be read."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")]
    return names[0] if names else "GenuineIntel"


# What torch's own compiler calls for linear layers: x [M, K], weight [N, K].
_packet: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_onednn: Any = None if _packet is None else _packet.default

if _packet is not None:

    @flop_formula(_packet)
    def _operations(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]
