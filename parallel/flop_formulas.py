"""How many operations our operators cost, for `torch.utils.flop_counter`.

That module imports triton, which `import adaptive` must not, and it copies the formulas that it
knows when a counter is made. Ours therefore wait here for `torch_flop_counter`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Formula = TypeVar("Formula", bound=Callable[..., int])

_FORMULAS: dict[torch._ops.OpOverloadPacket, tuple[Callable[..., int], bool]] = {}


def flop_formula(
    operator: torch._ops.OpOverloadPacket, *, raw: bool = False
) -> Callable[[Formula], Formula]:
    """Decorates the formula by which `torch_flop_counter` counts `operator`.

    Args:
        operator: such as `torch.ops.adaptive.grouped_rows`.
        raw: the formula takes the operator's tensors; else their shapes.
    """

    def add(formula: Formula) -> Formula:
        _FORMULAS[operator] = formula, raw
        return formula

    return add


def torch_flop_counter(**options: Any) -> FlopCounterMode:
    """torch's FlopCounterMode, with these options of its own, that knows our operators too.

    From then on every counter that is made knows those that have been imported.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

    for operator, (formula, raw) in _FORMULAS.items():
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=raw)(formula)
    return FlopCounterMode(**options)
