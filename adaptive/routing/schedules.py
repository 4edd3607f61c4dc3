"""What follows the depth of a layer, and the training step.

A schedule over depth is a list of capacities, one a layer; 1.0 is a dense layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

DepthSchedule = Literal["every_other", "all", "linear", "cosine"]


def start_step(model: nn.Module, step: int) -> None:
    """Tell every module of a model that an optimizer step begins.

    Call it before each step of a loop of your own. A module that follows the step (an annealed
    capacity, a Gumbel temperature, the bias that balances experts) has a method `start_step(step)`,
    which speaks for the module itself: those inside it are told too.

    Args:
        model: any module; a wrapper of an engine around one as well.
        step: number of the step, from 0.
    """
    for module in model.modules():
        # Looked up on the type: an engine hands unknown attributes on to what it wraps.
        if callable(getattr(type(module), "start_step", None)):
            module.start_step(step)  # type: ignore[operator]


def capacities_over_depth(
    num_layers: int,
    *,
    capacity: float = 0.125,
    schedule: DepthSchedule | list[int] = "every_other",
    floor: float | None = None,
    dense_above: float = 0.85,
    key: str = "schedule",
) -> list[float]:
    """The capacity of every layer.

    Args:
        num_layers: layers of the model.
        capacity: share of tokens that routed layers keep, in (0, 1].
        schedule: "every_other" routes layers 1, 3, 5, … (the paper's); "all" routes each;
            a list names the routed layers; "linear" falls from 1 at the first layer to
            `floor` at the last; "cosine" follows `½cos(πl/(L-1)) + ½`.
        floor: lowest capacity of the falling schedules, by default `capacity`.
        dense_above: layers whose scheduled capacity is above this are dense.
        key: what `schedule` is called where the user gives it.

    Returns:
        One capacity a layer, in (0, 1].

    Raises:
        ValueError: a capacity out of range, or a schedule that routes no layer (a `capacity` of 1
            is asked for, and may).

    Sources: Mixture-of-Depths, arXiv 2404.02258, section 4; progressive ratio decay,
    p-MoD, arXiv 2412.04449, section 3.3.
    """
    floor = capacity if floor is None else floor
    for name, value in (("capacity", capacity), ("floor", floor), ("dense_above", dense_above)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value}: must be in (0, 1]")
    if isinstance(schedule, list):
        named = set(listed_layers(schedule, num_layers, key=key))
        return [capacity if layer in named else 1.0 for layer in range(num_layers)]
    if schedule == "every_other":
        if num_layers == 1:
            raise ValueError(f"{key}=every_other: routes layers 1, 3, 5, …, which 1 layer has not")
        return [capacity if layer % 2 else 1.0 for layer in range(num_layers)]
    if schedule == "all":
        return [capacity] * num_layers
    if schedule not in ("linear", "cosine"):
        raise ValueError(
            f"{key}={schedule!r}: must be every_other, all, linear, cosine or a list of layers"
        )
    last = max(num_layers - 1, 1)
    ratios = [
        1 - layer / last if schedule == "linear" else 0.5 * math.cos(math.pi * layer / last) + 0.5
        for layer in range(num_layers)
    ]
    clipped = [max(ratio, floor) for ratio in ratios]
    if min(clipped) > dense_above and capacity < 1:
        raise ValueError(
            f"{key}={schedule}: routes no layer of {num_layers}, all are above "
            f"dense_above={dense_above}; floor (or capacity) and dense_above decide it"
        )
    return [1.0 if ratio > dense_above else ratio for ratio in clipped]


def listed_layers(layers: Sequence[int], num_layers: int, *, key: str) -> list[int]:
    """The layers that a list names, ascending.

    Args:
        layers: indices.
        num_layers: layers of the model.
        key: what the list is called where the user gives it.

    Raises:
        ValueError: it names none, one that is not there, or one twice.
    """
    said = f"{key}={list(layers)}"
    if not layers:
        raise ValueError(f"{said}: must name at least one layer")
    for place, layer in enumerate(layers):
        if not 0 <= layer < num_layers:
            raise ValueError(f"{said}: layer {layer} must be between 0 and {num_layers - 1}")
        if layer in layers[:place]:
            raise ValueError(f"{said}: names layer {layer} twice")
    return sorted(layers)


def annealed_capacity(step: int, *, start: float, end: float, steps: int) -> float:
    """The capacity at `step` when it goes linearly from `start` to `end` within `steps` steps."""
    for name, value in (("start", start), ("end", end)):
        if not 0 < value <= 1:
            raise ValueError(f"capacity {name}={value}: must be in (0, 1]")
    if steps < 1:
        raise ValueError(f"annealing steps={steps}: must be at least 1")
    return start + (end - start) * min(max(step, 0), steps) / steps
