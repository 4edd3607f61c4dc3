"""Reference models built from the blocks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Decoder": "adaptive.models.decoder.model",
    "DecoderConfig": "adaptive.models.decoder.model",
    "DiffusionConfig": "adaptive.models.diffusion.model",
    "DiffusionTransformer": "adaptive.models.diffusion.model",
    "VisionConfig": "adaptive.models.vision.model",
    "VisionTransformer": "adaptive.models.vision.model",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptive.models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
