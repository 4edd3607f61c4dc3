"""Traces: what a training run did, and where two of them differ, by name and worst first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.checks.choices import Choices, Difference, first_difference


@dataclass
class Trace:
    """What a training run did: whole tensors by name, on the CPU, after or at each step.

    Attributes:
        losses, norms: of every step.
        gradients: of the first step, averaged, before clipping.
        updates: weights after the first step less those before.
        weights: after the last step.
        choices: of the routers, of every step, where the subject tells.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: list[Choices] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference, relative to the quantity's size."""

    quantity: str
    name: str
    error: float
    size: float


@dataclass
class Report:
    """Every comparison of one mesh with one rank, worst first.

    Attributes:
        mesh: as it is written on the command line.
        tolerance: largest relative error that counts as agreement.
        rows: where a tie was chosen otherwise, only those of what came before it.
        difference: the first choice of a router that was another one.
    """

    mesh: str
    tolerance: float
    rows: list[Row]
    difference: Difference | None = None

    @property
    def ok(self) -> bool:
        chose = self.difference is None or self.difference.tied
        return chose and all(row.error <= self.tolerance for row in self.rows)

    @property
    def worst(self) -> Row:
        return self.rows[0]

    def disagreeing(self, quantity: str | None = None) -> list[str]:
        """Names of what disagrees, worst first."""
        rows = [r for r in self.rows if r.error > self.tolerance]
        return [r.name for r in rows if quantity in (None, r.quantity)]

    def table(self, limit: int = 20) -> str:
        """A text table, worst first; names what was left out."""
        if not self.rows:
            return "nothing came before it that could be compared: try another seed"
        width = max(len(row.name) for row in self.rows[:limit])
        lines = [f"{'':9} {'quantity':<9} {'name':<{width}} {'error':>9} {'size':>9}"]
        for row in self.rows[:limit]:
            verdict = "ok" if row.error <= self.tolerance else "DISAGREES"
            cells = f"{row.quantity:<9} {row.name:<{width}} {row.error:9.1e} {row.size:9.1e}"
            lines.append(f"{verdict:9} {cells}")
        left = self.rows[limit:]
        if left:
            bad = sum(row.error > self.tolerance for row in left)
            lines.append(f"… {len(left)} more, {bad} of them disagree")
        return "\n".join(lines)


def compare(reference: Trace, trace: Trace, *, mesh: str, tolerance: float = 1e-5) -> Report:
    """Compare two traces.

    The error of a tensor is its largest difference over its largest element, or over a thousandth
    of the largest element of all tensors where that is more, so that the rounding of a gradient
    that cancels to nearly zero does not count as disagreement. An update is seen only
    as a difference of weights: one rounding of the weight is taken off.

    Where a router chose otherwise at a tie within rounding, both are right and go on differently:
    only what came before it is compared.
    """
    difference = first_difference(reference.choices, trace.choices, tolerance=tolerance)
    rows = []
    pairs = [("loss", reference.losses, trace.losses), ("norm", reference.norms, trace.norms)]
    for quantity, expected, found in pairs:
        for step, (a, b) in enumerate(zip(expected, found, strict=True)):
            rows.append(Row(quantity, f"step {step}", _error(abs(a - b), abs(a)), abs(a)))
    for quantity, name in (("gradient", "gradients"), ("update", "updates"), ("weight", "weights")):
        rounded = reference.weights if quantity == "update" else {}
        expected, found = getattr(reference, name), getattr(trace, name)
        rows += _compare_tensors(quantity, expected, found, rounded)
    if difference is not None and difference.tied:
        rows = [row for row in rows if _before(row, difference.step)]
    rows.sort(key=lambda row: -row.error)
    return Report(mesh, tolerance, rows, difference)


def _before(row: Row, step: int) -> bool:
    """Whether what is compared was there before a step."""
    if row.quantity in ("loss", "norm"):
        return int(row.name.removeprefix("step ")) < step
    return row.quantity != "weight" and step > 0


def _compare_tensors(
    quantity: str,
    expected: dict[str, Tensor],
    found: dict[str, Tensor],
    rounded: dict[str, Tensor],
) -> list[Row]:
    largest = max((float(t.abs().max()) for t in expected.values() if t.numel()), default=0.0)
    floor = largest / 1000
    rows = []
    for name in sorted({*expected, *found}):
        a, b = expected.get(name), found.get(name)
        if a is None or b is None or a.shape != b.shape:
            rows.append(Row(quantity, name, float("inf"), 0.0))
            continue
        size = float(a.abs().max()) if a.numel() else 0.0
        difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        if name in rounded:
            weight = rounded[name]
            difference -= torch.finfo(weight.dtype).eps * float(weight.abs().max())
            difference = max(difference, 0.0)
        rows.append(Row(quantity, name, _error(difference, max(size, floor)), size))
    return rows


def _error(difference: float, size: float) -> float:
    if difference != difference:
        return float("inf")
    return difference / size if size else difference
