"""What DeepSpeed must know of experts that are spread over ranks, and what it gets wrong.

DeepSpeed treats parameters marked `allreduce=False` as experts only in a model that contains its
own `MoE` class; our blocks are no such thing, so a module without parameters declares them. Its
gradients are then right at ZeRO 0, 1 and 2: reduced over the ranks that hold a copy, divided by
all data ranks. ZeRO 3 shards every weight over all data ranks, experts that differ too, so it is
refused.

The gradient norm is right at ZeRO 1 and 2. Without ZeRO, DeepSpeed averages the norms of the
ranks, each of which has seen its own experts only: `count_every_expert_once` replaces that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from launch.run.errors import BadInput
from parallel.expert import group_name
from parallel.gradients import clip_gradients, is_expert
from parallel.mesh import Mesh


def declare_experts(model: nn.Module, mesh: Mesh, *, zero_stage: int) -> None:
    """Prepare a model for `deepspeed.initialize`, in place; nothing to do without expert ranks.

    Raises:
        BadInput: at ZeRO 3, or where no parameter of the model is an expert's.
    """
    if mesh.expert == 1:
        return
    if zero_stage == 3:
        raise BadInput(
            f"parallel.expert={mesh.expert}: must be 1 with ZeRO 3, which shards every weight over "
            "all data ranks; use ZeRO 0, 1 or 2"
        )
    if not any(is_expert(parameter) for parameter in model.parameters()):
        raise BadInput(f"parallel.expert={mesh.expert}: this model has no experts to split")
    from deepspeed.moe.layer import MoE

    # A group of one: DeepSpeed takes no None.
    expert_data = mesh.expert_data_group
    if expert_data is None:
        rank = torch.distributed.get_rank()
        expert_data, _ = torch.distributed.new_subgroups(1)
        assert torch.distributed.get_process_group_ranks(expert_data) == [rank]
    if not any(is_expert(p) and p.requires_grad for p in model.parameters()):
        # It would look for their optimizer groups, and there are none.
        _register_groups(mesh, expert_data)
        return

    class DeclaredExperts(MoE):  # type: ignore[misc]
        """What DeepSpeed looks for; holds and computes nothing."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = self.num_local_experts = 0
            self.expert_group_name = group_name(mesh)

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            _register_groups(mesh, expert_data)

    model.add_module("declared_experts", DeclaredExperts())


def _register_groups(mesh: Mesh, expert_data: torch.distributed.ProcessGroup) -> None:
    from deepspeed.utils import groups

    name = group_name(mesh)
    groups._EXPERT_PARALLEL_GROUP[name] = mesh.expert_group
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data


def expert_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimizer groups in which experts have groups of their own, named as DeepSpeed wants."""
    out = []
    for group in groups:
        experts = [p for p in group["params"] if is_expert(p)]
        others = [p for p in group["params"] if not is_expert(p)]
        if others:
            out.append({**group, "params": others})
        if experts:
            name = experts[0].group_name
            out.append({**group, "params": experts, "moe": True, "name": name})
    return out


def count_every_expert_once(
    deepspeed_engine: Any, mesh: Mesh, keep: Callable[[Tensor], None]
) -> None:
    """Clip without ZeRO by the norm of the whole model; `keep` gets that norm each step."""

    def clip() -> None:
        parameters: Iterable[nn.Parameter] = deepspeed_engine.module.parameters()
        limit = deepspeed_engine.gradient_clipping() or float("inf")
        keep(clip_gradients(parameters, limit, mesh))

    deepspeed_engine.clip_fp32_gradients = clip
