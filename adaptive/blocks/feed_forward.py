"""The dense feed-forward, and how linear layers are made for it.

Shape legend: T packed tokens, D width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh
from parallel.tensor import (
    column_linear,
    enter_tensor_region,
    leave_tensor_region,
    row_linear,
)

MakeLinear = Callable[[int, int], nn.Module]
"""(in_features, out_features) -> the layer: a plain, a tensor-parallel or a Pattention one."""


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Source: arXiv 2002.05202."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        make_input: MakeLinear | None = None,
        make_output: MakeLinear | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        make_input = partial(column_linear, mesh=mesh) if make_input is None else make_input
        make_output = partial(row_linear, mesh=mesh) if make_output is None else make_output
        self.gate = make_input(dim, ffn_dim)
        self.up = make_input(dim, ffn_dim)
        self.down = make_output(ffn_dim, dim)

    def forward(self, x_TD: Tensor, *, layout: TokenLayout) -> Tensor:
        split = self.mesh.tensor_group is not None
        if split:
            x_TD = enter_tensor_region(x_TD, self.mesh, shard_sizes=layout.shard_sizes)
        update_TD = self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))
        if split:
            update_TD = leave_tensor_region(update_TD, self.mesh, shard_sizes=layout.shard_sizes)
        return update_TD
