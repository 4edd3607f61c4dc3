"""Attention in which a key counts by a mask of 0 and 1 that has a gradient, at 0 too.

Shape legend: B sequences, S tokens of each, T = B·S, H heads, h head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.routing.layout import TokenLayout

# Above the greatest score of a kept key, a masked one's exponential is cut: its value is times 0.
_MOST = 20.0


def masked_attention(
    q_THh: Tensor,
    k_THh: Tensor,
    v_THh: Tensor,
    *,
    layout: TokenLayout,
    key_mask: Tensor,
    key_bias: Tensor | None = None,
) -> Tensor:
    """`softmax_m(a)_j = m_j e^(a_j) / Σ m e^a`, bidirectional: values are those of kept keys alone.

    Unlike a bias of log m, the gradient of a masked key's m is what counting it would change. For
    training that decides what to drop; all pairs are computed.

    Args:
        q_THh, k_THh, v_THh: [T, heads, head width], as many heads each.
        layout: of sequences of one length.
        key_mask: float [T], 0 or 1, differentiable; at least one 1 in every sequence.
        key_bias: [T] or None, finite, added to every score of a key.

    Returns:
        [T, heads, head width], scores scaled by 1/sqrt(head width).

    Raises:
        ValueError: if the sequences differ in length.

    Source: DynamicViT, arXiv 2106.02034, section 3.3; LTMP, arXiv 2305.10780 (both add ε/S, so
    that a sequence may lose every key; here none does, and training computes what is evaluated).
    """
    if not layout.uniform:
        raise ValueError("sequences of different lengths: must be of one, to be masked")
    shape = (layout.batch_size, layout.max_seqlen)
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_THh, k_THh, v_THh))
    scores = q @ k.transpose(2, 3) * q_THh.shape[-1] ** -0.5
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype).unflatten(0, shape)[:, None, None]
    mask_B11S = key_mask.to(scores.dtype).unflatten(0, shape)[:, None, None]
    most = scores.detach().masked_fill(mask_B11S == 0, -torch.inf).amax(-1, keepdim=True)
    counted = (scores - most).clamp(max=_MOST).exp() * mask_B11S
    shares = counted / counted.sum(-1, keepdim=True)
    return (shares @ v).transpose(1, 2).flatten(0, 1)
