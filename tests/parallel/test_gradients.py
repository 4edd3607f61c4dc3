"""The gradient norm, where a rank has no gradient of a kind."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.expert import mark_expert_parameter
from parallel.gradients import clip_gradients
from parallel.mesh import Mesh
from parallel.tensor import mark_split
from tests.ranks import run_ranks


def devices_of_sums(axes: dict[str, int]) -> set[str]:
    """Where the numbers lie that a norm of gradients elsewhere sums over ranks."""
    mesh = Mesh.create(**axes)
    parameters = [nn.Parameter(torch.empty(4, 4, device="meta")) for _ in range(2)]
    if mesh.tensor > 1:
        mark_split(parameters[1], 0)
    else:
        mark_expert_parameter(parameters[1], mesh)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    seen = set()
    original = dist.all_reduce
    dist.all_reduce = lambda tensor, *_, **__: seen.add(tensor.device.type)
    try:
        clip_gradients(parameters, 1.0, mesh)
    finally:
        dist.all_reduce = original
    return seen


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"expert": 2}], ids=str)
def test_sums_lie_where_the_gradients_do(axes: dict[str, int]) -> None:
    """NCCL takes nothing on the CPU, also of a kind that no parameter is of."""
    assert run_ranks(devices_of_sums, 2, axes) == [{"meta"}, {"meta"}]
