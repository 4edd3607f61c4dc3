"""What an op computes in under autocast, which sees torch's operators and not ours."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Devices of shapes alone, as "meta", know none. Asked here: torch 2.11's compiler cannot.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def autocast_on(device_type: str) -> bool:
    """Whether autocast is on there."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def computing_dtype(x: Tensor) -> torch.dtype:
    """What products of `x` are computed in: autocast's type where it is on, else that of `x`."""
    device_type = x.device.type
    if autocast_on(device_type) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Operators inside compute in the dtypes that they are given."""
    if not autocast_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
