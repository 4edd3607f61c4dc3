"""torch.compile of what a model's layers compute; routing stays as it is.

    names = compile_layers(model)      # before training, in place

Choosing tokens, packing them and recording who was chosen is Python that no compiler follows, and
little time. What is compiled are the largest parts of layers in which nothing is routed: a layer,
the layer inside a routed one, or the attention beside experts. Layers of one kind share a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from adaptive.blocks.protocol import RoutedBlock

# The halves by which some layers are called, where tokens merge between them.
_CALLED = ("forward", "attend", "feed_forward")


def compile_layers(model: nn.Module, **options: Any) -> list[str]:
    """Compile the layers of a model, in place, for forwards that have gradients.

    Parameters keep their names. Without gradients (evaluation, generation, a census) the model runs
    as before: choices are then of variable size, which would be compiled for over and over.

    Args:
        model: whose layers lie in `nn.ModuleList`s.
        options: of `torch.compile`.

    Returns:
        The names of the modules that are compiled; empty where there is nothing to compile.
    """
    names = {id(module): name for name, module in model.named_modules()}
    compiled = []
    for part in compiled_parts(model):
        for method in _CALLED:
            function = getattr(part, method, None)
            if function is not None:
                setattr(part, method, _with_gradients(function, options))
        compiled.append(names[id(part)])
    return compiled


def compiled_parts(module: nn.Module, *, in_layer: bool = False) -> Iterator[nn.Module]:
    """The largest modules of layers that neither route nor say `compiles = False`."""
    if in_layer and not isinstance(module, nn.ModuleList) and all(map(_compiles, module.modules())):
        yield module
        return
    for child in module.children():
        # What scores tokens is a product, whose choice would move by rounding.
        if not (isinstance(module, RoutedBlock) and _is_leaf(child)):
            inside = in_layer or isinstance(module, nn.ModuleList)
            yield from compiled_parts(child, in_layer=inside)


def _compiles(module: nn.Module) -> bool:
    return not isinstance(module, RoutedBlock) and getattr(module, "compiles", True)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _with_gradients(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, **options)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else function)(*args, **kwargs)

    return call


def graphs() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
