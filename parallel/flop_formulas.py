"""How many operations our operators cost, told to `torch.utils.flop_counter`.

That module imports triton, which `import adaptive` must not; and a counter copies its formulas when
it is made, so telling it at the first call of an operator is too late. Formulas therefore wait
here until somebody imports the counter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TypeVar

import torch

_COUNTER = "torch.utils.flop_counter"

Formula = TypeVar("Formula", bound=Callable[..., int])
_Given = tuple[Any, Callable[..., int], bool]


def flop_formula(
    operator: torch._ops.OpOverloadPacket, *, raw: bool = False
) -> Callable[[Formula], Formula]:
    """Decorates the formula by which torch's FLOP counter counts `operator`.

    Args:
        operator: such as `torch.ops.adaptive.grouped_rows`.
        raw: the formula takes the operator's tensors; else their shapes.
    """

    def add(formula: Formula) -> Formula:
        given = (operator, formula, raw)
        counter = sys.modules.get(_COUNTER)
        if counter is None:
            _WAITING.add(given)
        else:
            _tell(counter, given)
        return formula

    return add


def _tell(counter: ModuleType, given: _Given) -> None:
    operator, formula, raw = given
    counter.register_flop_formula(operator, get_raw=raw)(formula)


class _Waiting(MetaPathFinder):
    """Finds the counter's module as Python would, and tells it everything once it is there."""

    def __init__(self) -> None:
        self._given: list[_Given] = []

    def add(self, given: _Given) -> None:
        if not self._given:
            sys.meta_path.insert(0, self)
        self._given.append(given)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            for given in self._given:
                _tell(module, given)
            self._given.clear()

        # The loader object is this spec's own.
        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


_WAITING = _Waiting()
