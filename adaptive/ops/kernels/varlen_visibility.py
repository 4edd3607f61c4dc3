"""Which keys a block of queries sees, and which queries see a block of keys.

Positions are read where they lie, in any order within a sequence: the ranges below are the
smallest that hold every visible pair, and the largest in which no pair is hidden.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.launching import cdiv, device_function, next_power_of_2

# mypy: disable-error-code="no-untyped-def"


def head_columns(x_THh: Tensor) -> Tensor:
    """x itself if the channels of a head are adjacent, else a copy."""
    return x_THh if x_THh.stride(-1) == 1 else x_THh.contiguous()


def interpreted_blocks(max_queries: int, max_keys: int) -> dict[str, int]:
    """Tiles of every attention kernel where they run interpreted: few, as heads make many programs.

    The kernels' own tests ask for smaller ones.
    """
    m, n = (max(16, min(next_power_of_2(length), 128)) for length in (max_queries, max_keys))
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1}


def block_grid(rows: int, sequences: int, longest: int, block: int) -> int:
    """The most row blocks there can be: no block holds rows of two sequences."""
    return min(rows // block + sequences, sequences * cdiv(longest, block))


@device_function
def sequence_of(starts, sequences, tile, BLOCK: tl.constexpr):
    """(sequence, block inside it) of a row block; sequence = `sequences` if there is none.

    Only the device knows the lengths, so programs are as many as there could be blocks.
    """
    found = tile * 0
    before = tile * 0
    skipped = tile * 0
    for first in range(0, sequences, 1024):
        s = first + tl.arange(0, 1024)
        inside = s < sequences
        start = tl.load(starts + s, mask=inside, other=0)
        length = tl.load(starts + s + 1, mask=inside, other=0) - start
        blocks = ((length + BLOCK - 1) // BLOCK).to(tl.int32)
        passed = (before + tl.cumsum(blocks, 0) <= tile) & inside
        found += tl.sum(passed.to(tl.int32), 0)
        skipped += tl.sum(tl.where(passed, blocks, 0), 0)
        before += tl.sum(blocks, 0)
    return found, tile - skipped


@device_function
def visible_keys(
    block,
    q_start,
    q_len,
    k_start,
    k_len,
    q_positions,
    k_positions,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(full, end): of a block of queries, every one sees keys [0, full), none sees [end, …).

    `full` is a multiple of BLOCK_N. CAUSAL: 0 no, 1 by place in the pack, 2 by position.
    """
    full = k_len
    end = k_len
    if CAUSAL == 1:
        end = tl.minimum(k_len, (block + 1) * BLOCK_M)
        full = tl.minimum(k_len, block * BLOCK_M + 1)
    if CAUSAL == 2:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        far = 0x7FFFFFFF
        at = tl.load(q_positions + q_start + m, mask=m < q_len, other=-1).to(tl.int32)
        highest = tl.max(at, 0)
        lowest = tl.min(tl.where(m < q_len, at, far), 0)
        end = k_len * 0
        for start in range(0, k_len, 1024):
            j = start + tl.arange(0, 1024)
            key_at = tl.load(k_positions + k_start + j, mask=j < k_len, other=far).to(tl.int32)
            end = tl.maximum(end, tl.max(tl.where((key_at <= highest) & (j < k_len), j + 1, 0), 0))
            full = tl.minimum(full, tl.min(tl.where(key_at > lowest, j, k_len), 0))
    full = tl.minimum(full, end) // BLOCK_N * BLOCK_N
    return full, end


@device_function
def visible_queries(
    block,
    q_start,
    q_len,
    k_start,
    k_len,
    q_positions,
    k_positions,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first, full): of a block of keys, no query before `first` sees any, every one from `full`
    on sees all. Both are multiples of BLOCK_M.
    """
    first = q_len * 0
    full = q_len * 0
    if CAUSAL == 1:
        first = tl.minimum(block * BLOCK_N, q_len)
        full = tl.minimum((block + 1) * BLOCK_N - 1, q_len)
    if CAUSAL == 2:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        far = 0x7FFFFFFF
        at = tl.load(k_positions + k_start + n, mask=n < k_len, other=far).to(tl.int32)
        lowest = tl.min(at, 0)
        highest = tl.max(tl.where(n < k_len, at, -1), 0)
        first = q_len
        for start in range(0, q_len, 1024):
            i = start + tl.arange(0, 1024)
            query_at = tl.load(q_positions + q_start + i, mask=i < q_len, other=far).to(tl.int32)
            sees = (query_at >= lowest) & (i < q_len)
            first = tl.minimum(first, tl.min(tl.where(sees, i, q_len), 0))
            full = tl.maximum(full, tl.max(tl.where(query_at < highest, i + 1, 0), 0))
    first = first // BLOCK_M * BLOCK_M
    full = tl.maximum((full + BLOCK_M - 1) // BLOCK_M * BLOCK_M, first)
    return first, full
