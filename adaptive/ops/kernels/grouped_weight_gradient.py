"""The gradient of every expert's weight, from rows wherever they lie.

Shape legend: N rows, E experts, A and B widths of the two sides.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.grouped_tiles import autotuned, interpreted_tiles, rows_class
from adaptive.ops.kernels.launching import (
    cdiv,
    contiguous_rows,
    dot_precision,
    next_power_of_2,
    on_device,
    tile_dot,
)

# mypy: disable-error-code="no-untyped-def"


@autotuned(["a_width", "b_width", "ROWS_CLASS", "GATHER_A", "GATHER_B"])
@triton.jit(do_not_specialize=["ROWS_CLASS"])
def _weight_gradient(
    a,
    b,
    counts,
    pairs,
    out,
    a_width,
    b_width,
    a_row,
    b_row,
    ROWS_CLASS,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out[e] = a[rows of e].T @ b[rows of e]; zeros for an expert without rows.
    columns = tl.cdiv(b_width, BLOCK_N)
    expert = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(counts + e, mask=e < EXPERTS, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < expert, rows, 0), 0)
    end = start + tl.sum(tl.where(e == expert, rows, 0), 0)
    o = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        n = first + tl.arange(0, BLOCK_K)
        present = n < end
        token = n
        if GATHER_A or GATHER_B:
            token = tl.load(pairs + n, mask=present, other=0) // TOP_K
        a_from = token if GATHER_A else n
        b_from = token if GATHER_B else n
        x = tl.load(
            a + a_from.to(tl.int64)[:, None] * a_row + o[None, :],
            mask=present[:, None] & (o < a_width)[None, :],
            other=0,
        )
        y = tl.load(
            b + b_from.to(tl.int64)[:, None] * b_row + i[None, :],
            mask=present[:, None] & (i < b_width)[None, :],
            other=0,
        )
        total = tile_dot(tl.trans(x), y, total, PRECISION)
    at = out + (expert.to(tl.int64) * a_width + o[:, None]) * b_width + i[None, :]
    tl.store(at, total, mask=(o < a_width)[:, None] & (i < b_width)[None, :])


def launch(
    a: Tensor,
    b: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    out: Tensor,
    *,
    top_k: int,
    gather_a: bool,
    gather_b: bool,
) -> None:
    """`adaptive.ops.operators.grouped_weight_gradient`, into `out`."""
    a, b, rows_E = contiguous_rows(a), contiguous_rows(b), rows_E.contiguous()
    pairs_N = None if pairs_N is None else pairs_N.contiguous()
    experts, a_width, b_width = out.shape
    rows = pairs_N.shape[0] if pairs_N is not None else a.shape[0]
    if not rows:
        out.zero_()
        return
    if not out.numel():
        return

    def grid(blocks: dict[str, Any]) -> tuple[int, int]:
        tiles = cdiv(a_width, blocks["BLOCK_M"]) * cdiv(b_width, blocks["BLOCK_N"])
        return tiles, experts

    with on_device(a):
        _weight_gradient[grid](
            a,
            b,
            rows_E,
            pairs_N,
            out,
            a_width,
            b_width,
            a.stride(0),
            b.stride(0),
            rows_class(rows, experts),
            TOP_K=top_k,
            EXPERTS=experts,
            BLOCK_E=max(16, next_power_of_2(experts)),
            GATHER_A=gather_a,
            GATHER_B=gather_b,
            PRECISION=dot_precision(a.dtype),
            **interpreted_tiles(a_width, b_width, cdiv(rows, experts)),
        )
