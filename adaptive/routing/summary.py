"""RoutingWindow: the RoutingRecords of many batches on many ranks, as one set of numbers.

Counts add up; means are weighted by the tokens they are over; the standard deviation of weights is
that of all of them together; auxiliary losses are sums of shares. Shape legend: E units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive.routing.tape import RoutingRecord

Number = Tensor | float
Summary = dict[str, float]

# Statistic -> (field of the record, its power, what it is weighted by).
_MEANS = {
    "entropy": ("entropy", 1, "tokens"),
    "dropped": ("dropped", 1, "tokens"),
    "predictor_accuracy": ("predictor_accuracy", 1, "tokens"),
    "planned_share": ("planned_share", 1, "tokens"),
    "dead_units": ("dead_units", 1, "tokens"),
    "weight_mean": ("weight_mean", 1, "executed"),
    "weight_mean_square": ("weight_mean", 2, "executed"),
    "weight_variance": ("weight_std", 2, "executed"),
}


class _Shape(NamedTuple):
    """What a module's records hold: the same on every rank once agreed."""

    name: str
    units: int
    choices: int
    losses: tuple[str, ...]
    statistics: tuple[str, ...]

    def union(self, other: _Shape) -> _Shape:
        losses = tuple(sorted({*self.losses, *other.losses}))
        statistics = tuple(sorted({*self.statistics, *other.statistics}))
        units, choices = max(self.units, other.units), max(self.choices, other.choices)
        return _Shape(self.name, units, choices, losses, statistics)

    @property
    def slots(self) -> list[str]:
        """Names of its numbers in the packed vector, before its load."""
        means = [f"{part}:{name}" for name in _MEANS for part in ("sum", "weight")]
        statistics = [f"{part}:{name}" for name in self.statistics for part in ("sum", "weight")]
        return ["tokens", "executed", *means, *self.losses, *statistics]

    @property
    def size(self) -> int:
        return len(self.slots) + self.units


class RoutingWindow:
    """Collects records and reduces them.

    Args:
        group: ranks whose tokens differ (data and context ranks); None: this rank alone.

    Attributes:
        loads: of the last reduction, tokens that each unit received, by module.
        losses: of the last reduction, each auxiliary loss, before its coefficient, summed over
            modules.

    Which statistics there are is agreed between the ranks once, and again when one has a new one;
    otherwise a reduction is a single all-reduce.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        self._records: dict[str, list[RoutingRecord]] = {}
        self._agreed: dict[str, _Shape] = {}
        self._have_met = False
        self.loads: dict[str, list[float]] = {}
        self.losses: dict[str, float] = {}

    def add(self, records: Iterable[RoutingRecord]) -> None:
        """Keep the scalars of some records. Computes nothing."""
        for record in records:
            light = replace(record, weights=None, chosen=None, scores=None)
            self._records.setdefault(record.name, []).append(light)

    @property
    def records(self) -> list[RoutingRecord]:
        """The records since the last reduction, without their values for each token."""
        return [record for records in self._records.values() for record in records]

    def reduce(
        self, extra: Sequence[Number] = (), *, steps: int = 1, device: torch.device | None = None
    ) -> tuple[dict[str, Summary], list[float]]:
        """Summaries of all ranks' records since the last call, by module. A collective.

        Args:
            extra: numbers to sum over the ranks in the same all-reduce, as many on every rank.
            steps: optimizer steps since the last call: losses are means over them.
            device: where to sum; by default where the records are.

        Synchronises with the host once.
        """
        shapes = {name: _shape(name, records) for name, records in self._records.items()}
        if self._group is None or not self._have_met:
            self._agree(shapes)
            self._have_met = True
        numbers = self._sum(shapes, extra, device)
        if numbers[0] > 0:  # Some rank has a statistic that was not agreed upon.
            self._agree(shapes)
            numbers = self._sum(shapes, extra, device)
        self._records, self.loads, self.losses = {}, {}, {}
        summaries, start = {}, 1 + len(extra)
        for shape in self._agreed.values():
            end = start + shape.size
            if numbers[start] > 0:
                summary = _summary(shape, numbers[start:end], steps)
                summaries[shape.name] = summary
                for name in shape.losses:
                    self.losses[name] = self.losses.get(name, 0.0) + summary[name]
                if shape.units:
                    self.loads[shape.name] = numbers[end - shape.units : end]
            start = end
        return summaries, numbers[1 : 1 + len(extra)]

    def _sum(
        self, shapes: dict[str, _Shape], extra: Sequence[Number], device: torch.device | None
    ) -> list[float]:
        packed = self._pack(shapes, extra, device)
        if self._group is not None:
            dist.all_reduce(packed, group=self._group)
        return packed.tolist()

    def _agree(self, shapes: dict[str, _Shape]) -> None:
        everyone: list[dict[str, _Shape]] = [shapes]
        if self._group is not None:
            everyone = [{} for _ in range(dist.get_world_size(self._group))]
            dist.all_gather_object(everyone, shapes, group=self._group)
        for theirs in everyone:
            for name, shape in theirs.items():
                known = self._agreed.get(name)
                self._agreed[name] = shape if known is None else known.union(shape)

    def _pack(
        self, shapes: dict[str, _Shape], extra: Sequence[Number], device: torch.device | None
    ) -> Tensor:
        """float64: whether more must be agreed; the extra numbers; each module's slots and load."""
        unknown = any(
            name not in self._agreed or self._agreed[name].union(shape) != self._agreed[name]
            for name, shape in shapes.items()
        )
        entries = _Entries()
        entries.add(0, float(unknown))
        for index, number in enumerate(extra):
            entries.add(1 + index, number)
        loads: list[tuple[int, Tensor]] = []
        sizes = [shape.size for shape in self._agreed.values()]
        starts = list(accumulate(sizes, initial=1 + len(extra)))
        for start, shape in zip(starts, self._agreed.values(), strict=False):
            slots = {slot: start + index for index, slot in enumerate(shape.slots)}
            records = self._records.get(shape.name, [])
            for record in records:
                entries.add_record(record, slots)
            held = [r.load for r in records if r.load is not None]
            if held:
                loads.append((start + len(slots), torch.stack(held).sum(0).double()))
        packed = entries.sums(starts[-1], device)
        for start, load_E in loads:
            packed[start : start + load_E.shape[0]] += load_E.to(packed.device)
        return packed


class _Entries:
    """Numbers to be added up in slots: value ** power * weight, all at once."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.values: list[Number] = []
        self.powers: list[int] = []
        self.weights: list[Number] = []

    def add(self, slot: int, value: Number, *, power: int = 1, weight: Number = 1.0) -> None:
        self.slots.append(slot)
        self.values.append(value)
        self.powers.append(power)
        self.weights.append(weight)

    def add_mean(
        self, slots: dict[str, int], name: str, value: Number, *, power: int, weight: Number
    ) -> None:
        if f"sum:{name}" in slots:
            self.add(slots[f"sum:{name}"], value, power=power, weight=weight)
            self.add(slots[f"weight:{name}"], weight)

    def add_record(self, record: RoutingRecord, slots: dict[str, int]) -> None:
        self.add(slots["tokens"], record.tokens)
        self.add(slots["executed"], record.executed)
        for name, (attribute, power, per) in _MEANS.items():
            value = getattr(record, attribute)
            if value is not None:
                self.add_mean(slots, name, value, power=power, weight=getattr(record, per))
        for name, value in record.statistics.items():
            self.add_mean(slots, name, value, power=1, weight=1.0)
        for name, value in record.losses.items():
            if name in slots:
                self.add(slots[name], value)

    def sums(self, size: int, device: torch.device | None) -> Tensor:
        if device is None:
            numbers = (*self.values, *self.weights)
            device = next((x.device for x in numbers if isinstance(x, Tensor)), torch.device("cpu"))
        values, weights = _as_vector(self.values, device), _as_vector(self.weights, device)
        slots = torch.tensor(self.slots).to(device, non_blocking=True)
        powers = torch.tensor(self.powers).to(device, non_blocking=True)
        terms = values.pow(powers) * weights
        out = torch.zeros(size, dtype=torch.float64, device=device)
        return out.index_add_(0, slots, terms)


def _as_vector(numbers: Sequence[Number], device: torch.device) -> Tensor:
    """float64 vector of Python numbers and scalar tensors of any dtype, without waiting for any."""
    plain = [0.0 if isinstance(x, Tensor) else float(x) for x in numbers]
    out = torch.tensor(plain, dtype=torch.float64).to(device, non_blocking=True)
    by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, number in enumerate(numbers):
        if isinstance(number, Tensor):
            by_kind.setdefault((number.dtype, number.device), []).append(index)
    for indices in by_kind.values():
        # The filter keeps the type checker content; all of these are tensors.
        tensors = [x.detach().reshape(()) for i in indices if isinstance(x := numbers[i], Tensor)]
        places = torch.tensor(indices).to(device, non_blocking=True)
        out[places] = torch.stack(tensors).to(device, torch.float64)
    return out


def _shape(name: str, records: Sequence[RoutingRecord]) -> _Shape:
    loads = [record.load.shape[0] for record in records if record.load is not None]
    losses = sorted({key for record in records for key in record.losses})
    statistics = sorted({key for record in records for key in record.statistics})
    units = max(loads, default=0)
    choices = max([units, *(record.choices or 0 for record in records)])
    return _Shape(name, units, choices, tuple(losses), tuple(statistics))


def _summary(shape: _Shape, numbers: list[float], steps: int) -> Summary:
    slots = dict(zip(shape.slots, numbers, strict=False))
    load = numbers[len(shape.slots) :]
    tokens, executed = slots["tokens"], slots["executed"]
    summary = {"tokens": tokens, "executed": executed, "executed_share": executed / tokens}
    for name in (*_MEANS, *shape.statistics):
        weight = slots[f"weight:{name}"]
        if weight > 0:
            summary[name] = slots[f"sum:{name}"] / weight
    mean_square = summary.pop("weight_mean_square", None)
    variance = summary.pop("weight_variance", None)
    if variance is not None and mean_square is not None:
        spread = variance + mean_square - summary["weight_mean"] ** 2
        # `max` would hide a NaN.
        summary["weight_std"] = spread**0.5 if not spread < 0 else 0.0
    if load:
        units, total = len(load), sum(load)
        summary["units"] = units
        summary["dead_units"] = sum(count == 0 for count in load)
        if total > 0:
            summary["load_over_mean"] = max(load) * units / total
            summary["least_load_over_mean"] = min(load) * units / total
    if "entropy" in summary:
        # A router without units chooses between yes and no.
        summary["entropy_share"] = summary["entropy"] / math.log(max(shape.choices, 2))
    for name in shape.losses:
        summary[name] = slots[name] / steps
    return summary
