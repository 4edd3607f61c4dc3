"""An exponential moving average of the weights, split over the ranks as the optimizer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.tasks import TrainedModel
from parallel.gradients import is_expert, part, whole


@dataclass(frozen=True)
class AverageConfig:
    """The moving average of the weights that samples are drawn with.

    Attributes:
        decay: of the average, a step.
        warmup: let the decay rise as (1 + step) / (10 + step), for runs that are short.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decay: float = 0.9999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: must be in [0, 1)")


class _Part(NamedTuple):
    """This rank's contiguous part of a flattened parameter: a view where possible, float32."""

    start: int
    values: Tensor


class WeightAverage:
    """`average ← decay · average + (1 - decay) · weight`, after every optimizer step.

    Each rank averages the part of every parameter that its optimizer owns (its ZeRO shard;
    without ZeRO an even share among the ranks that hold the same slice), in float32 and without
    communication. Gathering makes it whole.
    Buffers are not averaged.

    Args:
        engine: holds the weights; the average starts from them.
        decay: of the average, a step.
        warmup: decay at step s is at most (1 + s) / (10 + s).
    """

    def __init__(self, engine: TrainedModel, *, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self._shards = {
            name: _own_part(parameter, engine).values.clone()
            for name, parameter in engine.named_parameters()
        }

    @torch.no_grad()
    def update(self, engine: TrainedModel, step: int) -> None:
        """Take in the weights after optimizer step `step` (the first is 1)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for name, parameter in engine.named_parameters():
            self._shards[name].lerp_(_own_part(parameter, engine).values, 1 - decay)

    def gather(self, engine: TrainedModel) -> dict[str, Tensor]:
        """Every averaged parameter, whole, float32 on the CPU. Collective over all ranks.

        Rank 0 gets them; the other ranks an empty dictionary.
        """
        weights = {}
        for name, parameter in engine.named_parameters():
            shape = _whole_shape(parameter)
            flat = torch.zeros(shape.numel(), device=engine.device)
            start, shard = _own_part(parameter, engine).start, self._shards[name]
            flat[start : start + shard.numel()] = shard
            group = _copies(parameter, engine)
            if group is not None:
                # Every element is held by one rank: the sum is exact.
                dist.all_reduce(flat, group=group)
            full = whole(flat.view(shape), parameter, engine.mesh)
            if dist.get_rank() == 0:
                weights[name] = full.cpu()
        return weights

    @torch.no_grad()
    def load(self, engine: TrainedModel, weights: dict[str, Tensor]) -> None:
        """Take back what `gather` gave, at any number of ranks and ZeRO stage."""
        for name, parameter in engine.named_parameters():
            start, shard = _own_part(parameter, engine).start, self._shards[name]
            own = part(weights[name], parameter, engine.mesh).flatten()
            shard.copy_(own[start : start + shard.numel()])


def _copies(parameter: nn.Parameter, engine: TrainedModel) -> dist.ProcessGroup | None:
    """The ranks that hold the same slice of a parameter, and share its average."""
    mesh = engine.mesh
    return mesh.expert_data_group if is_expert(parameter) else mesh.batch_group


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _own_part(parameter: nn.Parameter, engine: TrainedModel) -> _Part:
    """What this rank's optimizer owns of a parameter."""
    size = _whole_shape(parameter).numel()
    group = _copies(parameter, engine)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if hasattr(parameter, "ds_id"):
        # ZeRO 3: equal parts of the flattened tensor, the last one padded.
        from deepspeed.utils import safe_get_local_fp32_param

        shard = safe_get_local_fp32_param(parameter)
        if shard is None:  # not trained
            shard = parameter.ds_tensor.float()  # type: ignore[attr-defined]
        start = min(rank * shard.numel(), size)
        return _Part(start, shard.detach().flatten()[: size - start])
    if hasattr(parameter, "_hp_mapping") and parameter.requires_grad:
        # ZeRO 1 and 2: a parameter may lie across the border of two ranks, or with another.
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Part(0, torch.empty(0, device=parameter.device))
        return _Part(mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach())
    share = -(-size // ranks)
    start = min(rank * share, size)
    return _Part(start, parameter.detach().flatten()[start : start + share].float())
