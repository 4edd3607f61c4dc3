"""A device that is the CPU by another name: tensors there do not mix with tensors on the CPU.

On a machine without a GPU a tensor made on the CPU by mistake goes unnoticed. `elsewhere` is a
device of its own to torch (its PrivateUse1 backend, in Python): values are computed on the CPU, but
an operator that is given tensors of both devices raises, as on a GPU, and every number that is
read back to the host is counted.

    with elsewhere() as reads:
        model = moved(model)
        model(ids.to(DEVICE)).sum().backward()
    assert not reads

Importing this registers the device for the whole process: `test_elsewhere.py` starts one for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
NAME = "elsewhere"
DEVICE = f"{NAME}:0"
# What takes tensors of two devices on a GPU as well, or one that only gives its size.
MIXING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}

# `x[indices] = 1.0` hands them a single number, on a GPU one on the CPU, which is copied.
COPYING = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}

ROOT = Path(__file__).parents[1]
OURS = (f"{ROOT}/adaptive/", f"{ROOT}/parallel/")


class Elsewhere(Tensor):
    """Holds a tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:  # not an operator: torch refuses it to subclasses
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {}, None)


class _Watch(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {}, self.reads)


def _run(func: Any, args: Any, kwargs: dict[str, Any], reads: list[str] | None) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Elsewhere)]
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else None
    if not there and target != NAME:
        return func(*args, **kwargs)
    if here and target == NAME and reads is not None and not kwargs.get("non_blocking"):
        reads.append(_caller(func))
    if there and func not in MIXING and any(x.dim() for x in here):
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on cpu, of shape {shapes}")
    waits = func in READING or target == "cpu" or (func in COPYING and args[2].dim() == 0)
    if there and reads is not None and waits:
        reads.append(_caller(func))
    plain_args, plain_kwargs = pytree.tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
    if target == NAME:
        plain_kwargs["device"] = torch.device("cpu")
    result = func(*plain_args, **plain_kwargs)
    known = {id(x.held): x for x in there}
    if func in MIXING and isinstance(args[0], Tensor) and func is not aten._to_copy.default:
        return args[0]
    if target == "cpu":
        return result

    def wrap(x: Tensor) -> Tensor:
        # A wrapper has no bit that says "conjugate when read".
        return known[id(x)] if id(x) in known else Elsewhere(x.resolve_conj().resolve_neg())

    wrapped = pytree.tree_map_only(Tensor, wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _caller(func: Any) -> str:
    """The operator and the line of ours that called it."""
    stack = traceback.extract_stack()
    ours = [frame for frame in stack if frame.filename.startswith(OURS)]
    at = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "the test"
    return f"{func} at {at}"


class _Module(_DummyBackendModule):
    """What torch asks of a device's module in activation recomputation."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _refuse(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("torch.tensor or new_tensor on a device: copies from the host and waits")


# Before the first backward of the process, which starts a thread for every device known by then.
_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
# `torch.tensor(…, device=DEVICE)` and `new_tensor` pass by every mode.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _refuse, "PrivateUse1")


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Watches tensors on the device; yields the list of what was read back to the host."""
    reads: list[str] = []
    with _Watch(reads):
        yield reads


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device; other tensors stay behind."""
    known: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, Elsewhere):
                    continue
                if id(tensor) not in known:
                    there: Tensor = Elsewhere(tensor.detach().clone())
                    if isinstance(tensor, nn.Parameter):
                        there = nn.Parameter(there, tensor.requires_grad)
                    known[id(tensor)] = there
                held[name] = known[id(tensor)]
    return module
