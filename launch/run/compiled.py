"""`train.compile`: whether a run's layers can be compiled, and the compiled layers themselves."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import nn

from adaptive.compiling import compile_layers, compiled_parts
from launch.run.errors import BadInput
from launch.run.sections import RunConfig


def check_compiles(config: RunConfig, model: nn.Module) -> None:
    """Refuse a phase whose layers are to be compiled and cannot be.

    Args:
        config: of the phase.
        model: of it; may be without memory.

    Raises:
        BadInput: one line.
    """
    if not config.train.compile:
        return
    said = "train.compile=true: must be false"
    if int(config.deepspeed.get("zero_optimization", {}).get("stage", 0)) == 3:
        raise BadInput(f"{said} with ZeRO 3, whose weights are gathered by hooks inside of layers")
    for axis in ("tensor", "context"):
        ranks = getattr(config.parallel, axis)
        if ranks > 1:
            raise BadInput(f"{said} with parallel.{axis}={ranks}, whose collectives lie in layers")
    if next(compiled_parts(model), None) is None:
        raise BadInput(f"{said}, this model has no layers that could be compiled")
    missing = _missing_compiler()
    if missing is not None:
        raise BadInput(f"{said}, or {missing}")


def _missing_compiler() -> str | None:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return None if find_spec("triton") is not None else "triton be installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler be installed (g++), or named by CXX"
    return None


def compile_for(config: RunConfig, model: nn.Module) -> None:
    """Compile the layers of a phase's model, in place, where it asks for that."""
    if config.train.compile:
        compile_layers(model)
