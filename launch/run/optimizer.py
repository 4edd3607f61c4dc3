"""The optimizer of a run: its parameter groups, its schedule, and the audit of both."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from launch.run.sections import TrainConfig

Named = tuple[str, nn.Parameter]


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, object]]:
    """Groups for AdamW: matrices, which decay, and everything else, which does not.

    A parameter with an attribute `rate` is in groups of those that have the same, whose learning
    rate is that share of the run's. One of no elements has nothing to step; DeepSpeed's shards
    cannot hold it.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    groups: list[dict[str, object]] = []
    for rate in sorted({rate_of(p) for p in trained}, reverse=True):
        alike = [p for p in trained if rate_of(p) == rate]
        matrices = [p for p in alike if p.ndim >= 2]
        others = [p for p in alike if p.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": train.weight_decay, "rate": rate},
            {"params": others, "weight_decay": 0.0, "rate": rate},
        ]
    return [group for group in groups if group["params"]]


def rate_of(parameter: nn.Parameter) -> float:
    """The share of the run's learning rate that a parameter is trained at."""
    return float(getattr(parameter, "rate", 1.0))


def audit_groups(model: nn.Module, groups: Iterable[dict[str, object]]) -> str:
    """Check that every trainable parameter is in exactly one group; one line that says so.

    Raises:
        ValueError: names the first parameter that is in none, in several, or not of the model.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    seen: dict[int, int] = {}
    sizes = []
    for group in groups:
        parameters = list(group["params"])  # type: ignore[call-overload]
        count = sum(p.numel() for p in parameters)
        sizes.append((len(parameters), count, group["weight_decay"], group["rate"]))
        for parameter in parameters:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    for key, name in names.items():
        if seen.get(key, 0) != 1:
            raise ValueError(f"{name}: must be in one optimizer group, is in {seen.get(key, 0)}")
    if len(seen) != len(names):
        raise ValueError(f"optimizer: has {len(seen) - len(names)} parameters not of the model")
    total = sum(count for _, count, _, _ in sizes)
    parts = ", ".join(
        f"{n} tensors with weight decay {decay}" + (f" at {rate} of the rate" if rate != 1 else "")
        for n, _, decay, rate in sizes
    )
    return f"optimizer: {total:,} parameters, each in exactly one group ({parts})"


def learning_rate_at(step: int, train: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to its share `final_learning_rate`.

    Args:
        step: of this phase, from 0. The first step already moves the weights.
        train: the phase's own section.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    falling = max(train.steps - train.warmup_steps, 1)
    progress = min((step - train.warmup_steps) / falling, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = train.final_learning_rate
    return train.learning_rate * (floor + (1 - floor) * cosine)
