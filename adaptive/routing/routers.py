"""Routers: hidden states to scores.

Shape legend: T tokens, D width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.hyperspherical import HypersphericalRouter
from adaptive.routing.recompute import decide
from parallel.autocast import without_autocast
from parallel.draws import draw_own_rows
from parallel.mesh import Mesh
from parallel.tensor import replicated

__all__ = ["HypersphericalRouter", "LinearRouter", "jittered"]


class LinearRouter(nn.Module):
    """One linear score per token and unit, by default without bias: `logits = h Wᵀ`, in float32.

    Args:
        dim: width D.
        num_outputs: scores of a token, E: experts, paths, or 1 where the router scores the token.
        std: of the initial weights.
        mesh: under sequence parallelism, the hidden states are this rank's own tokens.
        bias: add a bias, initially zero. Where a share of *all* tokens must be reached (a
            density), normed inputs without a common direction cannot stand in for it.

    Forward: hidden [T, D] of any float dtype -> router logits [T, E], float32 (float64 stays).
    """

    def __init__(
        self,
        dim: int,
        num_outputs: int,
        *,
        std: float = 0.02,
        bias: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.mesh = Mesh.single() if mesh is None else mesh
        if num_outputs < 1:
            raise ValueError(f"num_outputs={num_outputs}: must be at least 1")
        # Kept apart from the weight, which an engine may shard to nothing between forwards.
        self.dim, self.num_outputs = dim, num_outputs
        self.weight = nn.Parameter(torch.empty(num_outputs, dim))
        nn.init.normal_(self.weight, std=std)
        self.bias = nn.Parameter(torch.zeros(num_outputs)) if bias else None

    def forward(self, hidden_TD: Tensor) -> Tensor:
        weight_ED: Tensor = self.weight
        bias_E: Tensor | None = self.bias
        if self.mesh.tensor_group is not None:
            weight_ED = replicated(weight_ED, self.mesh)
            bias_E = None if bias_E is None else replicated(bias_E, self.mesh)
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        bias_E = None if bias_E is None else bias_E.to(dtype)
        with without_autocast(hidden_TD.device.type):
            return F.linear(hidden_TD.to(dtype), weight_ED.to(dtype), bias_E)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """A score of every token for every unit."""
        weight_grad = self.weight.requires_grad
        count.linear(self.dim, self.num_outputs, work, weight_grad=weight_grad)


def jittered(
    hidden_TD: Tensor, jitter: float, mesh: Mesh, shard_sizes: tuple[int, ...] | None
) -> Tensor:
    """Hidden states times uniform noise in [1 - jitter, 1 + jitter], a number an element.

    Source: Switch Transformer, arXiv 2101.03961, section 2.4.
    """
    rows, width = hidden_TD.shape

    def draw(tokens: int) -> Tensor:
        return hidden_TD.new_empty(tokens, width).uniform_(1 - jitter, 1 + jitter)

    return hidden_TD * decide(lambda: draw_own_rows(draw, rows, mesh, shard_sizes))
