"""What one rank's machine can do: rates and links, published or measured.

`PUBLISHED` holds the peaks of vendors' data sheets and, apart from them, the shares of those peaks
that this library *assumes* are reached; nobody measured them here. `launch.planning.probe` measures
the machine that it runs on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
"""What crosses links, named as `parallel.checks.traffic.Traffic` names it."""


@dataclass(frozen=True)
class Link:
    """What a collective costs.

    Attributes:
        latency: seconds of one that sends next to nothing.
        bandwidth: bytes/s that a rank sends, of what comes beyond `curve`.
        curve: measured (bytes sent, seconds), ascending; between them lies a straight line. Empty:
            latency plus bytes over bandwidth.
    """

    latency: float
    bandwidth: float
    curve: tuple[tuple[float, float], ...] = ()

    def seconds(self, sent: float, count: float) -> float:
        """Of `count` collectives that send `sent` bytes together."""
        each = sent / count
        before, taken = 0.0, self.latency
        for reach, measured in self.curve:
            if each <= reach:
                return count * (taken + (measured - taken) * (each - before) / (reach - before))
            before, taken = reach, measured
        return count * (taken + (each - before) / self.bandwidth)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, as reached, not as peaks.

    Attributes:
        name, source: what it is, and where the figures come from.
        memory: bytes of one rank.
        products: FLOP/s of matrix products.
        attention: FLOP/s of attention's products.
        causal_share: of the square of pairs, what a causal kernel executes.
        passes: bytes/s that element-wise work reads and writes.
        operator: seconds to issue one operator.
        links: of each of `OPERATIONS`, between ranks of one machine.
        network: between machines.
        ranks: of one machine; more cross the network.
        cores: that the ranks of a machine share; None: each has a device of its own.
        asynchronous: operators are issued ahead of their execution (GPUs), so that of both times
            the longer counts; else their sum.
    """

    name: str
    source: str
    memory: float
    products: float
    attention: float
    passes: float
    operator: float
    links: Mapping[str, Link]
    network: Link
    ranks: int = 8
    cores: int | None = None
    asynchronous: bool = True
    causal_share: float = 0.5

    def ranks_per_core(self, ranks: int) -> float:
        """How many ranks take turns on one core."""
        here = min(ranks, self.ranks)
        return 1.0 if self.cores is None else max(1.0, here / self.cores)

    def link(self, operation: str, span: int) -> Link:
        """The link of a group whose ranks lie within `span` consecutive ranks."""
        return self.links[operation] if span <= self.ranks else self.network

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class DataSheet:
    """Published peaks of one GPU.

    Attributes:
        title: the product and where its figures are published.
        memory: bytes.
        tensor_16, tensor_32: FLOP/s of dense 16-bit products, and of 32-bit ones outside the
            tensor cores.
        memory_bandwidth: bytes/s.
        link, network: bytes/s in one direction, between GPUs of a machine and between machines.
    """

    title: str
    memory: float
    tensor_16: float
    tensor_32: float
    memory_bandwidth: float
    link: float
    network: float

    def machine(self, *, mixed: bool, efficiency: float = 0.5) -> Machine:
        """The machine that reaches assumed shares of these peaks.

        Args:
            mixed: products in 16 bits, else in 32.
            efficiency: share of the peak that products and attention reach. Memory and links are
                taken at 0.8 of theirs, a collective at 15 µs (30 µs between machines), issuing
                an operator at 5 µs.
        """
        peak = self.tensor_16 if mixed else self.tensor_32
        link = Link(15e-6, 0.8 * self.link)
        return Machine(
            name=self.title.split(",")[0],
            source=f"published peaks ({self.title}) x {efficiency:g} assumed; not measured",
            memory=self.memory,
            products=efficiency * peak,
            attention=efficiency * peak,
            passes=0.8 * self.memory_bandwidth,
            operator=5e-6,
            links=dict.fromkeys(OPERATIONS, link),
            network=Link(30e-6, 0.8 * self.network),
        )


PUBLISHED = {
    "a100": DataSheet(
        "A100 SXM 80 GB, NVIDIA data sheet; DGX A100, 200 Gb/s a GPU",
        80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9,
    ),
    "h100": DataSheet(
        "H100 SXM 80 GB, NVIDIA data sheet; DGX H100, 400 Gb/s a GPU",
        80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9,
    ),
    "h200": DataSheet(
        "H200 SXM 141 GB, NVIDIA data sheet; DGX H200, 400 Gb/s a GPU",
        141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9,
    ),
}  # fmt: skip


def between(first: Machine, second: Machine) -> Machine:
    """The machine whose every figure lies between two measurements: their geometric mean."""

    def mean(a: float, b: float) -> float:
        return math.sqrt(a * b)

    links = {}
    for (name, one), other in zip(first.links.items(), second.links.values(), strict=True):
        points = zip(one.curve, other.curve, strict=True)
        curve = tuple((sent, mean(taken, again)) for (sent, taken), (_, again) in points)
        links[name] = Link(
            mean(one.latency, other.latency), mean(one.bandwidth, other.bandwidth), curve
        )
    rates = ("products", "attention", "passes", "operator", "causal_share")
    means = {name: mean(getattr(first, name), getattr(second, name)) for name in rates}
    return replace(first, links=links, network=links["all_reduce"], **means)


def with_given(
    machine: Machine,
    *,
    memory: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    network: float | None = None,
) -> Machine:
    """The machine with some figures given by hand: GB, TFLOP/s reached, GB/s and GB/s reached."""
    if memory is not None:
        machine = replace(machine, memory=memory * 1e9)
    if tflops is not None:
        machine = replace(machine, products=tflops * 1e12, attention=tflops * 1e12)
    if bandwidth is not None:
        links = {n: Link(link.latency, bandwidth * 1e9) for n, link in machine.links.items()}
        machine = replace(machine, links=links)
    if network is not None:
        machine = replace(machine, network=Link(machine.network.latency, network * 1e9))
    return machine
