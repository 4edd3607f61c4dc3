"""Rows that change ranks for ring attention: which, when it pays, there and back, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from adaptive.models.decoder.layers import Attention
from adaptive.routing.layout import TokenLayout
from parallel.checks.traffic import Traffic
from parallel.cost import context_bytes
from parallel.mesh import Mesh
from parallel.parity import Report, check_on_ranks
from parallel.ring import order as ring_order
from parallel.ring.attention import zigzag_rows
from parallel.ring.order import (
    RingOrder,
    moved_share,
    ring_pairs,
    zigzag_if_cheaper,
    zigzag_owners,
)
from parallel.rows import even_shards
from tests.distributed.subjects import FAMILIES
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def few_tokens_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here; rank processes are told by `_mesh`."""
    monkeypatch.setattr(ring_order, "SAVED_PAIRS", 1)


def _mesh() -> Mesh:
    ring_order.SAVED_PAIRS = 1
    return Mesh.create(context=dist.get_world_size(), context_attention="ring")


@pytest.mark.parametrize(("tokens", "ranks"), [(48, 2), (50, 4), (5, 3), (1, 2)])
def test_of_one_sequence_the_owners_are_those_of_zigzag_rows(tokens: int, ranks: int) -> None:
    owners = zigzag_owners(torch.zeros(tokens, dtype=torch.int64), ranks)
    for rank in range(ranks):
        assert torch.equal((owners == rank).nonzero().squeeze(1), zigzag_rows(tokens, ranks, rank))


def test_every_sequence_lies_over_all_ranks() -> None:
    lengths = (16, 3, 9)
    owners = zigzag_owners(TokenLayout.from_lengths(lengths).sequence_ids, 2)
    for part, length in zip(owners.split(lengths), lengths, strict=True):
        own = zigzag_owners(torch.zeros(length, dtype=torch.int64), 2)
        assert torch.equal(part, own)
    assert zigzag_owners(torch.zeros(0, dtype=torch.int64), 2).shape == (0,)


def _on_host(layout: TokenLayout) -> torch.Tensor:
    return torch.stack([layout.positions, layout.sequence_ids])


@pytest.mark.parametrize(("sequences", "ranks"), [(1, 2), (1, 8), (2, 4), (3, 8), (5, 8)])
def test_the_busiest_rank_then_computes_little_more_than_the_mean(
    sequences: int, ranks: int
) -> None:
    layout = TokenLayout.dense(sequences, 1024)
    sizes = even_shards(layout.tokens, ranks)
    on_host = _on_host(layout)
    owners = zigzag_if_cheaper(on_host, sizes)
    assert owners is not None
    stays, mean = ring_pairs(on_host, sizes, causal=True)
    evened = on_host[:, owners.argsort(stable=True)]
    moved, same = ring_pairs(evened, tuple(owners.bincount().tolist()), causal=True)
    assert same == pytest.approx(mean, rel=0.02)
    assert moved < 1.05 * mean < 0.85 * stays


@pytest.mark.parametrize(("lengths", "ranks"), [((64,) * 4, 2), ((96,) * 4, 4), ((7,) * 31, 2)])
def test_rows_stay_where_ranks_have_whole_sequences(lengths: tuple[int, ...], ranks: int) -> None:
    layout = TokenLayout.from_lengths(lengths)
    sizes = even_shards(layout.tokens, ranks)
    assert zigzag_if_cheaper(_on_host(layout), sizes) is None
    # Nor does anything move without a mask, or for few pairs.
    long = _on_host(TokenLayout.dense(1, 256))
    assert zigzag_if_cheaper(long, (128, 128), causal=False) is None
    assert zigzag_if_cheaper(long, (128, 128)) is not None
    ring_order.SAVED_PAIRS = 1024
    assert zigzag_if_cheaper(long, (128, 128)) is None


def _there_and_back(sizes: tuple[int, ...]) -> tuple[list[int], list[int], list[float], int]:
    mesh = _mesh()
    layout = TokenLayout.dense(1, sum(sizes))
    rows = torch.arange(sum(sizes))
    assert mesh.context_group is not None
    order = RingOrder.of(rows, layout.sequence_ids, sizes, mesh.context_group)
    own = rows.split(list(sizes))[mesh.context_rank]
    x = own.double()[:, None, None].expand(-1, 2, 3).clone().requires_grad_()
    moved, again = order.to_ring([x, x[:, :1] + 100])
    back = order.from_ring(moved * moved.detach())
    back.sum().backward()
    assert x.grad is not None
    assert torch.equal(again[:, 0], moved[:, 0] + 100)
    assert torch.equal(order.layout.positions[mesh.context_rank], moved[:, 0, 0].long())
    assert torch.equal(back, x.detach() ** 2)
    assert torch.equal(x.grad, x.detach())
    attends = moved[:, 0, 0].long().tolist()
    return own.tolist(), attends, order.positions.tolist(), len(attends)


@pytest.mark.parametrize("sizes", [(24, 24), (3, 40), (13, 12, 12, 11), (0, 20, 5)])
def test_rows_and_gradients_come_back(sizes: tuple[int, ...]) -> None:
    tokens, ranks = sum(sizes), len(sizes)
    for rank, (own, attends, positions, _) in enumerate(run_ranks(_there_and_back, ranks, sizes)):
        assert positions == own
        assert attends == zigzag_rows(tokens, ranks, rank).tolist()


def _bytes(rows: int, length: int) -> dict[str, int]:
    mesh = _mesh()
    attention = Attention(32, 4, num_kv_heads=2, mesh=mesh)
    sizes = even_shards(rows * length, mesh.context)
    layout = replace(TokenLayout.dense(rows, length), shard_sizes=sizes)
    hidden = torch.randn(sizes[mesh.context_rank], 32, requires_grad=True)
    with Traffic() as traffic:
        attention(hidden, layout=layout).sum().backward()
    return traffic.by_operation()


@pytest.mark.parametrize(("rows", "moves"), [(1, True), (4, False)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_the_formula(ranks: int, rows: int, moves: bool) -> None:
    moved = moved_share(rows, 48, ranks)
    assert (moved > 0) == moves
    if moves:  # but one chunk in ranks + 1 or so changes ranks
        assert moved == (ranks - 1) / ranks
    mesh = Mesh(context=ranks, context_attention="ring")
    formula = context_bytes(mesh, rows * 48, 4, 2, 8, moved=moved)
    by_rank = run_ranks(_bytes, ranks, rows, 48)
    assert sum(sum(sent.values()) for sent in by_rank) / ranks == formula
    assert all(("all_to_all" in sent) == moves for sent in by_rank)


def _infers_then_trains() -> bool:
    mesh, layout = _mesh(), TokenLayout.dense(1, 40)
    attention = Attention(32, 4, mesh=mesh)
    hidden = torch.randn(20, 32, requires_grad=True)
    with torch.inference_mode():
        expected = attention(hidden, layout=layout)
    found = attention(hidden, layout=layout)
    found.sum().backward()
    assert hidden.grad is not None
    return torch.equal(found, expected)


def test_a_layout_that_inference_used_first_trains() -> None:
    assert all(run_ranks(_infers_then_trains, 2))


def _check(family: str, rows: int) -> Report:
    ring_order.SAVED_PAIRS = 1
    degrees = {"context": dist.get_world_size(), "context_attention": "ring"}
    reports = check_on_ranks(replace(FAMILIES[family], rows=rows), [degrees])
    return reports[0] if reports else Report("", 0, [])


@pytest.mark.parametrize(
    ("family", "ranks", "rows"),
    [
        ("dense", 2, 1),
        ("mixture_of_depths", 2, 1),
        ("mixture_of_depths", 4, 3),
        # Of one row, the gradient of a router's bias cancels to what rounding is of its terms.
        ("skip_layer", 4, 3),
        ("documents", 4, 1),
    ],
)
def test_few_long_sequences_agree_with_one_rank(family: str, ranks: int, rows: int) -> None:
    report = run_ranks(_check, ranks, family, rows)[0]
    assert report.ok, report.table()
