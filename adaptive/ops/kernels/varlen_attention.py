"""Attention over packed sequences whose queries and keys differ in number, causal by position.

One pass over the keys a block of queries can see, with a running softmax; the backward computes
the probabilities again from the log-sum-exp. Key blocks that every query of a block sees take no
mask; those that none sees are not read. Positions may come in any order within a sequence.

Shape legend: Q packed queries, T packed keys, H query heads, G key-value heads (H = G * group),
h head width, B sequences.

Source of the method: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.launching import (
    INTERPRETED,
    device_function,
    dot_precision,
    on_device,
    tile_dot,
)
from adaptive.ops.kernels.varlen_visibility import (
    block_grid,
    head_columns,
    interpreted_blocks,
    sequence_of,
    visible_keys,
)

# mypy: disable-error-code="no-untyped-def"


@device_function
def _attend(
    total,
    denominator,
    largest,
    q,
    k,
    v,
    k_row,
    v_row,
    m,
    q_at,
    k_start,
    k_len,
    k_positions,
    first,
    last,
    scale_log2,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < k_len)[:, None] & (h < HEAD)[None, :]
        rows = (k_start + n).to(tl.int64)[:, None]
        k_NH = tl.load(k + rows * k_row + h[None, :], mask=inside, other=0)
        scores = tile_dot(q, tl.trans(k_NH), None, PRECISION) * scale_log2
        if MASKED:
            allowed = (n < k_len)[None, :]
            if CAUSAL == 1:
                allowed = allowed & (n[None, :] <= m[:, None])
            if CAUSAL == 2:
                k_at = tl.load(k_positions + k_start + n, mask=n < k_len, other=0).to(tl.int32)
                allowed = allowed & (k_at[None, :] <= q_at[:, None])
            scores = tl.where(allowed, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet: anything finite keeps exp2(-inf - x) at zero.
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        denominator = denominator * decay + tl.sum(p, 1)
        v_NH = tl.load(v + rows * v_row + h[None, :], mask=inside, other=0)
        total = tile_dot(p.to(v_NH.dtype), v_NH, total * decay[:, None], PRECISION)
        largest = new
    return total, denominator, largest


@triton.jit(do_not_specialize=["sequences"])
def _forward(
    q,
    k,
    v,
    out,
    lse,
    q_starts,
    k_starts,
    q_positions,
    k_positions,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    queries,
    sequences,
    heads,
    group,
    scale,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The blocks that see most keys come last in a sequence and are started first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence, block = sequence_of(q_starts, sequences, tile, BLOCK_M)
    if sequence >= sequences:
        return
    q_start = tl.load(q_starts + sequence)
    q_len = tl.load(q_starts + sequence + 1) - q_start
    k_start = tl.load(k_starts + sequence)
    k_len = tl.load(k_starts + sequence + 1) - k_start
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.arange(0, BLOCK_H)
    rows = (q_start + m).to(tl.int64)
    inside = (m < q_len)[:, None] & (h < HEAD)[None, :]
    q_MH = tl.load(q + rows[:, None] * q_row + head * q_head + h[None, :], mask=inside, other=0)
    q_at = m
    if CAUSAL == 2:
        q_at = tl.load(q_positions + rows, mask=m < q_len, other=-1).to(tl.int32)
    full, end = visible_keys(
        block, q_start, q_len, k_start, k_len, q_positions, k_positions, CAUSAL, BLOCK_M, BLOCK_N
    )
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    scale_log2 = scale * 1.4426950408889634
    k += head // group * k_head
    v += head // group * v_head
    total, denominator, largest = _attend(
        total, denominator, largest, q_MH, k, v, k_row, v_row, m, q_at, k_start, k_len,
        k_positions, 0, full, scale_log2, CAUSAL, False, HEAD, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    total, denominator, largest = _attend(
        total, denominator, largest, q_MH, k, v, k_row, v_row, m, q_at, k_start, k_len,
        k_positions, full, end, scale_log2, CAUSAL, True, HEAD, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    seen = denominator > 0
    total = total / tl.where(seen, denominator, 1.0)[:, None]
    tl.store(out + (rows[:, None] * heads + head) * HEAD + h[None, :], total, mask=inside)
    natural = largest * 0.6931471805599453 + tl.log(tl.where(seen, denominator, 1.0))
    natural = tl.where(seen, natural, float("-inf"))
    tl.store(lse + head * queries + rows, natural, mask=m < q_len)


def forward_blocks(
    head_dim: int, dtype: torch.dtype, max_queries: int, max_keys: int
) -> dict[str, int]:
    """Tile sizes: queries, keys, warps, stages. Chosen by shared memory; not measured."""
    if INTERPRETED:
        return interpreted_blocks(max_queries, max_keys)
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if head_dim <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
    if head_dim <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def launch(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    out: Tensor,
    lse_HQ: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    *,
    max_queries: int,
    max_keys: int,
    causal: int,
) -> None:
    """`adaptive.ops.operators.attention_forward`, into `out` and `lse`."""
    if not out.numel():
        return
    queries, heads, head_dim = out.shape
    q_QHh, k_TGh, v_TGh = (head_columns(x) for x in (q_QHh, k_TGh, v_TGh))
    blocks = forward_blocks(head_dim, q_QHh.dtype, max_queries, max_keys)
    sequences = q_starts.shape[0] - 1
    grid = (block_grid(queries, sequences, max_queries, blocks["BLOCK_M"]), heads)
    with on_device(out):
        _forward[grid](
            q_QHh,
            k_TGh,
            v_TGh,
            out,
            lse_HQ,
            q_starts,
            k_starts,
            q_positions,
            k_positions,
            *q_QHh.stride()[:2],
            *k_TGh.stride()[:2],
            *v_TGh.stride()[:2],
            queries,
            sequences,
            heads,
            heads // k_TGh.shape[1],
            1 / math.sqrt(head_dim),
            CAUSAL=causal,
            HEAD=head_dim,
            BLOCK_H=max(16, triton.next_power_of_2(head_dim)),
            PRECISION=dot_precision(q_QHh.dtype),
            **blocks,
        )
