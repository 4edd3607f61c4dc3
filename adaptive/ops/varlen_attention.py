"""Attention over packed sequences of different lengths.

Shape legend: Q packed queries, T packed keys, H query heads, G key-value heads (H = G * group),
h head width, B sequences.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register
from adaptive.ops.library_attention import (
    flash_attention_2,
    flash_attention_3,
    refuses_flash_2,
    refuses_flash_3,
    refuses_heads,
    refuses_torch,
    torch_attention,
)
from adaptive.ops.operators import attention_backward, attention_forward
from adaptive.routing.layout import TokenLayout
from parallel.autocast import computing_dtype


def varlen_attention(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    *,
    queries: TokenLayout,
    keys: TokenLayout | None = None,
    causal: bool = True,
    key_bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of every query to the keys of its own sequence.

    Args:
        q_QHh: [queries, heads, head width].
        k_TGh, v_TGh: [keys, key-value heads, head width]; heads must be a multiple.
        queries: where the queries came from.
        keys: where the keys came from, or None when they are the queries' own tokens. Both
            layouts must have the same sequences in the same order.
        causal: with `keys=None`, a token attends to itself and the tokens before it in the pack;
            with `keys`, to keys whose *position* is not greater than its own. A query with no
            such key gets zeros.
        key_bias: [keys] or None, finite, differentiable: added to every score of a key. log of a
            key's size makes attention that of so many equal keys ("proportional attention", ToMe,
            arXiv 2210.09461, section 3).
        window: with `causal`, keys are seen whose position is among the `window` that end with the
            query's own; None: all earlier ones. Computed by the reference alone.

    Returns:
        [queries, heads, head width], scaled by 1/sqrt(head width).
    """
    if q_QHh.shape[1] % k_TGh.shape[1]:
        raise ValueError(
            f"heads={q_QHh.shape[1]}: must be a multiple of key-value heads {k_TGh.shape[1]}"
        )
    if key_bias is not None:
        width = q_QHh.shape[2]
        q_QHh, k_TGh, v_TGh = with_key_bias(q_QHh, k_TGh, v_TGh, key_bias)
        out_QHh = varlen_attention(
            q_QHh, k_TGh, v_TGh, queries=queries, keys=keys, causal=causal, window=window
        )
        return out_QHh[..., :width]
    if window is not None:
        keys = queries if keys is None else keys
        return _windowed(q_QHh, k_TGh, v_TGh, queries=queries, keys=keys, window=window)
    if torch.compiler.is_dynamo_compiling() and not (keys is None and queries.uniform):
        # Lengths are read, and loops go over them: a graph for each batch.
        return _uncompiled(q_QHh, k_TGh, v_TGh, queries=queries, keys=keys, causal=causal)
    op = "varlen_attention" if keys is None else "varlen_cross_attention"
    function = choose(op, q_QHh).function
    if keys is None:
        return function(q_QHh, k_TGh, v_TGh, layout=queries, causal=causal)
    return function(q_QHh, k_TGh, v_TGh, queries=queries, keys=keys, causal=causal)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler here
def _uncompiled(*qkv: Tensor, **options: Any) -> Tensor:
    return varlen_attention(*qkv, **options)


@torch._disable_dynamo  # lengths are read, and loops go over them
def _windowed(*qkv: Tensor, queries: TokenLayout, keys: TokenLayout, window: int) -> Tensor:
    return _cross_reference(*qkv, queries=queries, keys=keys, causal=True, window=window)


def with_key_bias(
    q_QHh: Tensor, k_TGh: Tensor, v_TGh: Tensor, key_bias_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of heads 8 wider, whose attention adds the bias to the scores.

    Exact for every implementation, and the bias travels with its keys between ranks. With
    h' = h + 8, q' = [q √(h'/h), √h', √h', 0 …], k' = [k, high, low, 0 …], v' = [v, 0 …] have the
    scores q·k/√h + bias under the scale 1/√h'. High and low are the bias in two numbers of the
    keys' dtype: one of 16 bits would round log sizes by up to 0.015.

    Returns:
        Cut the attention's output back to the first h channels.
    """
    if key_bias_T.shape != k_TGh.shape[:1]:
        raise ValueError(
            f"key_bias of shape {list(key_bias_T.shape)}: must be [{k_TGh.shape[0]}], one a key"
        )
    width = q_QHh.shape[2]
    wider = width + _BIAS_COLUMNS
    high_T = key_bias_T.to(k_TGh.dtype)
    low_T = (key_bias_T - high_T.detach().to(key_bias_T.dtype)).detach().to(k_TGh.dtype)
    ones = torch.zeros(_BIAS_COLUMNS, dtype=q_QHh.dtype, device=q_QHh.device)
    ones[:2] = math.sqrt(wider)
    columns_T8 = F.pad(torch.stack([high_T, low_T], -1), (0, _BIAS_COLUMNS - 2))
    q_QHh = torch.cat([q_QHh * math.sqrt(wider / width), ones.expand(*q_QHh.shape[:2], -1)], -1)
    k_TGh = torch.cat([k_TGh, columns_T8[:, None].expand(-1, k_TGh.shape[1], -1)], -1)
    return q_QHh, k_TGh, F.pad(v_TGh, (0, _BIAS_COLUMNS))


# Libraries take head widths that are multiples of 8.
_BIAS_COLUMNS = 8


def _self_reference(
    q_QHh: Tensor, k_QGh: Tensor, v_QGh: Tensor, *, layout: TokenLayout, causal: bool
) -> Tensor:
    """One SDPA over a uniform layout, else one a segment."""
    if layout.tokens == 0:
        return q_QHh + 0 * (k_QGh.sum() + v_QGh.sum())
    if layout.uniform:
        shape = (layout.batch_size, layout.max_seqlen)
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_QHh, k_QGh, v_QGh))
        return _sdpa(q, k, v, causal=causal).transpose(1, 2).flatten(0, 1)
    lengths = layout.cu_seqlens.diff().tolist()
    segments = zip(q_QHh.split(lengths), k_QGh.split(lengths), v_QGh.split(lengths), strict=True)
    out = [
        _sdpa(*(x.transpose(0, 1)[None] for x in qkv), causal=causal)[0].transpose(0, 1)
        for qkv in segments
        if qkv[0].shape[0]
    ]
    return torch.cat(out)


def _cross_reference(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    *,
    queries: TokenLayout,
    keys: TokenLayout,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """Masked SDPAs, a few for each segment; a query without any key gets zeros.

    With `causal`, queries go in chunks, and a chunk meets only the keys from its first window up to
    its last position: most of what a mask over the whole segment would throw away is not computed.
    """
    q_lengths, k_lengths = queries.cu_seqlens.diff().tolist(), keys.cu_seqlens.diff().tolist()
    pieces = zip(
        q_QHh.split(q_lengths),
        k_TGh.split(k_lengths),
        v_TGh.split(k_lengths),
        queries.positions.split(q_lengths),
        keys.positions.split(k_lengths),
        strict=True,
    )
    out = []
    for q, k, v, q_position, k_position in pieces:
        if q.shape[0] == 0:
            continue
        if k.shape[0] == 0:
            out.append(torch.zeros_like(q))
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        if causal:
            attended = _attend_in_chunks(q, k, v, q_position, k_position, window)
        else:
            attended = _sdpa(q, k, v)
        out.append(attended[0].transpose(0, 1))
    # An empty result still depends on every input, so that each has a (zero) gradient.
    if out and min(q_lengths) > 0:
        return torch.cat(out)
    return (torch.cat(out) if out else q_QHh) + k_TGh[:0].sum() + v_TGh[:0].sum()


def _attend_in_chunks(
    q_BHQh: Tensor,
    k_BGSh: Tensor,
    v_BGSh: Tensor,
    q_position: Tensor,
    k_position: Tensor,
    window: int | None,
) -> Tensor:
    """Attention to the keys whose position is not greater, `_QUERY_CHUNK` queries at a time."""
    queries = q_BHQh.split(_QUERY_CHUNK, dim=2)
    positions = q_position.split(_QUERY_CHUNK)
    # Behind the place where every later key lies after a chunk's last query, nothing is needed.
    later = k_position.flip(0).cummin(0).values.flip(0)
    last = torch.stack([position.max() for position in positions])
    bounds = [torch.searchsorted(later, last, right=True)]
    if window is not None:  # nor what lies before its first query's window
        first = torch.stack([position.min() for position in positions])
        earlier = k_position.cummax(0).values
        bounds.append(torch.searchsorted(earlier, first - window, right=True))
    ends, *starts = torch.stack(bounds).tolist()
    out = []
    for number, (q, position) in enumerate(zip(queries, positions, strict=True)):
        start, end = starts[0][number] if starts else 0, ends[number]
        if end <= start:
            out.append(torch.zeros_like(q))
            continue
        behind = position[:, None] - k_position[None, start:end]
        allowed = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        keys, values = k_BGSh[:, :, start:end], v_BGSh[:, :, start:end]
        attended = _sdpa(q, keys, values, allowed=allowed)
        out.append(torch.where(allowed.any(1)[:, None], attended, 0))
    return torch.cat(out, dim=2)


def _sdpa(
    q_BHSh: Tensor,
    k_BGSh: Tensor,
    v_BGSh: Tensor,
    *,
    causal: bool = False,
    allowed: Tensor | None = None,
) -> Tensor:
    group = q_BHSh.shape[1] // k_BGSh.shape[1]
    if group > 1:
        k_BGSh, v_BGSh = (x.repeat_interleave(group, dim=1) for x in (k_BGSh, v_BGSh))
    return F.scaled_dot_product_attention(
        q_BHSh,
        k_BGSh,
        v_BGSh,
        attn_mask=allowed,
        is_causal=causal,
        scale=1 / math.sqrt(q_BHSh.shape[-1]),
    )


# Measured on one CPU thread, 8 heads of 64, segments of 256 and 512: 32 and 128 are slower.
_QUERY_CHUNK = 64


class _Visibility(NamedTuple):
    """Sequence boundaries, positions (None unless by position), longest sequences, causal mode.

    Modes: 0 every key of the sequence, 1 keys up to one's own place in the pack, 2 keys whose
    position is not greater.
    """

    q_starts: Tensor
    k_starts: Tensor
    q_positions: Tensor | None
    k_positions: Tensor | None
    max_queries: int
    max_keys: int
    causal: int


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_QHh: Tensor, k_TGh: Tensor, v_TGh: Tensor, visibility: _Visibility
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(q_QHh, k_TGh, v_TGh, *visibility)
        ctx.save_for_backward(q_QHh, k_TGh, v_TGh, out, lse)
        ctx.visibility = visibility
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q_QHh, k_TGh, v_TGh, out, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return None, None, None, None
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grads = attention_backward(
            grad_out, grad_lse, q_QHh, k_TGh, v_TGh, out, lse, *ctx.visibility
        )
        return *grads, None


def attention_with_lse(
    q_QHh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    *,
    queries: TokenLayout,
    keys: TokenLayout | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `varlen_attention` by our kernels, and the log-sum-exp float32 [H, Q], differentiable.

    Outputs over parts of the keys can be joined with it: that is what ring attention does.
    """
    by_position = causal and keys is not None
    keys = queries if keys is None else keys
    visibility = _Visibility(
        queries.cu_seqlens.contiguous(),
        keys.cu_seqlens.contiguous(),
        queries.positions.contiguous() if by_position else None,
        keys.positions.contiguous() if by_position else None,
        queries.max_seqlen,
        keys.max_seqlen,
        2 if by_position else int(causal),
    )
    dtype = computing_dtype(q_QHh)
    return _Kernel.apply(q_QHh.to(dtype), k_TGh.to(dtype), v_TGh.to(dtype), visibility)


def _self_kernel(
    q_QHh: Tensor, k_QGh: Tensor, v_QGh: Tensor, *, layout: TokenLayout, causal: bool
) -> Tensor:
    return attention_with_lse(q_QHh, k_QGh, v_QGh, queries=layout, causal=causal)[0]


def _cross_kernel(*qkv: Tensor, queries: TokenLayout, keys: TokenLayout, causal: bool) -> Tensor:
    return attention_with_lse(*qkv, queries=queries, keys=keys, causal=causal)[0]


def _refuses_heads(q_QHh: Tensor) -> str | None:
    if q_QHh.shape[2] > 256:
        return f"head width {q_QHh.shape[2]}: at most 256"
    return None


register("varlen_attention", "reference", _self_reference)
register("varlen_attention", "triton", _self_kernel, refuses_triton, _refuses_heads)
register("varlen_attention", "torch", torch_attention, refuses_torch, refuses_heads)
register("varlen_attention", "flash", flash_attention_2, refuses_flash_2, refuses_heads)
register("varlen_attention", "flash", flash_attention_3, refuses_flash_3, refuses_heads)
register("varlen_cross_attention", "reference", _cross_reference)
register("varlen_cross_attention", "triton", _cross_kernel, refuses_triton, _refuses_heads)
