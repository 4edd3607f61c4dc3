"""Attention between the tokens of two ranks of a ring: a part of the softmax, and its gradients.

A rank's tokens come in two halves (of a zigzag order, the early and the late chunk), so that of
four blocks of pairs those that cannot see each other are left out. On a CPU a block is torch's
flash attention, which keeps no scores; elsewhere plain torch, some rows at a time.

Shape legend: q and k rows of a block, H query heads, G key-value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sequence import all_gather_rows

Bounds = tuple[int, int, int, int, int, int]
"""Of half a rank's tokens: rows from and to, lowest and highest position and sequence."""

LOWEST = torch.finfo(torch.float32).min

PLAIN_ROWS = 512
"""Queries whose scores plain torch keeps at once."""


def zigzag_rows(tokens: int, ranks: int, rank: int) -> Tensor:
    """int64: which tokens a rank holds so that causal attention is even: chunk r and its mirror.

    Of 2n equal chunks, rank r holds chunks r and 2n - 1 - r: as many early tokens, which see
    little, as late ones, which see much.
    """
    chunks = torch.arange(tokens).tensor_split(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


@dataclass(frozen=True)
class RingLayout:
    """Who holds which tokens; made once for all layers of a forward.

    Attributes:
        group: the ranks of the ring.
        sizes: tokens of each rank.
        positions, sequences: int64 of each rank's tokens: place in the own sequence, and which.
        causal: a token sees itself and what is before it in its sequence.
        bounds: for every rank, of each half of its tokens, known to the host, to skip pairs that
            cannot see each other.
    """

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    positions: list[Tensor]
    sequences: list[Tensor]
    causal: bool
    bounds: list[list[Bounds]]

    @staticmethod
    def create(
        positions_t: Tensor, sequences_t: Tensor, group: dist.ProcessGroup, *, causal: bool = True
    ) -> RingLayout:
        """From what each rank knows of its own tokens. A collective over the group; synchronises
        with the host twice."""
        ranks = dist.get_world_size(group)
        count = positions_t.new_full((1,), positions_t.shape[0], dtype=torch.int64)
        sizes = tuple(all_gather_rows(count, group, (1,) * ranks).tolist())
        both = all_gather_rows(torch.stack([positions_t, sequences_t], 1), group, sizes)
        return RingLayout.of(both[:, 0], both[:, 1], sizes, group, causal=causal)

    @staticmethod
    def of(
        positions_T: Tensor,
        sequences_T: Tensor,
        sizes: tuple[int, ...],
        group: dist.ProcessGroup,
        *,
        causal: bool = True,
    ) -> RingLayout:
        """From what every rank knows of all tokens, which lie over the ranks in this order.
        Synchronises with the host once."""
        positions, sequences = positions_T.split(list(sizes)), sequences_T.split(list(sizes))
        bounds = _bounds(positions_T, sequences_T, sizes)
        return RingLayout(group, sizes, list(positions), list(sequences), causal, bounds)

    def pairs(self, queries: int, keys: int) -> int:
        """Query-key pairs that are computed between two ranks' tokens."""
        return sum(
            (q[1] - q[0]) * (k[1] - k[0])
            for q in self.bounds[queries]
            for k in self.bounds[keys]
            if _may_see(q, k, self.causal)
        )


@dataclass(frozen=True)
class Pair:
    """The tokens of two ranks: rank `queries` of one layout, rank `keys` of the other."""

    query_layout: RingLayout
    key_layout: RingLayout
    queries: int
    keys: int

    def blocks(self, most_rows: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(rows, columns, bool [q, k] or None) of the halves that can see each other."""
        causal = self.query_layout.causal
        for q in self.query_layout.bounds[self.queries]:
            for k in self.key_layout.bounds[self.keys]:
                if not _may_see(q, k, causal):
                    continue
                columns = slice(k[0], k[1])
                one_sequence = q[4] == q[5] == k[4] == k[5]
                masks = not one_sequence or (causal and q[2] < k[3])
                for start in range(q[0], q[1], most_rows):
                    rows = slice(start, min(start + most_rows, q[1]))
                    yield rows, columns, self._seen(rows, columns) if masks else None

    def _seen(self, rows: slice, columns: slice) -> Tensor:
        q_sequence = self.query_layout.sequences[self.queries][rows, None]
        seen = q_sequence == self.key_layout.sequences[self.keys][None, columns]
        if self.query_layout.causal:
            q_position = self.query_layout.positions[self.queries][rows, None]
            seen = seen & (self.key_layout.positions[self.keys][None, columns] <= q_position)
        return seen


def attend(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Attention to one rank's keys alone [q, H, h], and its log-sum-exp [q, H]; zeros and -inf
    without any."""
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    attend_block = _attend_fused if _fuses(q) else _attend_plain
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
    """
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.clamp(min=LOWEST)
    backward_block = _backward_fused if _fuses(q) else _backward_plain
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


def _may_see(q: Bounds, k: Bounds, causal: bool) -> bool:
    if q[4] > k[5] or k[4] > q[5]:
        return False
    one_sequence = q[4] == q[5] == k[4] == k[5]
    return not (causal and one_sequence and q[3] < k[2])


def _bounds(positions_T: Tensor, sequences_T: Tensor, sizes: tuple[int, ...]) -> list[list[Bounds]]:
    """Of the two halves of each rank's tokens, without those that are empty."""
    halves: list[list[tuple[int, int]]] = []
    extremes: list[Tensor] = []
    start = 0
    for size in sizes:
        middle = (size + 1) // 2
        halves.append([(a, b) for a, b in ((0, middle), (middle, size)) if a < b])
        for first, last in halves[-1]:
            rows = slice(start + first, start + last)
            for values in (positions_T[rows], sequences_T[rows]):
                extremes += values.aminmax()
        start += size
    known = iter(torch.stack(extremes).tolist() if extremes else [])
    return [[(a, b, *(next(known) for _ in range(4))) for a, b in own] for own in halves]
