"""Ring attention: exact attention of sequences that lie over ranks, a block of pairs at a time.

Two schemes. "keys", plain ring attention: keys and values travel round the ring, results stay.
"queries", TokenRing's: queries travel one way and partial outputs, with their log-sum-exp, go back
to their owners the other way, so that both directions of a link are at work, and in the backward
the sums of key and value gradients never move.

Shape legend: t tokens of this rank, s those of another, H query heads, G key-value heads,
h head width, n ranks.

What travels keeps its dtype; sums, and everything that is computed, have 32 bits.

Sources: Ring Attention, arXiv 2310.01889; TokenRing, arXiv 2412.20501; zigzag order as in striped
and balanced variants (arXiv 2311.09431).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.cost import ring_bytes
from parallel.ring.blocks import TORCH, Blocks, merge, wide
from parallel.ring.layout import Pair, RingLayout, zigzag_rows

__all__ = ["RingLayout", "Scheme", "cheaper_scheme", "ring_attention", "zigzag_rows"]

Scheme = Literal["queries", "keys"]


def ring_attention(
    q_tHh: Tensor,
    k_sGh: Tensor,
    v_sGh: Tensor,
    layout: RingLayout,
    *,
    keys: RingLayout | None = None,
    scheme: Scheme = "queries",
    blocks: Blocks = TORCH,
) -> Tensor:
    """Softmax attention of this rank's tokens to all tokens of their sequences, on any rank.

    Args:
        q_tHh, k_sGh, v_sGh: of this rank's tokens; H must be a multiple of G.
        layout: who holds which queries.
        keys: who holds which keys and values; None: the queries' own tokens.
        scheme: what travels; the results are the same.
        blocks: what computes the part of two ranks (`adaptive.ops.ring_attention` chooses).

    Returns:
        [t, H, h], scaled by 1/sqrt(h). A collective, backward too.
    """
    if q_tHh.shape[1] % k_sGh.shape[1]:
        raise ValueError(
            f"heads={q_tHh.shape[1]}: must be a multiple of key-value heads {k_sGh.shape[1]}"
        )
    if scheme not in ("queries", "keys"):
        raise ValueError(f"scheme={scheme!r}: must be queries or keys")
    function = _QueriesTravel if scheme == "queries" else _KeysTravel
    keys = layout if keys is None else keys
    return function.apply(q_tHh, k_sGh, v_sGh, layout, keys, blocks)


def cheaper_scheme(heads: float, kv_heads: float, head_dim: int, ranks: int) -> Scheme:
    """The scheme that sends fewer bytes: with few key-value heads, keys travel."""
    bytes_sent = partial(ring_bytes, ranks, heads, kv_heads, head_dim, ranks)
    return "keys" if bytes_sent(scheme="keys") < bytes_sent(scheme="queries") else "queries"


class _QueriesTravel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_tHh: Tensor,
        k_sGh: Tensor,
        v_sGh: Tensor,
        layout: RingLayout,
        keys: RingLayout,
        blocks: Blocks,
    ) -> Tensor:
        ring = _Ring(layout)
        held, rows = q_tHh, q_tHh.shape[0]
        out, lse = _empty_attention(q_tHh)
        for step in range(ring.ranks):
            owner = (ring.rank - step) % ring.ranks
            following = ring.send(held, step)
            part = blocks.attend(held, k_sGh, v_sGh, Pair(layout, keys, owner, ring.rank))
            if step:
                joined = torch.cat([part[0], part[1][..., None]], -1)
                joined = ring.return_to(owner, joined, rows, step)
                part = joined[..., :-1], joined[..., -1]
            out, lse = merge(out, lse, *part)
            held = following()
        ctx.save_for_backward(q_tHh, k_sGh, v_sGh, out, lse)
        ctx.layout, ctx.keys, ctx.blocks = layout, keys, blocks
        return out.to(q_tHh.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tHh: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, keys = ctx.layout, ctx.keys
        ring = _Ring(layout)
        delta = (wide(grad_tHh) * out).sum(-1)
        # Two messages: the pairs as they are, their sums in 32 bits.
        held = torch.cat([q, grad_tHh.to(q.dtype)], -1)
        held_sums = torch.stack([lse, delta], -1)
        rows = q.shape[0]
        grad_q = torch.zeros_like(out)
        grad_k, grad_v = torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
        for step in range(ring.ranks):
            owner = (ring.rank - step) % ring.ranks
            following, following_sums = ring.send(held, step), ring.send(held_sums, step)
            q_part, grad_part = held.chunk(2, -1)
            lse_part, delta_part = held_sums.unbind(-1)
            pair = Pair(layout, keys, owner, ring.rank)
            part_q, part_k, part_v = ctx.blocks.backward(
                q_part, grad_part, lse_part, delta_part, k, v, pair
            )
            grad_k, grad_v = grad_k + part_k, grad_v + part_v
            if step:
                part_q = ring.return_to(owner, part_q, rows, step)
            grad_q = grad_q + part_q
            held, held_sums = following(), following_sums()
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


class _KeysTravel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_tHh: Tensor,
        k_sGh: Tensor,
        v_sGh: Tensor,
        layout: RingLayout,
        keys: RingLayout,
        blocks: Blocks,
    ) -> Tensor:
        ring = _Ring(keys)
        held = torch.cat([k_sGh, v_sGh], -1)
        out, lse = _empty_attention(q_tHh)
        for step in range(ring.ranks):
            following = ring.send(held, step)
            k, v = held.chunk(2, -1)
            owner = (ring.rank - step) % ring.ranks
            part = blocks.attend(q_tHh, k, v, Pair(layout, keys, ring.rank, owner))
            out, lse = merge(out, lse, *part)
            held = following()
        ctx.save_for_backward(q_tHh, k_sGh, v_sGh, out, lse)
        ctx.layout, ctx.keys, ctx.blocks = layout, keys, blocks
        return out.to(q_tHh.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tHh: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, keys = ctx.layout, ctx.keys
        ring = _Ring(keys)
        grad = grad_tHh.to(q.dtype)
        delta = (wide(grad_tHh) * out).sum(-1)
        held = torch.cat([k, v], -1)
        # What the keys' gradients are so far travels one step behind the keys themselves.
        sums = torch.zeros_like(wide(held))
        grad_q = torch.zeros_like(out)
        for step in range(ring.ranks):
            following = ring.send(held, step)
            owner = (ring.rank - step) % ring.ranks
            k_part, v_part = held.chunk(2, -1)
            pair = Pair(layout, keys, ring.rank, owner)
            part_q, part_k, part_v = ctx.blocks.backward(q, grad, lse, delta, k_part, v_part, pair)
            grad_q = grad_q + part_q
            sums = ring.shift(sums + torch.cat([part_k, part_v], -1), step)
            held = following()
        grad_k, grad_v = sums.chunk(2, -1)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


class _Ring:
    """Messages between neighbours, and back to owners."""

    def __init__(self, layout: RingLayout) -> None:
        self.group, self.sizes = layout.group, layout.sizes
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)

    def send(self, held: Tensor, step: int) -> Any:
        """Start sending `held` to the next rank; returns a function that waits for the one to
        come. At the last step nothing moves."""
        if step == self.ranks - 1:
            return lambda: held
        came_from = (self.rank - step - 1) % self.ranks
        return self._start(held, self.rank + 1, self.rank - 1, self.sizes[came_from])

    def shift(self, held: Tensor, step: int) -> Tensor:
        """Send to the next rank, at every step: after n of them all is where it began."""
        if self.ranks == 1:
            return held
        came_from = (self.rank - step - 1) % self.ranks
        return self._start(held, self.rank + 1, self.rank - 1, self.sizes[came_from])()

    def return_to(self, owner: int, part: Tensor, rows: int, step: int) -> Tensor:
        """Send a part to whose queries it is for; get the one that was computed for own ones."""
        return self._start(part, owner, self.rank + step, rows)()

    def _start(self, sent: Tensor, to: int, source: int, rows: int) -> Any:
        sent = sent.contiguous()
        received = sent.new_empty((rows, *sent.shape[1:]))
        operations = [
            dist.P2POp(dist.isend, sent, self._global(to), self.group),
            dist.P2POp(dist.irecv, received, self._global(source), self.group),
        ]
        works = dist.batch_isend_irecv(operations)

        def finish() -> Tensor:
            for work in works:
                work.wait()
            operations.clear()  # what is sent must live until here
            return received

        return finish

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank % self.ranks)


def _empty_attention(q_tHh: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to no key: zeros, and a log-sum-exp of -inf."""
    out = torch.zeros_like(wide(q_tHh))
    return out, out.new_full(out.shape[:2], -torch.inf)
