"""Faults: parallel training broken on purpose, one way at a time.

A parity check that never fails proves nothing. Each fault here is a mistake that real projects
have made; the check must catch it wherever the mesh gives it something to break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.gradients import is_expert
from parallel.mesh import Mesh


@contextmanager
def skip_one_all_reduce(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """One all-reduce of a gradient does not take place: the first of the first backward.

    On a mesh whose backward reduces nothing: the average of the first parameter's gradient.
    """
    with _SkipOne(model):
        yield


@contextmanager
def scale_expert_gradients(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Gradients of experts are larger by the expert degree, as when they are averaged wrongly."""
    experts = [p for p in model.parameters() if is_expert(p)]
    hooks = [p.register_hook(lambda grad: grad * mesh.expert) for p in experts]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def detach_routers(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """What routers return is cut from the graph: they never learn."""
    routers = [module for name, module in model.named_modules() if _last(name) == "router"]
    hooks = [router.register_forward_hook(_detached) for router in routers]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def keep_router_gradients_apart(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Routers' gradients are not summed over the tensor ranks, which have seen other tokens."""
    with _without_mesh(model, lambda name, _: _last(name) in ("router", "predictor")):
        yield


@contextmanager
def keep_norm_gradients_apart(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Norm weights' gradients are not summed over the tensor ranks."""
    with _without_mesh(model, lambda _, module: "Norm" in type(module).__name__):
        yield


@contextmanager
def count_own_experts_only(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """The gradient norm, hence clipping, sees the experts of this rank only."""
    from parallel import parity

    honest = parity.clip_gradients
    blind = replace(mesh, expert_group=None)
    broken: Any = lambda parameters, limit, _: honest(parameters, limit, blind)  # noqa: E731
    parity.clip_gradients = broken
    try:
        yield
    finally:
        parity.clip_gradients = honest


Fault = Callable[[nn.Module, Mesh], Any]

FAULTS: dict[str, Fault] = {
    function.__name__: function
    for function in (
        skip_one_all_reduce,
        scale_expert_gradients,
        detach_routers,
        keep_router_gradients_apart,
        keep_norm_gradients_apart,
        count_own_experts_only,
    )
}


class _SkipOne(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = next(p for p in model.parameters() if p.requires_grad)
        self.skipped = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name == "c10d::allreduce_" and not self.skipped and self._of_gradient(args[0]):
            self.skipped = True
            # The others take part as before; what comes of it is thrown away here.
            args = ([tensor.clone() for tensor in args[0]], *args[1:])
        return func(*args, **(kwargs or {}))

    def _of_gradient(self, tensors: list[torch.Tensor]) -> bool:
        if torch._C._current_graph_task_id() != -1:
            return True
        grad = self.first.grad
        return grad is not None and tensors[0].data_ptr() == grad.data_ptr()


@contextmanager
def _without_mesh(model: nn.Module, chosen: Callable[[str, nn.Module], bool]) -> Iterator[None]:
    changed: list[tuple[Any, Mesh]] = []
    for name, module in model.named_modules():
        if chosen(name, module) and isinstance(getattr(module, "mesh", None), Mesh):
            changed.append((module, module.mesh))
            module.mesh = Mesh.single()
    yield
    for module, mesh in changed:
        module.mesh = mesh


def _detached(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.detach()


def _last(name: str) -> str:
    return name.rpartition(".")[2]
