"""Steps whose gradient is not finite: seen by every rank alike, and undone without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.run.gradient_groups import own_gradients


def gradient_is_finite(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Any, device: torch.device
) -> bool:
    """Whether all ranks' parts of the averaged gradient are finite. A collective of one number.

    Args:
        parameters: of the model, by name.
        optimizer: DeepSpeed's, between the last backward of a step and the step.
        device: of the collective.
    """
    own = [gradient for _, _, gradient in own_gradients(parameters, optimizer) if gradient.numel()]
    wrong = torch.zeros((), device=device)
    if own:
        # One pass, and what is not a number stays none.
        largest = torch.nn.utils.get_total_norm(own, norm_type=float("inf"))
        wrong += (~largest.isfinite()).to(wrong)
    if dist.get_world_size() > 1:
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
    return not bool(wrong)


@contextmanager
def without_step(optimizer: Any) -> Iterator[None]:
    """Let DeepSpeed step as ever, but for the optimizer itself: weights and moments stay."""
    inner = getattr(optimizer, "optimizer", optimizer)
    replaced = vars(inner).get("step")
    inner.step = lambda *_, **__: None
    try:
        yield
    finally:
        if replaced is None:
            del inner.step
        else:
            inner.step = replaced


class Counters:
    """What a model counts from step to step (loads, prices): its persistent buffers, copied."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def restore(self) -> None:
        for module, name, kept in self._held:
            getattr(module, name).copy_(kept)
