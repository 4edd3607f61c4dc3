"""Alarms: what in a run's routing deserves a person's attention, said in one line each.

An alarm is raised when its condition begins and again only after it has ended in between. The
numbers are sums over all ranks, so every rank raises the same alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong.

    Attributes:
        step: training step at which it was seen.
        layer: the routed module's name; "" for the run as a whole.
        kind: e.g. "dead_units"; stable, for programs.
        message: what is wrong and by how much, without layer or step.
    """

    step: int
    layer: str
    kind: str
    message: str

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"alarm at step {self.step}: {where}{self.message}"


@dataclass(frozen=True)
class AlarmLimits:
    """When routing counts as broken.

    Attributes:
        patience: steps before routers are judged: they begin undecided.
        load_over_mean: most tokens a unit may get, as a multiple of the mean.
        tokens_per_unit: tokens per unit that a window must hold before units are called dead.
        entropy_share: least mean entropy of a router, as a share of its maximum (ln of the number
            of units; ln 2 for a choice of yes or no).
        predictor_margin: a predictor must agree with the choice this much more often than one that
            says yes as often, at random. (One that always says no is such a one.)
        drift: largest difference between the executed and the planned share of tokens.
        dropped: largest share of dropped tokens.
    """

    patience: int = 100
    load_over_mean: float = 4.0
    tokens_per_unit: int = 64
    entropy_share: float = 0.02
    predictor_margin: float = 0.005
    drift: float = 0.1
    dropped: float = 0.2


class Alarms:
    """Judges summaries of routing, remembering which conditions already hold."""

    def __init__(self, limits: AlarmLimits | None = None) -> None:
        self.limits = AlarmLimits() if limits is None else limits
        self._standing: dict[str, set[tuple[str, str]]] = {}
        self._non_finite: set[str] = set()

    def check_run(self, step: int, scalars: Mapping[str, float]) -> list[Alarm]:
        """Alarms about scalars of the run itself: each must be finite.

        Each scalar's condition lasts until the scalar itself is finite again: some are known at
        few steps only (a validation loss).
        """
        wrong = {name: value for name, value in scalars.items() if not math.isfinite(value)}
        begun = [
            f"{name} is {value}" for name, value in wrong.items() if name not in self._non_finite
        ]
        self._non_finite = (self._non_finite - scalars.keys()) | wrong.keys()
        return [Alarm(step, "", "non_finite", ", ".join(begun))] if begun else []

    def check_routing(
        self, step: int, summaries: Mapping[str, Mapping[str, float]], *, of: str = "training"
    ) -> list[Alarm]:
        """Alarms about routed modules.

        Args:
            step: training step.
            summaries: statistics by module name, as `Monitor` reduces them.
            of: which batches they are of; a condition is remembered for each apart.
        """
        found = list(_not_finite(step, summaries))
        found += [
            Alarm(step, layer, kind, message)
            for layer, summary in summaries.items()
            for kind, message in self._wrong(step, summary)
        ]
        return self._newly_raised(of, found)

    def _newly_raised(self, of: str, found: list[Alarm]) -> list[Alarm]:
        before = self._standing.get(of, set())
        self._standing[of] = {(alarm.layer, alarm.kind) for alarm in found}
        return [alarm for alarm in found if (alarm.layer, alarm.kind) not in before]

    def _wrong(self, step: int, summary: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        limits = self.limits
        if step < limits.patience:
            return
        units = summary.get("units", 0)
        dead, most = summary.get("dead_units", 0), summary.get("load_over_mean", 1)
        enough = summary["executed"] >= limits.tokens_per_unit * units
        if units and enough and dead >= 1:
            yield "dead_units", f"{dead:.0f} of {units:.0f} experts got no token (dead)"
        if units and enough and most > limits.load_over_mean:
            yield "load", f"one expert got {most:.1f} times the mean load (router collapse)"
        entropy = summary.get("entropy_share")
        if entropy is not None and entropy < limits.entropy_share:
            yield (
                "entropy",
                f"router entropy is {entropy:.1%} of its maximum: the router is saturated "
                "(entropy collapse)",
            )
        accuracy = summary.get("predictor_accuracy")
        if accuracy is not None and summary["tokens"]:
            share = summary["executed_share"]
            said = summary.get("predicted_share", 0.0)
            chance = share * said + (1 - share) * (1 - said)
            if share < 1 and accuracy < chance + limits.predictor_margin:
                yield (
                    "predictor",
                    f"the predictor agrees with {accuracy:.1%} of choices, no more than chance "
                    f"({chance:.1%}): sampling would not choose as training did",
                )
        planned = summary.get("planned_share")
        if planned is not None and abs(summary["executed_share"] - planned) > limits.drift:
            yield (
                "drift",
                f"{summary['executed_share']:.1%} of tokens executed, {planned:.1%} planned "
                "(capacity drift)",
            )
        dropped = summary.get("dropped")
        if dropped is not None and dropped > limits.dropped:
            yield "dropped", f"{dropped:.1%} of assignments dropped for lack of capacity"


def _not_finite(step: int, summaries: Mapping[str, Mapping[str, float]]) -> Iterator[Alarm]:
    """One alarm for all layers, at the first: what follows it has its values from there."""
    wrong = {
        layer: names
        for layer, summary in summaries.items()
        if (names := [name for name, value in summary.items() if not math.isfinite(value)])
    }
    for layer, names in list(wrong.items())[:1]:
        others = f" (nor in {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Alarm(step, layer, "non_finite", f"{', '.join(names)} not finite{others}")
