"""HypersphericalRouter: scores on a low-dimensional hypersphere (X-MoE).

Shape legend: T tokens, D width, P projection width, E experts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.flop_counter import FlopCounter, Work
from parallel.autocast import without_autocast
from parallel.mesh import Mesh
from parallel.tensor import replicated

Gate = Literal["softmax", "sigmoid"]
LOWEST_TEMPERATURE = 0.01


class HypersphericalRouter(nn.Module):
    """`logits_e = cos(W h, v_e) / τ`, in float32, both sides normalised, τ learnt.

    A routing by direction alone, in few dimensions, gives the gradient that pulls hidden states
    towards expert vectors less of them to collapse.

    Args:
        dim: width D.
        num_experts: E.
        projection_dim: P, width of the hypersphere; None: the paper's E / 2, at least 1.
        temperature: τ at the start. The paper's: 0.3 with the softmax gate, 0.07 with the sigmoid.
        gate: what turns logits into scores, "softmax" over experts or "sigmoid" of each.
        mesh: under sequence parallelism, the hidden states are this rank's own tokens.

    Forward: hidden [T, D] of any float dtype -> router logits [T, E], float32 (float64 stays).

    Source: X-MoE, arXiv 2204.09179, section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        projection_dim: int | None = None,
        temperature: float = 0.3,
        gate: Gate = "softmax",
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.mesh = Mesh.single() if mesh is None else mesh
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: must be at least 1")
        projection_dim = max(1, num_experts // 2) if projection_dim is None else projection_dim
        if projection_dim < 1:
            raise ValueError(f"projection_dim={projection_dim}: must be at least 1")
        if not temperature >= LOWEST_TEMPERATURE:
            raise ValueError(f"temperature={temperature}: must be at least {LOWEST_TEMPERATURE}")
        if gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate={gate!r}: must be softmax or sigmoid")
        self.gate = gate
        self.initial_temperature = temperature
        self.projection = nn.Parameter(torch.empty(projection_dim, dim))
        self.expert_vectors = nn.Parameter(torch.empty(num_experts, projection_dim))
        # Of one dimension: DeepSpeed cannot broadcast a parameter of none.
        self.temperature = nn.Parameter(torch.tensor([float(temperature)]))
        nn.init.orthogonal_(self.projection)
        nn.init.orthogonal_(self.expert_vectors)

    def forward(self, hidden_TD: Tensor, *, at_start: Tensor | None = None) -> Tensor:
        if at_start is not None:
            # Not detached: the two temperatures cancel, so none of this loss reaches τ.
            return at_start * (self._positive_temperature() / self.initial_temperature)
        cosines_TE = self.cosines(hidden_TD)
        return cosines_TE / self._positive_temperature().to(cosines_TE.dtype)

    def cosines(self, hidden_TD: Tensor) -> Tensor:
        """float32 [T, E]: cos(W h, v_e). Weights are normalised here and never rewritten."""
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        projection_PD = replicated(self.projection, self.mesh).to(dtype)
        vectors_EP = replicated(self.expert_vectors, self.mesh).to(dtype)
        with without_autocast(hidden_TD.device.type):
            token_TP = F.linear(hidden_TD.to(dtype), projection_PD)
            return F.linear(F.normalize(token_TP, dim=-1), F.normalize(vectors_EP, dim=-1))

    def balance_logits(self, logits_TE: Tensor) -> Tensor:
        """The logits at the temperature of the start, which the balance loss uses throughout.

        Otherwise the loss could be lowered by warming the router instead of spreading the load.
        """
        # By a call: under ZeRO 3 the temperature is whole in this module's own forward only.
        return self(logits_TE, at_start=logits_TE)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The projection of every token, and its products with the expert vectors."""
        (projection_dim, dim), num_experts = self.projection.shape, self.expert_vectors.shape[0]
        count.linear(dim, projection_dim, work, weight_grad=self.projection.requires_grad)
        weight_grad = self.expert_vectors.requires_grad
        count.linear(projection_dim, num_experts, work, weight_grad=weight_grad)

    def _positive_temperature(self) -> Tensor:
        """τ, kept from 0; the gradient passes as if it were not, so τ can come back."""
        temperature = replicated(self.temperature, self.mesh)
        return temperature + (temperature.clamp(min=LOWEST_TEMPERATURE) - temperature).detach()
