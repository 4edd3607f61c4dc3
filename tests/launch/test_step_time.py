"""The time model against what `benchmarks/parallel.py` measured, and its counts against real runs.

No time is measured here: figures are those of the committed results.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.routing.layout import TokenLayout
from benchmarks import parallel as benchmark
from benchmarks import plan as steps_benchmark
from launch.planning.machines import PUBLISHED, Link, Machine
from launch.planning.probe import PassCounter
from launch.planning.step_time import (
    Collective,
    Demand,
    LayerShape,
    layer_collectives,
    layer_operators,
    layer_passes,
    seconds,
)
from parallel.checks.traffic import Traffic
from parallel.mesh import Mesh
from parallel.rows import even_shards
from tests.launch.saved_machine import from_record
from tests.ranks import run_ranks

STEPS = json.loads((Path(benchmark.__file__).parent / "results" / "plan.json").read_text())
RESULTS = json.loads((Path(benchmark.__file__).parent / "results" / "parallel.json").read_text())
SEQ_LEN = RESULTS["tokens"] // benchmark.ROWS
CASES = [
    (int(words.split()[0]), name)
    for words, found in RESULTS.items()
    if words.endswith(" ranks")
    for name in found
    if name != "probe"
]


def predicted(ranks: int, name: str) -> float:
    """By today's model, from the rates that were recorded."""
    machine = from_record(RESULTS[f"{ranks} ranks"]["probe"])
    if name.startswith("ring"):
        demand = benchmark.ring(name, ranks, SEQ_LEN)
    else:
        demand = benchmark.layer(name, benchmark.mesh_of(name, ranks), SEQ_LEN, machine)
    return seconds(demand, machine, ranks=ranks).total


@pytest.mark.parametrize(("ranks", "name"), CASES, ids=str)
def test_prediction_lies_near_the_recorded_time(ranks: int, name: str) -> None:
    recorded = RESULTS[f"{ranks} ranks"][name]["seconds"]
    # A routed layer of 20 ms is half latencies of collectives, which double from run to run.
    low, high = (0.5, 1.5) if name.endswith("routed") else (0.7, 1.4)
    assert low < predicted(ranks, name) / recorded < high


@pytest.mark.parametrize("ranks", [2, 4])
def test_mean_prediction_is_not_far_off(ranks: int) -> None:
    ratios = [
        predicted(n, name) / RESULTS[f"{n} ranks"][name]["seconds"]
        for n, name in CASES
        if n == ranks
    ]
    mean = torch.tensor(ratios).log().mean().exp()
    assert 0.75 < mean < 1.25


@pytest.mark.parametrize("ranks", [2, 4])
def test_routed_layers_are_predicted_faster_than_dense_ones_where_they_are(ranks: int) -> None:
    found = RESULTS[f"{ranks} ranks"]
    for mesh in benchmark.MESHES:
        dense, routed = f"{mesh}, dense", f"{mesh}, routed"
        measured = found[routed]["seconds"] / found[dense]["seconds"]
        ratio = predicted(ranks, routed) / predicted(ranks, dense)
        assert ratio == pytest.approx(measured, rel=0.5)


def test_predicted_steps_of_a_recipe_lie_near_the_recorded_ones() -> None:
    machine = from_record(STEPS["probe"])
    for name, case in STEPS["meshes"].items():
        ratio = steps_benchmark.predicted(name, machine) / case["seconds"]
        assert 0.5 < ratio < 1.5, (name, ratio)


def _layer(dim: int, heads: int, ffn_dim: int, capacity: float | None, mesh: Mesh) -> nn.Module:
    attention = Attention(dim, heads, head_dim=32, mesh=mesh)
    ffn = SwiGLU(dim, ffn_dim, mesh=mesh)
    layer: nn.Module = DecoderLayer(
        RMSNorm(dim, mesh=mesh), attention, RMSNorm(dim, mesh=mesh), ffn
    )
    if capacity is not None:
        layer = MixtureOfDepths(layer, dim, capacity=capacity, predictor="none", mesh=mesh)
    return layer


@pytest.mark.parametrize("capacity", [None, 0.125, 0.5])
@pytest.mark.parametrize(("dim", "heads", "ffn_dim"), [(128, 4, 256), (128, 8, 512), (256, 4, 256)])
def test_passes_are_those_of_a_real_layer(
    dim: int, heads: int, ffn_dim: int, capacity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Counted of plain torch: a kernel is one operator.
    monkeypatch.delenv("ADAPTIVE_BACKEND", raising=False)
    layer = _layer(dim, heads, ffn_dim, capacity, Mesh.single())
    x = torch.randn(512, dim, requires_grad=True)
    with PassCounter() as counter:
        layer(x, layout=TokenLayout.dense(4, 128)).backward(torch.ones_like(x))
    shape = LayerShape(dim, heads, heads, 32, ffn_dim, capacity or 1.0)
    assert layer_passes(shape, 512, Mesh.single(), size=1) == pytest.approx(
        counter.numbers, rel=0.15
    )
    assert layer_operators(shape) == pytest.approx(counter.operators, rel=0.15)


def _issued(degrees: dict[str, Any], rows: int, capacity: float | None) -> dict[str, int]:
    mesh = Mesh.create(**degrees)
    layer = _layer(32, 4, 64, capacity, mesh)
    layout, own = TokenLayout.dense(rows, 24), rows * 24
    if mesh.shards > 1:
        sizes = even_shards(own, mesh.shards)
        layout, own = replace(layout, shard_sizes=sizes), sizes[mesh.shard_rank]
    torch.manual_seed(mesh.shard_rank)
    x = torch.randn(own, 32, requires_grad=True)
    with Traffic() as traffic:
        layer(x, layout=layout).square().sum().backward()
    return dict(Counter(transfer.operation for transfer in traffic.transfers))


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2},
        {"context": 2, "context_attention": "ring"},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("capacity", [None, 0.25])
def test_collectives_are_those_that_real_ranks_issue(
    degrees: dict[str, Any], capacity: float | None
) -> None:
    mesh = Mesh(**degrees)
    for rows in (1, mesh.shards):
        shape = LayerShape(32, 4, 4, 32, 64, capacity or 1.0)
        planned: Counter[str] = Counter()
        for one in layer_collectives(shape, rows, 24, mesh, size=4):
            planned[one.operation] += int(one.count)
        assert dict(planned) == run_ranks(_issued, mesh.world, degrees, rows, capacity)[0]


def _machine(**given: Any) -> Machine:
    link = Link(latency=1.0, bandwidth=10.0)
    rates = {"products": 100.0, "attention": 50.0, "passes": 20.0, "operator": 0.5}
    links = {"all_reduce": link}
    return Machine("a", "b", 1e9, **rates, links=links, network=Link(5.0, 1.0), **given)


def test_seconds_add_up_on_a_cpu_and_hide_issuing_on_a_gpu() -> None:
    demand = Demand(products=200, attention=100, passes=20, operators=4)
    assert seconds(demand, _machine(asynchronous=False), ranks=1).total == 2 + 2 + 1 + 2
    assert seconds(demand, _machine(), ranks=1).total == 2 + 2 + 1
    assert seconds(Demand(operators=4), _machine(), ranks=1).total == 2


def test_ranks_that_share_a_core_take_turns() -> None:
    shared = _machine(asynchronous=False, cores=2)
    demand = Demand(products=100, collectives=(Collective("tensor", "all_reduce", 4, 1, 10),))
    for ranks, turns in ((1, 1), (2, 1), (3, 1.5), (4, 2)):
        found = seconds(demand, shared, ranks=ranks)
        assert (found.compute, found.communication) == (turns, 2.0)


def test_collectives_wait_once_each_and_cross_the_network_beyond_a_machine() -> None:
    demand = Demand(collectives=(Collective("data", "all_reduce", 8, 3, 40),))
    assert seconds(demand, _machine(), ranks=16).total == 3 * 1.0 + 40 / 10
    far = replace(demand, collectives=(replace(demand.collectives[0], span=16),))
    assert seconds(far, _machine(), ranks=16).total == pytest.approx(3 * 5.0 + 40 / 1)


def test_a_measured_curve_is_followed_and_continued() -> None:
    link = Link(latency=1.0, bandwidth=10.0, curve=((10.0, 3.0), (20.0, 3.5)))
    assert [link.seconds(sent, 1) for sent in (0, 5, 10, 15, 20, 40)] == [1, 2, 3, 3.25, 3.5, 5.5]
    assert link.seconds(30, 2) == 2 * link.seconds(15, 1)


def test_published_machines_say_what_is_published_and_what_assumed() -> None:
    for sheet in PUBLISHED.values():
        machine = sheet.machine(mixed=True, efficiency=0.4)
        assert machine.products == 0.4 * sheet.tensor_16
        for word in ("published", "assumed", "not measured"):
            assert word in machine.source
    with pytest.raises(KeyError):
        PUBLISHED["this"]
