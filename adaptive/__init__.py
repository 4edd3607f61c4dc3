"""Sparse and adaptive-compute transformers: blocks to subclass in your own model.

Importing this package needs torch and nothing else; megatron-core, deepspeed, triton and
flash-attn are loaded where they are used. Names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Assignment": "adaptive.routing.assignment",
    "BatchScope": "adaptive.routing.scope",
    "Grouping": "adaptive.routing.grouping",
    "HypersphericalRouter": "adaptive.routing.routers",
    "LinearRouter": "adaptive.routing.routers",
    "RoutingRecord": "adaptive.routing.tape",
    "RoutingTape": "adaptive.routing.tape",
    "Selection": "adaptive.routing.selection",
    "TokenLayout": "adaptive.routing.layout",
    "checkpoint": "adaptive.routing.recompute",
    "recompute_contexts": "adaptive.routing.recompute",
    "Method": "adaptive.blocks.protocol",
    "RoutedBlock": "adaptive.blocks.protocol",
    "register_method": "adaptive.blocks.method",
    "start_step": "adaptive.routing.schedules",
    "MixtureOfDepthsAndExperts": "adaptive.blocks.mixture_of_depths_and_experts",
    "TokenMerging": "adaptive.blocks.token_merging",
    "TokenMergingConfig": "adaptive.blocks.token_merging",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "__all__" or not name.startswith("_"):
        # The public blocks of every method.
        found = import_module("adaptive.blocks.method").METHODS
        blocks = {block.__name__: block for method in found for block in method.blocks}
        if name == "__all__":
            return sorted({*_HOME, *blocks})
        if name in blocks:
            return blocks[name]
    raise AttributeError(f"module 'adaptive' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
