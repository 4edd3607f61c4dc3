"""Products of every expert's rows with its own weight, in one launch, rows wherever they lie.

A row is loaded from its token and stored, scaled, at its pair: no permuted copy is made. Row
blocks never straddle experts; how many there are only the device knows, so the grid is the largest
there can be and the rest return at once.

Shape legend: N rows, E experts, I contracted width, O output width.
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
    device_function,
    dot_precision,
    next_power_of_2,
    on_device,
    tile_dot,
)

# mypy: disable-error-code="no-untyped-def"


@device_function
def _expert_of(counts, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, its first row of this tile, its end) of a row block; expert = EXPERTS if none."""
    e = tl.arange(0, BLOCK_E)
    rows = tl.load(counts + e, mask=e < EXPERTS, other=0).to(tl.int32)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = e < expert
    first = tl.sum(tl.where(before, rows, 0), 0)
    end = first + tl.sum(tl.where(e == expert, rows, 0), 0)
    start = first + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M
    return tl.minimum(expert, EXPERTS), start, end


@autotuned(["width", "out_width", "ROWS_CLASS", "GATHER", "SCATTER", "ACTIVATION", "TRANSPOSED"])
@triton.jit(do_not_specialize=["ROWS_CLASS"])
def _rows(
    a,
    weight,
    counts,
    pairs,
    scales,
    out,
    hidden,
    width,
    out_width,
    a_row,
    w_expert,
    w_out,
    w_in,
    ROWS_CLASS,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Eight row blocks share their columns of the weight while these are in cache.
    columns = tl.cdiv(out_width, BLOCK_N)
    band = tl.program_id(0) // (8 * columns)
    inside_band = tl.program_id(0) % (8 * columns)
    tile = band * 8 + inside_band % 8
    expert, start, end = _expert_of(counts, tile, EXPERTS, BLOCK_E, BLOCK_M)
    if expert == EXPERTS:
        return
    n = start + tl.arange(0, BLOCK_M)
    o = inside_band // 8 * BLOCK_N + tl.arange(0, BLOCK_N)
    present = n < end
    pair = n
    if GATHER or SCATTER or SCALED:
        pair = tl.load(pairs + n, mask=present, other=0)
    source = pair // TOP_K if GATHER else n
    a_at = a + source.to(tl.int64)[:, None] * a_row
    w_at = weight + expert.to(tl.int64) * w_expert + o.to(tl.int64)[None, :] * w_out
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(a_at + i[None, :], mask=present[:, None] & (i < width)[None, :], other=0)
        at = w_at + i[:, None] * w_in
        inside = (i < width)[:, None] & (o < out_width)[None, :]
        w = tl.load(at, mask=inside, other=0)
        total = tile_dot(x, w, total, PRECISION)
        if ACTIVATION == 1:
            up = tl.load(at + out_width * w_out, mask=inside, other=0)
            total_up = tile_dot(x, up, total_up, PRECISION)
    inside = present[:, None] & (o < out_width)[None, :]
    if KEEP_HIDDEN:
        factor = 2 if ACTIVATION == 1 else 1
        at = hidden + n.to(tl.int64)[:, None] * (out_width * factor) + o[None, :]
        tl.store(at, total, mask=inside)
        if ACTIVATION == 1:
            tl.store(at + out_width, total_up, mask=inside)
    if ACTIVATION == 1:
        total = total * tl.sigmoid(total) * total_up
    if ACTIVATION == 2:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    if SCALED:
        total *= tl.load(scales + pair, mask=present, other=0).to(tl.float32)[:, None]
    to = pair if SCATTER else n
    tl.store(out + to.to(tl.int64)[:, None] * out_width + o[None, :], total, mask=inside)


def launch(
    a: Tensor,
    weight: Tensor,
    rows_E: Tensor,
    pairs_N: Tensor | None,
    scales: Tensor | None,
    out: Tensor,
    hidden: Tensor,
    *,
    top_k: int,
    gather: bool,
    scatter: bool,
    activation: int,
    transposed: bool,
    keep_hidden: bool,
) -> None:
    """`adaptive.ops.operators.grouped_rows`, into `out` and `hidden`."""
    a, rows_E = contiguous_rows(a), rows_E.contiguous()
    pairs_N, scales = (None if x is None else x.contiguous() for x in (pairs_N, scales))
    rows = a.shape[0] if pairs_N is None else pairs_N.shape[0]
    experts, out_width = weight.shape[0], out.shape[1]
    if out.shape[0] != rows:
        out.zero_()
    if not (rows and out_width):
        return
    strides = weight.transpose(1, 2).stride() if transposed else weight.stride()

    def grid(blocks: dict[str, Any]) -> tuple[int]:
        row_blocks = rows // blocks["BLOCK_M"] + min(experts, rows)
        return (cdiv(row_blocks, 8) * 8 * cdiv(out_width, blocks["BLOCK_N"]),)

    with on_device(a):
        _rows[grid](
            a,
            weight,
            rows_E,
            pairs_N,
            scales,
            out,
            hidden,
            a.shape[1],
            out_width,
            a.stride(0),
            *strides,
            rows_class(rows, experts),
            TOP_K=top_k,
            EXPERTS=experts,
            BLOCK_E=max(16, next_power_of_2(experts)),
            GATHER=gather,
            SCATTER=scatter,
            SCALED=scales is not None,
            ACTIVATION=activation,
            KEEP_HIDDEN=keep_hidden,
            TRANSPOSED=transposed,
            PRECISION=dot_precision(a.dtype),
            **interpreted_tiles(cdiv(rows, experts), out_width, a.shape[1]),
        )
