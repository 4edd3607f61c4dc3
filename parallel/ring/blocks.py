"""Attention between the tokens of two ranks of a ring: a part of the softmax, and its gradients.

On a CPU a block is torch's flash attention, which keeps no scores; elsewhere plain torch, some rows
at a time. Kernels serve GPUs: `adaptive.ops.ring_attention`.

Shape legend: q and k rows of a block, H query heads, G key-value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.autocast import without_autocast
from parallel.ring.layout import Pair

LOWEST = torch.finfo(torch.float32).min

PLAIN_ROWS = 512
"""Queries whose scores plain torch keeps at once."""


class Blocks(NamedTuple):
    """What computes the part of two ranks: `attend` and `attend_backward` below, or kernels."""

    attend: Callable[[Tensor, Tensor, Tensor, Pair], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Pair], tuple[Tensor, Tensor, Tensor]
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Attention to one rank's keys alone [q, H, h], and its log-sum-exp [q, H]; zeros and -inf
    without any. In 32 bits at least, whatever the dtype of what is given."""
    q, k, v = wide(q), wide(k), wide(v)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    attend_block = _attend_fused if _fuses(q) else _attend_plain
    # Autocast would take 16 bits for the products of plain torch.
    with without_autocast(q.device.type):
        for rows, columns, seen in pair.blocks(_most_rows(q)):
            block, block_lse = attend_block(q[rows], k[columns], v[columns], seen)
            out[rows], lse[rows] = merge(out[rows], lse[rows], block, block_lse)
    return out, lse


def attend_backward(
    q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from the pairs of two ranks.

    Args:
        q, grad: queries and the gradient of their attention to all keys, [q, H, h].
        lse, delta: of attention to all keys: log-sum-exp, and the sum of out times grad, [q, H].
        k, v: [k, G, h].
        pair: whose they are.

    Returns:
        In 32 bits at least.
    """
    q, grad, k, v = wide(q), wide(grad), wide(k), wide(v)
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.clamp(min=LOWEST)
    backward_block = _backward_fused if _fuses(q) else _backward_plain
    with without_autocast(q.device.type):
        for rows, columns, seen in pair.blocks(_most_rows(q)):
            part_q, part_k, part_v = backward_block(
                q[rows], grad[rows], lse[rows], delta[rows], k[columns], v[columns], seen
            )
            grads[0][rows] += part_q
            grads[1][columns] += part_k
            grads[2][columns] += part_v
    return grads


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both."""
    both = torch.logaddexp(lse, part_lse)
    finite = both.clamp(min=LOWEST)
    out = out * (lse - finite).exp()[..., None] + part * (part_lse - finite).exp()[..., None]
    return out, both


def _fuses(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _most_rows(q: Tensor) -> int:
    """Rows of a block: where scores are kept, so many that they take little memory."""
    return max(q.shape[0], 1) if _fuses(q) else PLAIN_ROWS


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x[None] for x in (_heads(q, 1), _heads(k, group), _heads(v, group))),
        attn_mask=_added(seen, q),
        scale=q.shape[-1] ** -0.5,
    )
    lse = lse[0].t()
    if seen is not None:
        # Of a query without any key it says 0.
        lse = torch.where(seen.any(1)[:, None], lse, -torch.inf)
    return out[0].transpose(0, 1), lse


def _backward_fused(
    q: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    # Of the output torch's backward needs only delta, its sum with grad, and only delta
    # travelled here: any rows with that sum do, so a multiple of grad.
    largest = grad.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
    unit = grad / largest
    square = unit.square().sum(-1, keepdim=True).clamp(min=1)
    out = unit * (delta[..., None] / largest / square)
    q_grad, k_grad, v_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads(grad, 1)[None],
        *(x[None] for x in (_heads(q, 1), _heads(k, group), _heads(v, group), _heads(out, 1))),
        lse.t()[None],
        0.0,
        False,
        attn_mask=_added(seen, q),
        scale=q.shape[-1] ** -0.5,
    )
    q_grad, k_grad, v_grad = (x[0].transpose(0, 1) for x in (q_grad, k_grad, v_grad))
    return q_grad, _grouped(k_grad, group), _grouped(v_grad, group)


def _added(seen: Tensor | None, like: Tensor) -> Tensor | None:
    if seen is None:
        return None
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    scores_Hqk = _scores(q, k, seen)
    lse_Hq = scores_Hqk.logsumexp(-1)
    weights_Hqk = (scores_Hqk - lse_Hq.clamp(min=LOWEST)[..., None]).exp()
    return (weights_Hqk @ _heads(v, group)).transpose(0, 1), lse_Hq.t()


def _backward_plain(
    q: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    # Exact probabilities, from the log-sum-exp over all keys.
    p_Hqk = (_scores(q, k, seen) - lse.t()[..., None]).exp()
    grad_Hqh = grad.transpose(0, 1)
    grad_v = (p_Hqk.mT @ grad_Hqh).transpose(0, 1)
    grad_p = grad_Hqh @ _heads(v, group).mT
    grad_scores = p_Hqk * (grad_p - delta.t()[..., None]) * q.shape[-1] ** -0.5
    grad_q = (grad_scores @ _heads(k, group)).transpose(0, 1)
    grad_k = (grad_scores.mT @ q.transpose(0, 1)).transpose(0, 1)
    return grad_q, _grouped(grad_k, group), _grouped(grad_v, group)


def _scores(q_qHh: Tensor, k_kGh: Tensor, seen_qk: Tensor | None) -> Tensor:
    k_Hkh = _heads(k_kGh, q_qHh.shape[1] // k_kGh.shape[1])
    scores_Hqk = q_qHh.transpose(0, 1) @ k_Hkh.mT * q_qHh.shape[-1] ** -0.5
    return scores_Hqk if seen_qk is None else scores_Hqk.masked_fill(~seen_qk, -torch.inf)


def _heads(x_kGh: Tensor, group: int) -> Tensor:
    """[G·group, k, h]: every key-value head once for each of its query heads."""
    repeated = x_kGh if group == 1 else x_kGh.repeat_interleave(group, dim=1)
    return repeated.transpose(0, 1)


def _grouped(x_kHh: Tensor, group: int) -> Tensor:
    return x_kHh if group == 1 else x_kHh.unflatten(1, (-1, group)).sum(2)


def wide(x: Tensor) -> Tensor:
    """In 32 bits at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


TORCH = Blocks(attend, attend_backward)
