"""ring_attention: attention of sequences that lie over ranks, each part by the fastest that serves.

Shape legend: t tokens of this rank, s rows of keys, H query heads, G key-value heads, h head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.ops.backend import choose, refuses_triton, register
from adaptive.ops.operators import attention_backward, attention_forward
from parallel.ring.attention import RingLayout, Scheme
from parallel.ring.attention import ring_attention as attend_round
from parallel.ring.blocks import TORCH, Blocks
from parallel.ring.layout import Pair


def ring_attention(
    q_tHh: Tensor,
    k_sGh: Tensor,
    v_sGh: Tensor,
    layout: RingLayout,
    *,
    keys: RingLayout | None = None,
    scheme: Scheme = "queries",
) -> Tensor:
    """`parallel.ring.attention.ring_attention`, with our kernels where they serve.

    A kernel keeps no scores and multiplies in the dtype of what is given; outputs of parts, their
    log-sum-exp and gradients are merged in 32 bits. Tokens of a rank must lie sequence after
    sequence (`RingLayout.ordered`); plain torch computes where they do not.
    """
    blocks: Blocks = choose("ring_attention", q_tHh).function()
    return attend_round(q_tHh, k_sGh, v_sGh, layout, keys=keys, scheme=scheme, blocks=blocks)


def _attend(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    if not pair.ordered:
        return TORCH.attend(q, k, v, pair)
    if not pair.sees:
        out = torch.zeros_like(q, dtype=torch.float32)
        return out, out.new_full(out.shape[:2], -torch.inf)
    out, lse_Hq = attention_forward(q, k, v, *_visibility(q, k, pair), part=True)
    return out, lse_Hq.t()


def _backward(
    q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    if not pair.ordered:
        return TORCH.backward(q, grad, lse, delta, k, v, pair)
    if not pair.sees:
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        return grad_q, grad_k, grad_v
    by_head = lse.t().contiguous(), *_visibility(q, k, pair)
    return attention_backward(grad, None, q, k, v, None, *by_head, delta_HQ=delta.t().contiguous())


def _visibility(
    q: Tensor, k: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, int]:
    """Boundaries, positions where order matters, longest sequences (no more than known), mode."""
    q_positions = k_positions = None
    if pair.query_layout.causal:
        q_positions = pair.query_layout.positions[pair.queries]
        k_positions = pair.key_layout.positions[pair.keys]
    mode = 2 if pair.query_layout.causal else 0
    return *pair.starts(), q_positions, k_positions, q.shape[0], k.shape[0], mode


def _refuses_heads(q_tHh: Tensor) -> str | None:
    if q_tHh.shape[2] > 256:
        return f"head width {q_tHh.shape[2]}: at most 256"
    return None


register("ring_attention", "reference", lambda: TORCH)
register(
    "ring_attention",
    "triton",
    lambda: Blocks(_attend, _backward),
    refuses_triton,
    _refuses_heads,
)
