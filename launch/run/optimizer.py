"""The optimizer of a run: its parameter groups, its schedule, and the audit of both."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from launch.run.sections import TrainConfig

Named = tuple[str, nn.Parameter]


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, object]]:
    """Two groups for AdamW: matrices, which decay, and everything else, which does not.

    A parameter of no elements has nothing to step; DeepSpeed's shards cannot hold it.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    matrices = [p for p in trained if p.ndim >= 2]
    others = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
        sizes.append((len(parameters), sum(p.numel() for p in parameters), group["weight_decay"]))
        for parameter in parameters:
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    for key, name in names.items():
        if seen.get(key, 0) != 1:
            raise ValueError(f"{name}: must be in one optimizer group, is in {seen.get(key, 0)}")
    if len(seen) != len(names):
        raise ValueError(f"optimizer: has {len(seen) - len(names)} parameters not of the model")
    total = sum(count for _, count, _ in sizes)
    parts = ", ".join(f"{n} tensors with weight decay {decay}" for n, _, decay in sizes)
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
