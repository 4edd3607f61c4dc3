"""Attention of a pack to itself, by libraries that wrote it well: flash-attn 3 and 2, torch's own.

They mask by place in the pack, so they serve `varlen_attention` without keys, not SkipLayer's
queries among all keys. None runs without a GPU; each is called only where it is installed.

Shape legend: Q packed tokens, H query heads, G key-value heads, h head width.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from adaptive.ops.backend import refuses_library
from adaptive.routing.layout import TokenLayout


def flash_attention_2(
    q_QHh: Tensor, k_QGh: Tensor, v_QGh: Tensor, *, layout: TokenLayout, causal: bool
) -> Tensor:
    """flash-attn 2's `flash_attn_varlen_func`."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q_QHh, k_QGh, v_QGh, **_boundaries(layout), causal=causal)


def flash_attention_3(
    q_QHh: Tensor, k_QGh: Tensor, v_QGh: Tensor, *, layout: TokenLayout, causal: bool
) -> Tensor:
    """flash-attn 3's `flash_attn_varlen_func` (Hopper only)."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(q_QHh, k_QGh, v_QGh, **_boundaries(layout), causal=causal)
    # Its first releases return the log-sum-exp too.
    return out[0] if isinstance(out, tuple) else out


def torch_attention(
    q_QHh: Tensor, k_QGh: Tensor, v_QGh: Tensor, *, layout: TokenLayout, causal: bool
) -> Tensor:
    """torch's `varlen_attn`, whose arguments changed from release to release."""
    from torch.nn.attention.varlen import varlen_attn

    known = _arguments_of_varlen_attn()
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    # Before it asked for this word, it shared key-value heads without being told.
    if q_QHh.shape[1] != k_QGh.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    starts, longest = layout.cu_seqlens, layout.max_seqlen
    out = varlen_attn(q_QHh, k_QGh, v_QGh, starts, starts, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple comes only with return_aux
    return out


def refuses_flash_2(q_QHh: Tensor) -> str | None:
    return refuses_library("flash_attn", q_QHh, half_only=True)


def refuses_flash_3(q_QHh: Tensor) -> str | None:
    refusal = refuses_library("flash_attn_interface", q_QHh, half_only=True)
    if refusal is None and torch.cuda.get_device_properties(q_QHh.device).major != 9:
        return "flash-attn 3 is for Hopper GPUs"
    return refusal


def refuses_torch(q_QHh: Tensor) -> str | None:
    return refuses_library("torch.nn.attention.varlen", q_QHh, half_only=True)


def refuses_heads(q_QHh: Tensor) -> str | None:
    """What none of them takes."""
    if q_QHh.shape[0] == 0:
        return "no tokens"
    width = q_QHh.shape[2]
    return (
        None if width <= 256 and width % 8 == 0 else f"head width {width}: a multiple of 8, ≤ 256"
    )


def _boundaries(layout: TokenLayout) -> dict[str, Any]:
    return {
        "cu_seqlens_q": layout.cu_seqlens,
        "cu_seqlens_k": layout.cu_seqlens,
        "max_seqlen_q": layout.max_seqlen,
        "max_seqlen_k": layout.max_seqlen,
    }


@functools.cache
def _arguments_of_varlen_attn() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
