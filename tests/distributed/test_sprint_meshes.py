"""SPRINT's fusion around layers of text that lies over ranks agrees with one rank.

The diffusion transformer is a subject of test_parity.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import SparseDenseFusion, TokenLayout
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from parallel.gradients import whole as whole_parameter
from parallel.mesh import Mesh
from parallel.rows import all_gather_rows
from tests.ranks import run_ranks

Degrees = dict[str, Any]

WIDTH, LENGTHS = 16, [7, 12, 6, 3]


def text_step(degrees: Degrees, keep: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and whole gradients of decoder layers around which tokens are dropped."""
    mesh = Mesh.create(**degrees) if degrees else Mesh.single()
    torch.manual_seed(0)

    def layer() -> DecoderLayer:
        ffn, attention = SwiGLU(WIDTH, 24, mesh=mesh), Attention(WIDTH, 4, mesh=mesh)
        return DecoderLayer(RMSNorm(WIDTH, mesh=mesh), attention, RMSNorm(WIDTH, mesh=mesh), ffn)

    trunk = SparseDenseFusion(
        [layer()],
        [layer()],
        [layer()],
        WIDTH,
        keep=keep,
        mask_token="learnt",
        path_drop=0.5,
        mesh=mesh,
    )
    layout = TokenLayout.from_lengths(LENGTHS)
    hidden = torch.randn(28, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = hidden
    if mesh.shards > 1:
        # Uneven, and no sequence ends with a shard.
        sizes = (11, 17) if mesh.shards == 2 else (4, 9, 2, 13)
        layout = dataclasses.replace(layout, shard_sizes=sizes)
        own = hidden.split(sizes)[mesh.shard_rank]
    torch.manual_seed(4)
    out = trunk(own, layout=layout)
    out.square().sum().backward()
    assert hidden.grad is not None
    whole_out, whole_grad = out.detach(), hidden.grad
    if mesh.shards > 1:
        assert mesh.shard_group is not None
        whole_out = all_gather_rows(whole_out, mesh.shard_group, sizes)
        torch.distributed.all_reduce(whole_grad)
    grads = {"hidden": whole_grad}
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name
        if mesh.batch_group is not None:
            torch.distributed.all_reduce(parameter.grad, group=mesh.batch_group)
        grads[name] = whole_parameter(parameter.grad, parameter, mesh)
    return whole_out, grads


@pytest.mark.parametrize("keep", [0.25, 1.0])
@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 2, "sequence_parallel": True},
        {"context": 2},
        {"context": 2, "context_attention": "ring"},
        {"tensor": 2, "context": 2, "sequence_parallel": True},
    ],
    ids=str,
)
def test_text_that_lies_over_ranks_agrees_with_one_rank(degrees: Degrees, keep: float) -> None:
    want, want_grads = run_ranks(text_step, 1, {}, keep, timeout=60)[0]
    ranks = Mesh(**degrees).world
    for out, grads in run_ranks(text_step, ranks, degrees, keep, timeout=60):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        for name, grad in want_grads.items():
            torch.testing.assert_close(
                grads[name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
