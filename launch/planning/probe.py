"""Measures this machine in a few seconds: products, attention, passes, operators, collectives.

Each figure is measured alone, by the functions that the layers call, and no figure is fitted to
the time of a layer: what `launch.planning.step_time` makes of them can be held against one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive.models.decoder.layers import (
    Attention,
    DecoderLayer,
    RMSNorm,
    SwiGLU,
    apply_rotary,
    rotary_tables,
)
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout
from launch.planning.machines import PUBLISHED, Link, Machine
from launch.run.errors import BadInput
from launch.run.terminal import announced
from parallel.mesh import Mesh
from parallel.ranks import on_ranks
from parallel.rows import all_gather_rows, exchange_rows, reduce_scatter_rows
from parallel.tensor import column_linear

MOST_RANKS = 8


def machine_of(name: str, *, ranks: int, dim: int, mixed: bool, efficiency: float) -> Machine:
    """The machine of that name; `this` is measured now.

    Args:
        name: a key of `PUBLISHED`, or "this".
        ranks: that will run.
        dim: width of the model: rates of products depend on it.
        mixed, efficiency: see `DataSheet.machine`.

    Raises:
        BadInput: no such machine.
    """
    if name == "this":
        with announced("measuring this machine"):
            return measure(ranks, dim=dim)
    if name not in PUBLISHED:
        raise BadInput(f"--machine={name}: must be one of this, {', '.join(sorted(PUBLISHED))}")
    return PUBLISHED[name].machine(mixed=mixed, efficiency=efficiency)


def measure(ranks: int, *, dim: int = 256) -> Machine:
    """This machine's rates with `ranks` gloo ranks of one thread each on its cores.

    Rates are measured while as many ranks compute as there are cores: they share caches and memory.
    Collectives are measured with all ranks, however many share a core; more than `MOST_RANKS` are
    not started.

    Args:
        ranks: that will run.
        dim: width of products and passes.
    """
    return on_ranks(probe, min(ranks, MOST_RANKS), dim, timeout=120)


def probe(dim: int = 256, rounds: int = 12) -> Machine:
    """On every rank of a process group; a collective. Takes five to ten seconds."""
    ranks, cores = dist.get_world_size(), os.cpu_count() or 1
    computing = range(min(ranks, cores))
    rates = {}
    for name, prepare in _WORK.items():
        rates[name] = _rate(prepare, dim, computing, seconds=rounds / 48)
    links = _links(rounds)
    return Machine(
        name=f"this ({platform.processor() or platform.machine()}, {cores} cores)",
        source=f"measured now, {ranks} gloo ranks of one thread",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks,
        products=rates["products"],
        attention=rates["attention"],
        passes=rates["passes"],
        operator=1 / rates["operator"],
        links=links,
        network=links["all_reduce"],
        ranks=MOST_RANKS,
        cores=cores,
        asynchronous=False,
        causal_share=rates["attention"] / rates["causal"],
    )


class PassCounter(TorchDispatchMode):
    """Counts operators, and the numbers that those that are neither products nor views touch.

    Attributes:
        operators: issued, views included.
        numbers: elements read and written by element-wise work, reductions and copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.numbers = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if not func.is_view and func._schema.name.partition("::")[2] not in _NOT_PASSES:
            self.numbers += _elements(args) + _elements(out)
        return out


_NOT_PASSES = (
    "mm", "addmm", "bmm", "_unsafe_view", "empty", "new_empty", "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, (list, tuple)):
        return sum(_elements(item) for item in value)
    return 0


Prepared = tuple[Callable[[], Any], float]
"""A call, and how much of the unit it does."""


def _products(dim: int) -> Prepared:
    tokens = 1024
    layer = column_linear(dim, 2 * dim, mesh=Mesh.single())
    x = torch.randn(tokens, dim, requires_grad=True)
    grad = torch.randn(tokens, 2 * dim)
    return lambda: layer(x).backward(grad), 3 * 2 * tokens * dim * 2 * dim


def _attention(dim: int, *, causal: bool = False) -> Prepared:
    width, tokens = 32, 512
    heads = max(1, dim // width)
    layout = TokenLayout.dense(1, tokens)
    q, k, v = (torch.randn(tokens, heads, width, requires_grad=True) for _ in range(3))
    grad = torch.randn(tokens, heads, width)
    return (
        lambda: varlen_attention(q, k, v, queries=layout, causal=causal).backward(grad),
        3.5 * 4 * heads * width * tokens**2,
    )


def _passes(dim: int) -> Prepared:
    tokens, width = 4096, 32
    norm = RMSNorm(dim)
    x, y = (torch.randn(tokens, dim, requires_grad=True) for _ in range(2))
    tables = rotary_tables(torch.arange(tokens), width)

    def call() -> None:
        rotated = apply_rotary((F.silu(norm(x)) * y).unflatten(1, (-1, width)), tables)
        (rotated.flatten(1) + x).sum().backward()

    with PassCounter() as counter:
        call()
    return call, 4 * counter.numbers


def _operators(dim: int) -> Prepared:
    """A layer of so few tokens that only issuing its operators takes time."""
    head = 32
    attention = Attention(head, 1)
    layer = DecoderLayer(RMSNorm(head), attention, RMSNorm(head), SwiGLU(head, head))
    layout = TokenLayout.dense(1, 2)
    x = torch.randn(2, head, requires_grad=True)

    def call() -> None:
        layer(x, layout=layout).sum().backward()

    with PassCounter() as counter:
        call()
    return call, counter.operators


_WORK: dict[str, Callable[[int], Prepared]] = {
    "products": _products,
    "attention": _attention,
    "causal": partial(_attention, causal=True),
    "passes": _passes,
    "operator": _operators,
}


def _rate(
    prepare: Callable[[int], Prepared], dim: int, computing: range, *, seconds: float
) -> float:
    """Units a second of one rank, the mean of those that compute at once."""
    own = torch.zeros((), dtype=torch.float64)
    call, amount = prepare(dim)
    dist.barrier()
    if dist.get_rank() in computing:
        for _ in range(3):
            call()
        taken = []
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        own += amount / statistics.median(taken)
    dist.all_reduce(own)
    return float(own) / len(computing)


def _links(rounds: int) -> dict[str, Link]:
    """Each collective at a few sizes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1:
        return dict.fromkeys(_COLLECTIVES, Link(0.0, 1e12))
    links = {}
    for name, collective in _COLLECTIVES.items():
        points = [_point(*collective(ranks * numbers, ranks, rank), rounds) for numbers in _SIZES]
        (_, latency), *curve = points
        (less, shorter), (more, longer) = points[-2:]
        # Where ranks share cores, waiting for a turn may hide the bytes altogether.
        bandwidth = (more - less) / max(longer - shorter, 0.05 * longer)
        links[name] = Link(latency, bandwidth, tuple(curve))
    return links


_SIZES = (16, 1 << 13, 1 << 16, 1 << 18, 1 << 20)
"""Numbers of each rank."""


def _point(call: Callable[[], Any], sent: float, rounds: int) -> tuple[float, float]:
    """Bytes sent, and seconds: the mean over ranks, the median over rounds.

    Before each a rank computes for about a millisecond, as in a layer: the library's threads then
    sleep, caches are full of other things, and ranks come at slightly different times.
    """
    x = torch.randn(512, 256)
    weight = torch.randn(256, 256)
    taken = []
    for _ in range(rounds + 2):
        dist.barrier()
        F.linear(F.linear(x, weight), weight)
        start = time.perf_counter()
        call()
        own = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(own)
        taken.append(float(own) / dist.get_world_size())
    return sent, statistics.median(taken[2:])


def _all_reduce(numbers: int, ranks: int, rank: int) -> Prepared:
    x = torch.randn(numbers)
    return lambda: dist.all_reduce(x.clone()), 2 * 4 * numbers * (ranks - 1) / ranks


def _all_gather(numbers: int, ranks: int, rank: int) -> Prepared:
    own, sizes = torch.randn(numbers // ranks), (numbers // ranks,) * ranks
    group = _world()
    return lambda: all_gather_rows(own, group, sizes), 4 * own.numel() * (ranks - 1)


def _reduce_scatter(numbers: int, ranks: int, rank: int) -> Prepared:
    x, sizes = torch.randn(numbers), (numbers // ranks,) * ranks
    group = _world()
    return lambda: reduce_scatter_rows(x, group, sizes), 4 * numbers * (ranks - 1) / ranks


def _all_to_all(numbers: int, ranks: int, rank: int) -> Prepared:
    x, sizes = torch.randn(numbers), (numbers // ranks,) * ranks
    group = _world()
    return lambda: exchange_rows(x, group, sizes, sizes), 4 * numbers * (ranks - 1) / ranks


def _send(numbers: int, ranks: int, rank: int) -> Prepared:
    sent, received = torch.randn(numbers), torch.empty(numbers)

    def call() -> None:
        operations = [
            dist.P2POp(dist.isend, sent, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return call, 4 * numbers


_COLLECTIVES: dict[str, Callable[[int, int, int], Prepared]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "send": _send,
}


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
