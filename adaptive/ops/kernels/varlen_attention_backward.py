"""The gradients of varlen attention: one kernel a block of keys, one a block of queries.

No atomics: the query heads that share a key-value head are summed inside one program, so results
repeat bit for bit.

Shape legend: as in varlen_attention.py.
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
    visible_queries,
)

# mypy: disable-error-code="no-untyped-def"


@device_function
def _add_queries(
    grad_k,
    grad_v,
    k_NH,
    v_NH,
    q,
    grad_out,
    lse,
    delta,
    q_row,
    grad_row,
    n,
    k_at,
    k_len,
    q_start,
    q_len,
    q_positions,
    first,
    last,
    scale,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h = tl.arange(0, BLOCK_H)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows = (q_start + m).to(tl.int64)
        inside = (m < q_len)[:, None] & (h < HEAD)[None, :]
        q_MH = tl.load(q + rows[:, None] * q_row + h[None, :], mask=inside, other=0)
        g_MH = tl.load(grad_out + rows[:, None] * grad_row + h[None, :], mask=inside, other=0)
        lse_M = tl.load(lse + rows, mask=m < q_len, other=0)
        delta_M = tl.load(delta + rows, mask=m < q_len, other=0)
        q_at = m
        if CAUSAL == 2:
            q_at = tl.load(q_positions + rows, mask=m < q_len, other=-1).to(tl.int32)
        # Keys by queries, so that both accumulations multiply it as it lies, without transposing.
        p_NM = tile_dot(k_NH, tl.trans(q_MH), None, PRECISION) * (scale * 1.4426950408889634)
        p_NM = tl.exp2(p_NM - lse_M[None, :] * 1.4426950408889634)
        if MASKED:
            # Also where lse is -inf: a query without keys has no allowed pair.
            allowed = (n < k_len)[:, None]
            if CAUSAL == 1:
                allowed = allowed & (n[:, None] <= m[None, :])
            if CAUSAL == 2:
                allowed = allowed & (k_at[:, None] <= q_at[None, :])
            p_NM = tl.where(allowed, p_NM, 0.0)
        grad_v = tile_dot(p_NM.to(g_MH.dtype), g_MH, grad_v, PRECISION)
        grad_p_NM = tile_dot(v_NH, tl.trans(g_MH), None, PRECISION)
        grad_s_NM = (p_NM * (grad_p_NM - delta_M[None, :])).to(q_MH.dtype)
        grad_k = tile_dot(grad_s_NM, q_MH, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["sequences"])
def _keys_and_values(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
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
    grad_row,
    grad_head,
    queries,
    sequences,
    kv_heads,
    group,
    scale,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    sequence, block = sequence_of(k_starts, sequences, tl.program_id(0), BLOCK_N)
    if sequence >= sequences:
        return
    k_start = tl.load(k_starts + sequence)
    k_len = tl.load(k_starts + sequence + 1) - k_start
    q_start = tl.load(q_starts + sequence)
    q_len = tl.load(q_starts + sequence + 1) - q_start
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    rows = (k_start + n).to(tl.int64)[:, None]
    inside = (n < k_len)[:, None] & (h < HEAD)[None, :]
    k_NH = tl.load(k + rows * k_row + kv_head * k_head + h[None, :], mask=inside, other=0)
    v_NH = tl.load(v + rows * v_row + kv_head * v_head + h[None, :], mask=inside, other=0)
    k_at = n
    if CAUSAL == 2:
        k_at = tl.load(k_positions + k_start + n, mask=n < k_len, other=0).to(tl.int32)
    first, full = visible_queries(
        block, q_start, q_len, k_start, k_len, q_positions, k_positions, CAUSAL, BLOCK_M, BLOCK_N
    )
    full = tl.minimum(full, q_len)
    total_k = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    total_v = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        at = head * queries
        total_k, total_v = _add_queries(
            total_k, total_v, k_NH, v_NH, q + head * q_head, grad_out + head * grad_head,
            lse + at, delta + at, q_row, grad_row, n, k_at, k_len, q_start, q_len, q_positions,
            first, full, scale, CAUSAL, True, HEAD, BLOCK_H, BLOCK_M, PRECISION,
        )  # fmt: skip
        total_k, total_v = _add_queries(
            total_k, total_v, k_NH, v_NH, q + head * q_head, grad_out + head * grad_head,
            lse + at, delta + at, q_row, grad_row, n, k_at, k_len, q_start, q_len, q_positions,
            tl.minimum(tl.cdiv(full, BLOCK_M) * BLOCK_M, q_len), q_len, scale,
            CAUSAL, False, HEAD, BLOCK_H, BLOCK_M, PRECISION,
        )  # fmt: skip
    to = (rows * kv_heads + kv_head) * HEAD + h[None, :]
    tl.store(grad_k + to, total_k * scale, mask=inside)
    tl.store(grad_v + to, total_v, mask=inside)


@device_function
def _add_keys(
    grad_q,
    q_MH,
    g_MH,
    lse_M,
    delta_M,
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
    scale,
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
        v_NH = tl.load(v + rows * v_row + h[None, :], mask=inside, other=0)
        p = tile_dot(q_MH, tl.trans(k_NH), None, PRECISION) * (scale * 1.4426950408889634)
        p = tl.exp2(p - lse_M[:, None] * 1.4426950408889634)
        if MASKED:
            allowed = (n < k_len)[None, :]
            if CAUSAL == 1:
                allowed = allowed & (n[None, :] <= m[:, None])
            if CAUSAL == 2:
                k_at = tl.load(k_positions + k_start + n, mask=n < k_len, other=0).to(tl.int32)
                allowed = allowed & (k_at[None, :] <= q_at[:, None])
            p = tl.where(allowed, p, 0.0)
        grad_p = tile_dot(g_MH, tl.trans(v_NH), None, PRECISION)
        grad_s = (p * (grad_p - delta_M[:, None])).to(k_NH.dtype)
        grad_q = tile_dot(grad_s, k_NH, grad_q, PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["sequences"])
def _queries(
    q,
    k,
    v,
    out,
    grad_out,
    lse,
    grad_lse,
    delta,
    grad_q,
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
    grad_row,
    grad_head,
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
    # Also writes delta = <out, grad_out> - grad_lse, which the other kernel reads, unless the
    # caller knows it (out is None).
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
    g_MH = tl.load(
        grad_out + rows[:, None] * grad_row + head * grad_head + h[None, :], mask=inside, other=0
    )
    at = head * queries + rows
    own = (rows[:, None] * heads + head) * HEAD + h[None, :]
    if out is None:
        delta_M = tl.load(delta + at, mask=m < q_len, other=0)
    else:
        o_MH = tl.load(out + own, mask=inside, other=0)
        delta_M = tl.sum(o_MH.to(tl.float32) * g_MH.to(tl.float32), 1)
        if grad_lse is not None:
            delta_M -= tl.load(grad_lse + at, mask=m < q_len, other=0)
        tl.store(delta + at, delta_M, mask=m < q_len)
    lse_M = tl.load(lse + at, mask=m < q_len, other=0)
    q_at = m
    if CAUSAL == 2:
        q_at = tl.load(q_positions + rows, mask=m < q_len, other=-1).to(tl.int32)
    full, end = visible_keys(
        block, q_start, q_len, k_start, k_len, q_positions, k_positions, CAUSAL, BLOCK_M, BLOCK_N
    )
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    k += head // group * k_head
    v += head // group * v_head
    total = _add_keys(
        total, q_MH, g_MH, lse_M, delta_M, k, v, k_row, v_row, m, q_at, k_start, k_len,
        k_positions, 0, full, scale, CAUSAL, False, HEAD, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    total = _add_keys(
        total, q_MH, g_MH, lse_M, delta_M, k, v, k_row, v_row, m, q_at, k_start, k_len,
        k_positions, full, end, scale, CAUSAL, True, HEAD, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    tl.store(grad_q + own, total * scale, mask=inside)


def query_blocks(
    head_dim: int, dtype: torch.dtype, max_queries: int, max_keys: int
) -> dict[str, int]:
    """Tiles of the kernel over queries. Chosen by registers and shared memory; not measured."""
    if INTERPRETED:
        return interpreted_blocks(max_queries, max_keys)
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    # Hopper's products take 64 rows; of 32, Triton makes those of the GPUs before.
    return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def key_blocks(
    head_dim: int, dtype: torch.dtype, max_queries: int, max_keys: int
) -> dict[str, int]:
    """Tiles of the kernel over keys. Chosen by registers and shared memory; not measured."""
    if INTERPRETED:
        return interpreted_blocks(max_queries, max_keys)
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if head_dim <= 128:
        return {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def launch(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    out: Tensor | None,
    lse_HQ: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    q_starts: Tensor,
    k_starts: Tensor,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    *,
    max_queries: int,
    max_keys: int,
    causal: int,
    delta_HQ: Tensor | None = None,
) -> None:
    """`adaptive.ops.operators.attention_backward`, into `grads` of q, k and v."""
    queries, heads, head_dim = q_QHh.shape
    keys, kv_heads, _ = k_TGh.shape
    grad_q, grad_k, grad_v = grads
    q_QHh, k_TGh, v_TGh, grad_out = (head_columns(x) for x in (q_QHh, k_TGh, v_TGh, grad_out))
    delta_HQ = torch.empty_like(lse_HQ) if delta_HQ is None else delta_HQ
    starts = (q_starts, k_starts, q_positions, k_positions)
    strides = [s for x in (q_QHh, k_TGh, v_TGh, grad_out) for s in x.stride()[:2]]
    scale = 1 / math.sqrt(head_dim)
    shapes = {
        "CAUSAL": causal,
        "HEAD": head_dim,
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": dot_precision(q_QHh.dtype),
    }
    sequences, group = q_starts.shape[0] - 1, heads // kv_heads
    with on_device(q_QHh):
        if queries:
            blocks = query_blocks(head_dim, q_QHh.dtype, max_queries, max_keys)
            grid = (block_grid(queries, sequences, max_queries, blocks["BLOCK_M"]), heads)
            _queries[grid](
                q_QHh, k_TGh, v_TGh, out, grad_out, lse_HQ,
                None if grad_lse is None else grad_lse.contiguous(), delta_HQ, grad_q,
                *starts, *strides, queries, sequences, heads, group, scale, **shapes, **blocks,
            )  # fmt: skip
        if keys:
            blocks = key_blocks(head_dim, q_QHh.dtype, max_queries, max_keys)
            grid = (block_grid(keys, sequences, max_keys, blocks["BLOCK_N"]), kv_heads)
            _keys_and_values[grid](
                q_QHh, k_TGh, v_TGh, grad_out, lse_HQ, delta_HQ, grad_k, grad_v,
                *starts, *strides, queries, sequences, kv_heads, group, scale, **shapes, **blocks,
            )  # fmt: skip
