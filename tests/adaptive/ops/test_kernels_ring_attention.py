"""The attention kernels by parts, as ranks of a ring compute them, against softmax of the whole.

All ranks are here: what each would compute is computed in turn, and nothing is sent.
"""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from adaptive.ops import ring_attention
from adaptive.ops.kernels import varlen_attention as forward
from adaptive.ops.kernels import varlen_attention_backward as backward
from adaptive.routing.layout import TokenLayout
from parallel.ring.blocks import TORCH, Blocks, merge
from parallel.ring.layout import Pair, RingLayout, zigzag_rows
from tests.adaptive.ops.kernel_checks import (
    COMPILED,
    DEVICE,
    assert_within_twice_the_reference_error,
    draw,
)
from tests.adaptive.ops.test_kernels_varlen_attention import (
    dense_attention,
    packed,
    pairs_of,
    some_of,
)

KERNELS = Blocks(ring_attention._attend, ring_attention._backward)
NOBODY = cast(Any, None)


@pytest.fixture(autouse=True)
def small_interpreted_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    for kernels in (forward, backward):
        monkeypatch.setattr(kernels, "interpreted_blocks", lambda *_: blocks)


class AllRanks(torch.autograd.Function):
    """Every pair of ranks, one after another. Rows come in the order of the ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: RingLayout,
        keys: RingLayout,
        blocks: Blocks,
    ) -> Tensor:
        outs, lses = [], []
        ctx.sizes = list(queries.sizes), list(keys.sizes)
        for rank, own in enumerate(q.split(ctx.sizes[0])):
            out = torch.zeros_like(own, dtype=torch.float32)
            lse = out.new_full(out.shape[:2], -torch.inf)
            for owner, (k_part, v_part) in enumerate(
                zip(k.split(ctx.sizes[1]), v.split(ctx.sizes[1]), strict=True)
            ):
                part = blocks.attend(own, k_part, v_part, Pair(queries, keys, rank, owner))
                assert [x.dtype for x in part] == [torch.float32, torch.float32]
                out, lse = merge(out, lse, *part)
            outs.append(out)
            lses.append(lse)
        ctx.save_for_backward(q, k, v, torch.cat(outs), torch.cat(lses))
        ctx.queries, ctx.keys, ctx.blocks = queries, keys, blocks
        return torch.cat(outs).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (grad.float() * out).sum(-1)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
        q_sizes, k_sizes = ctx.sizes
        asked = [x.split(q_sizes) for x in (q, grad, lse, delta, grads[0])]
        held = [x.split(k_sizes) for x in (k, v, grads[1], grads[2])]
        for rank, (*given, grad_q) in enumerate(zip(*asked, strict=True)):
            for owner, (k_part, v_part, grad_k, grad_v) in enumerate(zip(*held, strict=True)):
                pair = Pair(ctx.queries, ctx.keys, rank, owner)
                parts = ctx.blocks.backward(*given, k_part, v_part, pair)
                for total, part in zip((grad_q, grad_k, grad_v), parts, strict=True):
                    assert part.dtype == torch.float32
                    total += part
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None


def over_ranks(layout: TokenLayout, ranks: int, order: str, causal: bool) -> tuple[Tensor, Any]:
    """(which token of the pack each row is, who holds which)."""
    if order == "zigzag":
        rows = [zigzag_rows(layout.tokens, ranks, rank) for rank in range(ranks)]
    elif order == "scattered":  # sequences after one another no longer
        drawn = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(1))
        rows = list(drawn.tensor_split(ranks))
    else:  # the second rank has nothing
        rows = [torch.arange(0)] * ranks
        for rank, part in zip((0, *range(2, ranks)), torch.arange(layout.tokens).tensor_split(
            ranks - 1
        ), strict=True):  # fmt: skip
            rows[rank] = part
    index, sizes = torch.cat(rows).to(DEVICE), tuple(len(part) for part in rows)
    whole = layout.positions[index], layout.sequence_ids[index]
    return index, RingLayout.of(*whole, sizes, NOBODY, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "kept", "ranks", "order", "dtype"),
    [
        ([40], None, 2, "zigzag", torch.float32),
        ([37, 0, 1, 18], None, 3, "zigzag", torch.float32),
        ([5, 0, 30], None, 3, "gap", torch.float32),
        ([33, 7, 20], [11, 0, 20], 3, "zigzag", torch.float32),
        ([50], None, 2, "zigzag", torch.bfloat16),
        ([9, 14], None, 2, "scattered", torch.float32),
        pytest.param([1030, 300], None, 2, "zigzag", torch.bfloat16, marks=COMPILED),
        pytest.param([700, 0, 333], [350, 0, 290], 3, "gap", torch.float32, marks=COMPILED),
    ],
)
def test_parts_of_ranks_make_up_the_whole(lengths, kept, ranks, order, dtype, causal) -> None:
    keys = packed(lengths)
    queries = keys if kept is None else some_of(lengths, kept)
    allowed = pairs_of(queries, keys, causal, True)
    k_index, k_layout = over_ranks(keys, ranks, order, causal)
    q_index, q_layout = over_ranks(queries, ranks, order, causal)
    assert k_layout.ordered == (order != "scattered")

    def by_ranks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = q[q_index], k[k_index], v[k_index]
        out = AllRanks.apply(*parts, q_layout, k_layout, KERNELS)
        return torch.empty_like(out).index_copy(0, q_index, out)

    heads = 2 if causal else 1  # of keys and values; of two, queries share each
    q = draw(queries.tokens, 2 * heads, 12)
    k, v = (draw(keys.tokens, heads, 12, seed=s) for s in (1, 2))
    assert_within_twice_the_reference_error(
        by_ranks, lambda q, k, v: dense_attention(q, k, v, allowed)[0], [q, k, v], dtype
    )


def test_plain_torch_gives_the_same_parts() -> None:
    layout = packed([23, 6])
    _, ring = over_ranks(layout, 2, "zigzag", True)
    q, grad = (draw(ring.sizes[1], 4, 8, seed=s) for s in (0, 1))
    k, v = (draw(ring.sizes[0], 2, 8, seed=s) for s in (2, 3))
    pair = Pair(ring, ring, 1, 0)
    out, lse = TORCH.attend(q, k, v, pair)
    for mine, theirs in zip(KERNELS.attend(q, k, v, pair), (out, lse), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    delta = (out * grad).sum(-1)
    found = [blocks.backward(q, grad, lse, delta, k, v, pair) for blocks in (KERNELS, TORCH)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
