"""Ulysses: attention sees whole sequences that lie over ranks, evenly or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.ops.varlen_attention import varlen_attention, with_key_bias
from adaptive.routing.layout import TokenLayout
from parallel.checks.traffic import Traffic
from parallel.context import heads_to_tokens, move_rows, repeat_heads, tokens_to_heads
from parallel.mesh import Mesh
from parallel.rows import even_shards
from tests.ranks import run_ranks

LENGTHS = (7, 1, 12)
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def _whole() -> tuple[Tensor, Tensor, Tensor, Tensor, TokenLayout]:
    draw = torch.Generator().manual_seed(3)
    tokens = sum(LENGTHS)
    q = torch.randn(tokens, HEADS, WIDTH, generator=draw)
    k, v = torch.randn(2, tokens, KV_HEADS, WIDTH, generator=draw)
    bias = torch.randint(1, 9, (tokens,), generator=draw).float().log()
    return q, k, v, bias, TokenLayout.from_lengths(LENGTHS)


def _attended(sizes: tuple[int, ...], biased: bool) -> tuple[Tensor, list[Tensor]]:
    mesh = Mesh.create(context=len(sizes))
    q, k, v, bias, layout = _whole()
    rank = mesh.context_rank
    own = [x.split(list(sizes))[rank].clone().requires_grad_() for x in (q, k, v, bias)]
    heads = own[:3]
    if biased:
        # The bias goes where its keys go.
        heads = list(with_key_bias(*heads, own[3]))
    heads = [heads[0], repeat_heads(heads[1], mesh), repeat_heads(heads[2], mesh)]
    inside = tokens_to_heads(heads, mesh, shard_sizes=sizes)
    out = varlen_attention(*inside, queries=layout)
    out = heads_to_tokens(out, mesh, shard_sizes=sizes)[..., :WIDTH]
    out.square().sum().backward()
    return out.detach(), [x.grad for x in own if x.grad is not None]


@pytest.mark.parametrize(
    ("sizes", "biased"),
    [
        ((10, 10), False),
        ((3, 17), True),
        ((0, 20), False),
        ((5, 5, 0, 10), False),
        ((5, 5, 0, 10), True),
    ],
)
def test_attention_and_its_gradients_are_those_of_whole_sequences(
    sizes: tuple[int, ...], biased: bool
) -> None:
    q, k, v, bias, layout = _whole()
    leaves = [x.requires_grad_() for x in ((q, k, v, bias) if biased else (q, k, v))]
    expected = varlen_attention(q, k, v, queries=layout, key_bias=bias if biased else None)
    expected.square().sum().backward()
    by_rank = run_ranks(_attended, len(sizes), sizes, biased)
    torch.testing.assert_close(torch.cat([out for out, _ in by_rank]), expected.detach())
    for index, leaf in enumerate(leaves):
        found = torch.cat([grads[index] for _, grads in by_rank])
        torch.testing.assert_close(found, leaf.grad)


def _moved(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[list[float], list[float]]:
    mesh = Mesh.create(context=len(before))
    rows = torch.arange(float(sum(before)))[:, None]
    own = rows.split(list(before))[mesh.context_rank].clone().requires_grad_()
    out = move_rows(own, mesh, before=before, after=after)
    (out * out.detach()).sum().backward()
    assert own.grad is not None
    return out.flatten().tolist(), own.grad.flatten().tolist()


@pytest.mark.parametrize(
    ("before", "after"), [((9, 0, 1), (4, 3, 3)), ((0, 0, 5), (2, 2, 1)), ((1, 2, 3), (1, 2, 3))]
)
def test_rows_move_in_order_and_their_gradients_come_back(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    by_rank = run_ranks(_moved, 3, before, after)
    everything = [float(i) for i in range(sum(before))]
    assert [len(out) for out, _ in by_rank] == list(after)
    assert [x for out, _ in by_rank for x in out] == everything
    assert [x for _, grad in by_rank for x in grad] == everything


class _CountsRows(nn.Module):
    """A block that notes how many rows it was given."""

    takes_packed = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.rows = block, -1

    def forward(self, x_RD: Tensor, *, layout: TokenLayout) -> Tensor:
        self.rows = x_RD.shape[0]
        return self.block(x_RD, layout=layout)


def _routed(capacity: float | None) -> tuple[int, int]:
    """Rows that this rank computed, and bytes that it sent in forward and backward."""
    mesh = Mesh.create(context=2)
    torch.manual_seed(0)
    width, tokens = 32, 64
    attention = Attention(width, 4, mesh=mesh)
    norms = [RMSNorm(width, mesh=mesh) for _ in range(2)]
    layer = DecoderLayer(norms[0], attention, norms[1], SwiGLU(width, 64, mesh=mesh))
    block = _CountsRows(layer)
    module: nn.Module = block
    if capacity is not None:
        module = MixtureOfDepths(block, width, capacity=capacity, predictor="none", mesh=mesh)
    sizes = even_shards(tokens, 2)
    whole = TokenLayout.dense(1, tokens)
    layout = TokenLayout(whole.cu_seqlens, whole.max_seqlen, whole.positions, sizes)
    # All the best tokens lie on the second rank.
    torch.manual_seed(1)
    hidden = 0.01 * torch.randn(sizes[0], width)
    if capacity is not None:
        assert isinstance(module, MixtureOfDepths)
        hidden = hidden + mesh.context_rank * module.router.weight.detach()
    hidden.requires_grad_()
    with Traffic() as traffic:
        module(hidden, layout=layout).square().sum().backward()
    return block.rows, traffic.by_operation()["all_to_all"]


def test_chosen_tokens_of_one_rank_are_computed_evenly_by_all() -> None:
    (dense_rows, dense_bytes), _ = run_ranks(_routed, 2, None)
    assert dense_rows == 32
    by_rank = run_ranks(_routed, 2, 0.25)
    assert [rows for rows, _ in by_rank] == [8, 8]
    # A quarter of the dense exchange, and half of the chosen rows moved there and back, twice.
    moved = 2 * (8 * 32 * 4)
    assert sum(sent for _, sent in by_rank) == 2 * dense_bytes // 4 + 2 * moved


def _refused(degrees: dict[str, Any], heads: int) -> str:
    try:
        mesh = Mesh.create(**degrees)
        Attention(12, heads, mesh=mesh)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("degrees", "heads", "message"),
    [
        (
            {"context": 2},
            3,
            "context=2: must divide the 3 heads of a tensor rank; may be 1, or any with "
            "context_attention=ring",
        ),
        (
            {"context": 2, "context_attention": "star"},
            4,
            "context_attention='star': must be ulysses or ring",
        ),
        ({"tensor": 2}, 3, "num_heads=3: must be a multiple of tensor=2; tensor may be 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    degrees: dict[str, Any], heads: int, message: str
) -> None:
    ranks = int(degrees.get("tensor", 1)) * int(degrees.get("context", 1))
    assert run_ranks(_refused, ranks, degrees, heads) == [message] * ranks


def test_generation_round_a_ring_is_refused_in_one_line() -> None:
    attention = Attention(16, 2, mesh=Mesh(context=2, context_attention="ring"))
    cache: Any = object()
    with pytest.raises(ValueError, match=r"^context_attention=ring: cannot generate with a cache"):
        attention(torch.randn(4, 16), layout=TokenLayout.dense(1, 4), cache=cache)
