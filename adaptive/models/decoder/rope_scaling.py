"""Rotary frequencies, scaled for texts longer than a model was first trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

ScalingKind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered for texts longer than those of the first training.

    Fields are called as in a config.json of transformers.

    Attributes:
        rope_type: "linear" divides every frequency by `factor` (arXiv 2306.15595); "llama3" those
            whose wave is longer than `original_max_position_embeddings / low_freq_factor`, none
            shorter than `… / high_freq_factor`, with a ramp between; "yarn" ramps over channels
            between `beta_fast` and `beta_slow` rotations (arXiv 2309.00071).
        factor: of the lowest frequencies, 1 or more.
        original_max_position_embeddings: length of the first training; "linear" needs none.
        low_freq_factor, high_freq_factor: of "llama3".
        beta_fast, beta_slow, truncate: of "yarn"; whether the ramp begins and ends at whole
            channels.
        attention_factor: of "yarn", what cos and sin are multiplied by; null: `0.1 ln(factor) + 1`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rope_type: ScalingKind = "linear"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(ScalingKind):
            kinds = ", ".join(get_args(ScalingKind))
            raise ValueError(f"rope_type={self.rope_type!r}: must be one of {kinds}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor={self.factor}: must be 1 or more")
        length = self.original_max_position_embeddings
        if self.rope_type != "linear" and (length is None or length < 1):
            raise ValueError(
                f"original_max_position_embeddings={length}: must be at least 1 "
                f"with rope_type={self.rope_type}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"{low}={getattr(self, low)}: must be above 0 and below "
                    f"{high}={getattr(self, high)}"
                )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"attention_factor={self.attention_factor}: must be above 0")

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        default = 0.1 * math.log(self.factor) + 1
        return default if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies: Tensor, *, base: float) -> Tensor:
        """Frequencies `base^(-2i/d)`, float32 [d/2], as they are used."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        length = self.original_max_position_embeddings
        assert length is not None
        if self.rope_type == "llama3":
            waves = length * frequencies / (2 * math.pi)
            ramp = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = ramp.clamp(0, 1)
        else:
            dim = 2 * frequencies.shape[0]
            first, last = (
                dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
                for turns in (self.beta_fast, self.beta_slow)
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            channels = torch.arange(dim // 2, device=frequencies.device)
            # A ramp of no length is a step.
            kept = 1 - ((channels - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)
