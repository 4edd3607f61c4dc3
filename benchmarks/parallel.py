"""Bytes and time of a layer over 2 and 4 ranks: dense against routed at 12.5%, on every axis.

    python benchmarks/parallel.py [--quick]

Ranks are gloo processes with one thread each. More ranks than cores take turns, so seconds of 4
ranks on 2 cores say nothing about scaling; bytes are exact. Beside each time stands what the
planner predicts from rates that are measured just before and just after (`launch.planning.probe`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.routing.layout import TokenLayout
from benchmarks.measure import interleave_on_ranks, median_ratio, medians, save
from launch.planning.machines import Machine, between
from launch.planning.probe import probe
from launch.planning.step_time import Demand, LayerShape, layer_demand, ring_demand, seconds
from parallel.checks.traffic import Traffic
from parallel.cost import (
    context_bytes,
    replicated_bytes,
    ring_bytes,
    score_bytes,
    tensor_bytes,
)
from parallel.mesh import Mesh
from parallel.ranks import on_ranks
from parallel.ring.attention import RingLayout, ring_attention, zigzag_rows
from parallel.ring.order import moved_share
from parallel.rows import even_shards

CAPACITY = 0.125
HEADS, HEAD_DIM = 8, 32
DIM, FFN = HEADS * HEAD_DIM, 512
ROWS = 4
MESHES: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": ...},
    "tensor, sequence parallel": {"tensor": ..., "sequence_parallel": True},
    "context (Ulysses)": {"context": ...},
    "context (ring)": {"context": ..., "context_attention": "ring"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is written")
    quick = parser.parse_args().quick
    seq_len, rounds = (64, 2) if quick else (512, 11)
    results: dict[str, Any] = {"layer": {"dim": DIM, "ffn_dim": FFN, "heads": HEADS}}
    results["tokens"] = ROWS * seq_len
    for ranks in (2, 4):
        found, machine = on_ranks(_measure, ranks, seq_len, rounds, timeout=600)
        for name, case in found.items():
            mesh = None if name.startswith("ring") else mesh_of(name, ranks)
            demand = (
                ring(name, ranks, seq_len) if mesh is None else layer(name, mesh, seq_len, machine)
            )
            case["predicted"] = seconds(demand, machine, ranks=ranks).total
            case["predicted_of_measured"] = case["predicted"] / case["seconds"]
        results[f"{ranks} ranks"] = {"probe": machine.record(), **found}
        for name, case in found.items():
            print(f"{ranks} ranks, {name}: {_line(case)}")
            assert abs(case["sent"] / case["formula"] - 1) < 0.05, (name, case)
    if not quick:
        save("parallel", results)


def _line(case: dict[str, float]) -> str:
    seconds = f", {1000 * case['seconds']:.1f} ms"
    seconds += f", predicted {1000 * case['predicted']:.1f}"
    ratio = f", {case['of_dense']:.3f} of dense time" if "of_dense" in case else ""
    return f"{case['sent'] / 1e6:.3f} MB sent, formula {case['formula'] / 1e6:.3f}{seconds}{ratio}"


def mesh_of(name: str, ranks: int) -> Mesh:
    """Sizes of the mesh that a case is measured on, without groups."""
    return Mesh(**_degrees(MESHES[name.rpartition(",")[0]], ranks))


def _degrees(axes: dict[str, Any], ranks: int) -> dict[str, Any]:
    return {key: ranks if value is ... else value for key, value in axes.items()}


def layer(name: str, mesh: Mesh, seq_len: int, machine: Machine) -> Demand:
    """What a rank does in one call of a layer."""
    share = CAPACITY if name.endswith("routed") else 1.0
    shape = LayerShape(DIM, HEADS, HEADS, HEAD_DIM, FFN, share)
    module = _layer(Mesh.single(), None if share == 1 else share)
    demand = layer_demand(
        shape,
        module,
        rows=ROWS,
        seq_len=seq_len,
        mesh=mesh,
        causal_share=machine.causal_share,
    )
    # The square whose sum is differentiated, and the sums of gradients.
    own = ROWS * seq_len / mesh.shards
    return demand + Demand(passes=4 * 12 * DIM * own, operators=10)


def ring(name: str, ranks: int, seq_len: int) -> Demand:
    """What a rank does in one call of ring attention: zigzag gives each as many pairs."""
    tokens = ROWS * seq_len
    # Of 2n x 2n blocks of pairs, those on or below the diagonal are computed.
    pairs = (2 * ranks + 1) * ranks / (2 * ranks) ** 2 * tokens**2 / ranks
    return ring_demand(
        pairs=pairs,
        tokens=tokens,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        ranks=ranks,
        scheme=name.split()[1].rstrip(","),
    )


def _measure(seq_len: int, rounds: int) -> tuple[dict[str, dict[str, float]], Machine]:
    """On every rank; means over ranks of what each sent, and the machine's rates."""
    ranks = dist.get_world_size()
    before = probe(DIM)
    found: dict[str, dict[str, float]] = {}
    for name, axes in MESHES.items():
        mesh = Mesh.create(**_degrees(axes, ranks))
        calls = {}
        for kind, capacity in (("dense", None), ("routed", CAPACITY)):
            calls[f"{name}, {kind}"] = _layer_call(mesh, seq_len, capacity)
        sent = {case: _sent(call) for case, call in calls.items()}
        seconds = interleave_on_ranks(calls, rounds)
        times = medians(seconds)
        for case in calls:
            share = CAPACITY if case.endswith("routed") else 1.0
            formula = _formula(mesh, ROWS * seq_len, share)
            found[case] = {"sent": sent[case], "formula": formula, "seconds": times[case]}
        found[f"{name}, routed"]["of_dense"] = median_ratio(
            seconds, f"{name}, routed", f"{name}, dense"
        )
    rings = {
        f"ring, {scheme} travel": _ring_call(seq_len, scheme) for scheme in ("queries", "keys")
    }
    seconds = interleave_on_ranks(rings, rounds)
    for case, call in rings.items():
        formula = ring_bytes(
            ROWS * seq_len, HEADS, HEADS, HEAD_DIM, ranks, scheme=case.split()[1].rstrip(",")
        )
        found[case] = {
            "sent": _sent(call),
            "formula": formula,
            "seconds": medians(seconds)[case],
            # A step computes while it sends; in the backward of "keys" one more only sends.
            "steps": 2 * ranks,
            "messages": _messages(call),
        }
    return found, between(before, probe(DIM))


def _layer(mesh: Mesh, capacity: float | None) -> nn.Module:
    torch.manual_seed(0)
    norms = [RMSNorm(DIM, mesh=mesh) for _ in range(2)]
    attention, ffn = Attention(DIM, HEADS, mesh=mesh), SwiGLU(DIM, FFN, mesh=mesh)
    module: nn.Module = DecoderLayer(norms[0], attention, norms[1], ffn)
    if capacity is not None:
        module = MixtureOfDepths(module, DIM, capacity=capacity, predictor="none", mesh=mesh)
    return module


def _layer_call(mesh: Mesh, seq_len: int, capacity: float | None) -> Any:
    module = _layer(mesh, capacity)
    layout, own = TokenLayout.dense(ROWS, seq_len), ROWS * seq_len
    if mesh.shards > 1:
        sizes = even_shards(own, mesh.shards)
        layout, own = replace(layout, shard_sizes=sizes), sizes[mesh.shard_rank]
    torch.manual_seed(mesh.shard_rank)
    hidden = torch.randn(own, DIM, requires_grad=True)

    def call() -> None:
        module(hidden, layout=layout).square().sum().backward()

    return call


def _ring_call(seq_len: int, scheme: Any) -> Any:
    group = dist.group.WORLD
    assert group is not None
    tokens = ROWS * seq_len
    own = zigzag_rows(tokens, dist.get_world_size(), dist.get_rank())
    layout = RingLayout.create(own, torch.zeros_like(own), group)
    q, k, v = (torch.randn(own.shape[0], HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))

    def call() -> Tensor:
        out = ring_attention(q, k, v, layout, scheme=scheme)
        out.square().sum().backward()
        return out

    return call


def _formula(mesh: Mesh, tokens: int, share: float) -> float:
    if mesh.context > 1:
        chosen = round(share * tokens / ROWS)
        moved = moved_share(ROWS, chosen, mesh.context) if mesh.ring else 0.0
        total = context_bytes(mesh, tokens, HEADS, HEADS, HEAD_DIM, share=share, moved=moved)
        if share < 1:
            total += score_bytes(tokens, mesh.context)
        return total
    total = tensor_bytes(tokens, DIM, mesh.tensor, share=share)
    if mesh.sequence_parallel:
        total += replicated_bytes(2 * DIM, mesh.tensor)
        if share < 1:
            total += replicated_bytes(DIM, mesh.tensor) + score_bytes(tokens, mesh.tensor)
    return total


def _sent(call: Any) -> float:
    with Traffic() as traffic:
        call()
    total = torch.tensor(float(traffic.sent))
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def _messages(call: Any) -> int:
    with Traffic() as traffic:
        call()
    return len(traffic.transfers)


if __name__ == "__main__":
    main()
