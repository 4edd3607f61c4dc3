"""Growth inside a run: `train.growth`, a list of sizes and steps, as phases of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

SIZES = ("tokens", "ffn_tokens", "output_tokens")


@dataclass(frozen=True)
class GrowthConfig:
    """One growth of a TokenFormer in the middle of a run.

    Attributes:
        step: optimizer steps of the run after which the model grows.
        tokens, ffn_tokens, output_tokens: `model.pattention` from then on; null: as before
            (output_tokens: as tokens).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    step: int
    tokens: int | None = None
    ffn_tokens: int | None = None
    output_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"step={self.step}: must be at least 1")
        if all(getattr(self, name) is None for name in SIZES):
            raise ValueError(f"step={self.step}: must give a size: {', '.join(SIZES)}")


def growth_phases(
    growth: Sequence[GrowthConfig], *, steps: int, pattention: Any
) -> list[dict[str, Any]]:
    """The run as phases between growths: warm-up and cosine start anew in each.

    Args:
        growth: by rising step.
        steps: of the whole run.
        pattention: the model's PattentionConfig at the beginning.

    Returns:
        Keys of one PhaseConfig each.

    Raises:
        ValueError: if a size shrinks, or the steps are not in order within the run.
    """
    if pattention is None:
        raise ValueError("growth: needs model.pattention, whose tokens grow")
    phases: list[dict[str, Any]] = []
    sizes = {name: getattr(pattention, name) for name in SIZES}
    begun, changes = 0, dict[str, int | None]()
    for entry in growth:
        if not begun < entry.step < steps:
            raise ValueError(
                f"growth step={entry.step}: must be between {begun + 1} and {steps - 1}, in order"
            )
        phases.append(_phase(len(phases), changes, entry.step - begun))
        begun, changes = entry.step, _changes(entry, sizes)
    phases.append(_phase(len(phases), changes, steps - begun))
    return phases


def _changes(entry: GrowthConfig, sizes: dict[str, int | None]) -> dict[str, int | None]:
    """What an entry changes in `sizes`, which follow."""
    changes = {name: size for name in SIZES if (size := getattr(entry, name)) is not None}
    if entry.tokens is not None and entry.output_tokens is None:
        changes["output_tokens"] = None
    after = {**sizes, **changes}
    for name in SIZES:
        was = sizes[name] if sizes[name] is not None else sizes["tokens"]
        now = after[name] if after[name] is not None else after["tokens"]
        assert was is not None
        assert now is not None
        if now < was:
            raise ValueError(
                f"growth step={entry.step}: {name}={now}: must be at least {was}; layers only grow"
            )
    if after == sizes:
        raise ValueError(f"growth step={entry.step}: must add parameter tokens")
    sizes.update(changes)
    return changes


def _phase(index: int, changes: dict[str, int | None], steps: int) -> dict[str, Any]:
    model = {"pattention": changes} if changes else {}
    return {"name": f"stage {index + 1}", "train": {"steps": steps}, "model": model}
