"""Which implementation of an op runs, and why not another.

An op has a reference in plain torch, which defines it, and may have faster implementations, each
with a test of whether it can serve the tensor at hand. The fastest that can serve is used.
`ADAPTIVE_BACKEND=reference|torch|triton|flash` asks for one by name; where that one
cannot serve, the reference does, and a warning says so once a process.

Triton's interpreter (`TRITON_INTERPRET=1`, set before Python starts) runs kernels on CPU tensors:
for tests, and only when `ADAPTIVE_BACKEND=triton` asks for it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "torch", "triton", "flash")
OPERATION_MODULES = (
    "cross_entropy",
    "expert_feed_forward",
    "grouped_linear",
    "merge",
    "pack",
    "parameter_attention",
    "permute",
    "ranking",
    "ring_attention",
    "rms_norm",
    "varlen_attention",
)
_TRITON_INSTALLED = find_spec("triton") is not None
_LIBRARIES = ("flash_attn", "flash_attn_interface")
# Asked once, here: torch 2.11's compiler refuses to trace find_spec. Of a module inside torch it
# would import the packages above, and triton with them.
_VARLEN = Path(torch.__file__).parent / "nn" / "attention" / "varlen.py"
_INSTALLED = frozenset(
    [name for name in _LIBRARIES if find_spec(name) is not None]
    + ["torch.nn.attention.varlen"] * _VARLEN.is_file()
)


Refusal = Callable[[Tensor], "str | None"]


def _always(_: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: "reference", "torch", "triton" or "flash".
        function: what runs.
        refuses: why it cannot serve tensors of this device and dtype, or None if it can. Asked once
            for each.
        refuses_call: why it cannot serve this tensor now (its shape; autocast), or None. Asked at
            every call; None: it serves whatever `refuses` lets pass.
    """

    name: str
    function: Callable[..., Any]
    refuses: Refusal = _always
    refuses_call: Refusal | None = None

    def refusal(self, example: Tensor) -> str | None:
        """Why it cannot serve the tensor, or None."""
        reason = self.refuses(example)
        return reason or (self.refuses_call(example) if self.refuses_call else None)


_REGISTRY: dict[str, list[Implementation]] = {}
_SERVING: dict[tuple[str, str, torch.device, torch.dtype], list[Implementation]] = {}
"""Of an op, under a value of ADAPTIVE_BACKEND: what serves a device and dtype, the first first."""


def register(op: str, name: str, function: Callable[..., Any], *refusals: Refusal) -> None:
    """Add an Implementation; the one registered last is preferred, the first is the reference."""
    _REGISTRY.setdefault(op, []).append(Implementation(name, function, *refusals))
    _SERVING.clear()


def choose(op: str, example: Tensor) -> Implementation:
    """The implementation of `op` for tensors like `example`."""
    wanted = os.environ.get("ADAPTIVE_BACKEND", "")
    place = op, wanted, example.device, example.dtype
    if place not in _SERVING:
        _SERVING[place] = _serving(op, wanted, example)
    for implementation in _SERVING[place]:
        if implementation.refuses_call is None or implementation.refuses_call(example) is None:
            return implementation
    # A compiler cannot trace a warning; it chooses the same, and says nothing.
    if not torch.compiler.is_dynamo_compiling():
        reasons = [i.refusal(example) or "" for i in _REGISTRY[op] if i.name == wanted]
        reason = reasons[0] if reasons else "this op has no such implementation"
        warn_once(op, f"ADAPTIVE_BACKEND={wanted}", reason)
    return _REGISTRY[op][0]


def _serving(op: str, wanted: str, example: Tensor) -> list[Implementation]:
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"ADAPTIVE_BACKEND={wanted}: must be one of {', '.join(BACKENDS)}")
    candidates = [i for i in reversed(_REGISTRY[op]) if not wanted or i.name == wanted]
    return [i for i in candidates if i.refuses(example) is None]


@contextmanager
def called_through(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Call what is registered by now as `wrap(op, function)` meanwhile."""
    before = {op: list(implementations) for op, implementations in _REGISTRY.items()}
    for op, implementations in before.items():
        _REGISTRY[op] = [replace(i, function=wrap(op, i.function)) for i in implementations]
    _SERVING.clear()
    try:
        yield
    finally:
        _REGISTRY.update(before)
        _SERVING.clear()


def explain(op: str, example: Tensor) -> dict[str, str]:
    """For every implementation of `op`: "chosen", "available" or why it cannot serve.

    Of several with one name (two versions of a library) the one that can serve is told.
    """
    chosen = choose(op, example)
    found: dict[str, str] = {}
    for candidate in _REGISTRY[op]:
        if candidate is chosen:
            found[candidate.name] = "chosen"
        elif found.get(candidate.name) not in ("chosen", "available"):
            found[candidate.name] = candidate.refusal(example) or "available"
    return found


def operations() -> list[str]:
    """The names of all ops. Imports every op's module, and no kernel."""
    for module in OPERATION_MODULES:
        importlib.import_module(f"adaptive.ops.{module}")
    return sorted(_REGISTRY)


def refuses_triton(example: Tensor) -> str | None:
    """Why our kernels cannot serve tensors like `example`, or None."""
    if example.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take float32, bfloat16 and float16, not {_name(example.dtype)}"
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if example.device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels have not been checked on AMD GPUs"
        major = torch.cuda.get_device_properties(example.device).major
        return None if major >= 8 else f"compute capability {major}.x: needs 8.0"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")
    if example.device.type == "cpu" and interpreted:
        if os.environ.get("ADAPTIVE_BACKEND") == "triton":
            return None
        return "the interpreter runs only when ADAPTIVE_BACKEND=triton asks for it"
    return f"the tensor is on {example.device.type}, not on a GPU"


def refuses_library(module: str, example: Tensor, *, half_only: bool = False) -> str | None:
    """Why an optional CUDA library cannot serve tensors like `example`, or None."""
    if example.device.type != "cuda":
        return f"the tensor is on {example.device.type}, not on a GPU"
    if half_only and example.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {_name(example.dtype)}"
    return None if module in _INSTALLED else f"{module} is not installed"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def warn_once(op: str, asked: str, reason: str) -> None:
    """Say, once a process, that an op runs its reference although something else was asked for."""
    warnings.warn(f"{asked}: {op} runs its reference instead: {reason}", stacklevel=4)
