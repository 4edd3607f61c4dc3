"""SPRINT's fusion around layers of text, under sequence parallelism, agrees with one rank.

The diffusion transformer is a subject of test_parity.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from adaptive import SparseDenseFusion, TokenLayout
from adaptive.models.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from parallel.gradients import whole as whole_parameter
from parallel.mesh import Mesh
from parallel.sequence import all_gather_rows
from tests.ranks import run_ranks


def text_step(sequence_parallel: bool, keep: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and whole gradients of decoder layers around which tokens are dropped."""
    mesh = Mesh.create(tensor=2, sequence_parallel=True) if sequence_parallel else Mesh.single()
    torch.manual_seed(0)

    def layer() -> DecoderLayer:
        ffn = SwiGLU(16, 24, mesh=mesh)
        attention = Attention(16, 2, mesh=mesh)
        return DecoderLayer(RMSNorm(16, mesh=mesh), attention, RMSNorm(16, mesh=mesh), ffn)

    trunk = SparseDenseFusion(
        [layer()],
        [layer()],
        [layer()],
        16,
        keep=keep,
        mask_token="learnt",
        path_drop=0.5,
        mesh=mesh,
    )
    layout = TokenLayout.from_lengths([7, 12, 6, 3])
    hidden = torch.randn(28, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = hidden
    if sequence_parallel:
        layout = dataclasses.replace(layout, shard_sizes=(11, 17))
        own = hidden.split((11, 17))[mesh.tensor_rank]
    torch.manual_seed(4)
    out = trunk(own, layout=layout)
    out.square().sum().backward()
    assert hidden.grad is not None
    whole_out, whole_grad = out.detach(), hidden.grad
    if sequence_parallel:
        assert mesh.tensor_group is not None
        whole_out = all_gather_rows(whole_out, mesh.tensor_group, (11, 17))
        torch.distributed.all_reduce(whole_grad)
    grads = {"hidden": whole_grad}
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = whole_parameter(parameter.grad, parameter, mesh)
    return whole_out, grads


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_text_under_sequence_parallelism_agrees_with_one_rank(keep: float) -> None:
    want, want_grads = run_ranks(text_step, 1, False, keep, timeout=60)[0]
    for out, grads in run_ranks(text_step, 2, True, keep, timeout=60):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        for name, grad in want_grads.items():
            torch.testing.assert_close(
                grads[name], grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
