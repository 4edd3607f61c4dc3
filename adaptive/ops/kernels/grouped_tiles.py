"""Tiles of the grouped products: what the autotuner chooses from, and when it chooses again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from adaptive.ops.kernels import SWIGLU
from adaptive.ops.kernels.launching import INTERPRETED, interpreted_block, next_power_of_2


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


_LOW = [
    _config(128, 256, 64, 8, 3),
    _config(128, 128, 64, 8, 3),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 64, 4, 4),
]
_FULL = [_config(64, 64, 32, 8, 2), _config(32, 64, 32, 4, 2)]


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> Any:
    """float32 tiles take twice the room; two accumulators want half the columns."""
    if arguments["a"].dtype == torch.float32:
        return _FULL
    return _LOW[1:] if options.get("ACTIVATION") == SWIGLU else _LOW


def autotuned(key: list[str]) -> Callable[[Any], Any]:
    """Decorates a kernel whose tiles the autotuner chooses, once a shape class.

    Interpreted, nothing is timed: a launch names its own tiles, `interpreted_tiles`.
    """
    if INTERPRETED:
        return lambda kernel: kernel
    prune = {"early_config_prune": _fitting}
    return triton.autotune(_LOW + _FULL, key=key, prune_configs_by=prune)


def interpreted_tiles(m: int, n: int, k: int) -> dict[str, int]:
    """Tiles of a product [m, k] x [k, n] for the interpreter; nothing where kernels compile."""
    if not INTERPRETED:
        return {}
    lengths = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {name: interpreted_block(length) for name, length in lengths.items()}


def rows_class(rows: int, experts: int) -> int:
    """Shapes of one class share an autotuning: rows an expert, to a power of two."""
    return next_power_of_2(rows // max(experts, 1)).bit_length()
