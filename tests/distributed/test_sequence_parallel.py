"""Routed tokens under Megatron's sequence parallelism: what crosses the wire, and for whom."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection
from parallel.checks.traffic import Traffic
from parallel.mesh import Mesh
from parallel.rows import even_shards, rows_of_rank
from tests.ranks import run_ranks

WIDTH, ROWS, LENGTH = 32, 2, 64
TOKENS = ROWS * LENGTH


def _layer(mesh: Mesh) -> nn.Module:
    attention = Attention(WIDTH, 4, mesh=mesh)
    ffn = SwiGLU(WIDTH, 64, mesh=mesh)
    return DecoderLayer(RMSNorm(WIDTH, mesh=mesh), attention, RMSNorm(WIDTH, mesh=mesh), ffn)


def _run(module: nn.Module, mesh: Mesh) -> dict[str, int]:
    """Bytes that this rank sends in a forward and a backward."""
    sizes = even_shards(TOKENS, mesh.tensor) if mesh.sequence_parallel else None
    dense = TokenLayout.dense(ROWS, LENGTH)
    layout = TokenLayout(dense.cu_seqlens, dense.max_seqlen, dense.positions, sizes)
    own = TOKENS if sizes is None else sizes[mesh.tensor_rank]
    torch.manual_seed(mesh.tensor_rank if sizes else 0)
    hidden = torch.randn(own, WIDTH, requires_grad=True)
    with Traffic() as traffic:
        module(hidden, layout=layout).square().sum().backward()
    return traffic.by_operation()


def _sent(sequence_parallel: bool, capacity: float | None) -> dict[str, int]:
    mesh = Mesh.create(tensor=2, sequence_parallel=sequence_parallel)
    torch.manual_seed(0)
    module = _layer(mesh)
    if capacity is not None:
        module = MixtureOfDepths(module, WIDTH, capacity=capacity, predictor="none", mesh=mesh)
    return _run(module, mesh)


def _over_ranks(sequence_parallel: bool, capacity: float | None) -> dict[str, int]:
    by_rank = run_ranks(_sent, 2, sequence_parallel, capacity)
    names = {name for sent in by_rank for name in sent}
    return {name: sum(sent.get(name, 0) for sent in by_rank) for name in names}


@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_sequence_parallel_sends_capacity_times_the_dense_bytes(capacity: float) -> None:
    dense, routed = _over_ranks(True, None), _over_ranks(True, capacity)
    rows = TOKENS * WIDTH * 4
    # Attention and feed-forward each gather and scatter, forward and backward.
    assert dense["all_gather"] == dense["reduce_scatter"] == 4 * rows
    # Two norm weights, reduced in the backward.
    norms = 2 * (2 * WIDTH * 4)
    assert dense["all_reduce"] == norms
    # Chosen rows, wherever they lie, and one score a token; the router's own weight.
    moved = routed.get("all_to_all", 0) + routed["all_gather"] + routed.get("reduce_scatter", 0)
    assert moved == capacity * (dense["all_gather"] + dense["reduce_scatter"]) + TOKENS * 4
    assert routed["all_reduce"] == norms + 2 * WIDTH * 4


@pytest.mark.parametrize("capacity", [0.125, 0.5])
def test_tensor_parallel_sends_capacity_times_the_dense_bytes(capacity: float) -> None:
    dense, routed = _over_ranks(False, None), _over_ranks(False, capacity)
    # Attention and feed-forward each reduce once forward and once backward.
    assert dense == {"all_reduce": 4 * 2 * TOKENS * WIDTH * 4}
    assert routed == {"all_reduce": capacity * dense["all_reduce"]}


def _choice_of_shard(scores: list[float]) -> tuple[list[int], tuple[int, ...] | None]:
    mesh = Mesh.create(tensor=2, sequence_parallel=True)
    layout = TokenLayout.dense(1, len(scores))
    order = torch.tensor(scores).argsort(descending=True)[:3].sort().values
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    chosen = Selection(order, cu_seqlens, 3, None, 1, len(scores), layout.positions[order])
    own = chosen.on_shard(layout, mesh)
    assert own.layout.positions.tolist() == order.tolist()
    return own.indices.tolist(), own.shard_sizes


def test_choice_is_over_the_whole_sequence_and_may_leave_a_rank_without_tokens() -> None:
    first, second = run_ranks(_choice_of_shard, 2, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    # Seven tokens lie 4 + 3; the best three are all the second rank's.
    assert first == ([], (0, 3))
    assert second == ([0, 1, 2], (0, 3))


def test_rows_of_rank_against_a_loop() -> None:
    indices, sizes = [0, 3, 4, 8, 9], (4, 0, 5, 1)
    starts = [0, 4, 4, 9]
    expected = [[0, 3], [], [0, 4], [0]]
    for rank, (start, own) in enumerate(zip(starts, expected, strict=True)):
        found, counts = rows_of_rank(torch.tensor(indices), sizes, rank)
        assert found.tolist() == own == [i - start for i in indices if 0 <= i - start < sizes[rank]]
        assert counts == (2, 0, 2, 1)
