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
    "AdaptiveComputationModule": "adaptive.blocks.adaptive_computation",
    "MixtureOfDepths": "adaptive.blocks.mixture_of_depths",
    "MixtureOfDepthsAndExperts": "adaptive.blocks.mixture_of_depths_and_experts",
    "MixtureOfExperts": "adaptive.blocks.mixture_of_experts",
    "Pattention": "adaptive.blocks.pattention",
    "SizedFeedForward": "adaptive.blocks.sized_feed_forward",
    "SkipLayer": "adaptive.blocks.skip_layer",
    "SparseDenseFusion": "adaptive.blocks.sprint",
    "TokenMerging": "adaptive.blocks.token_merging",
    "TokenMergingConfig": "adaptive.blocks.token_merging",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptive' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
