"""Experts: the feed-forwards of a mixture, as two stacked weights.

Shape legend: T tokens, E experts, e experts of this rank, D width, F feed-forward width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.ops.expert_feed_forward import Activation, check_activation, expert_feed_forward
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.assignment import Assignment
from adaptive.routing.routers import LinearRouter
from parallel.expert import mark_expert_parameter
from parallel.mesh import Mesh
from parallel.tensor import split_parameter


class Experts(nn.Module):
    """SwiGLU or GELU feed-forwards without bias, one an expert, computed as grouped products.

    A rank holds `num_experts / mesh.expert` of them, and of each `ffn_dim / mesh.tensor` channels:
    its result is then a partial sum, which `leave_tensor_region` completes. It draws the weights of
    all and keeps its own, so a model starts the same however it is split.

    Args:
        dim, ffn_dim: D, F.
        num_experts: E, of all ranks.
        activation: "swiglu" (`gate_up_proj` [e, 2F, D], gate half first) or "gelu"
            (`up_proj` [e, F, D]); both with `down_proj` [e, D, F].
        std, output_std: of the initial weights; `output_std` of `down_proj`, None: as `std`.
        mesh: how the ranks share the experts.
    """

    compiles = False  # it reads how many rows each expert has

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        activation: Activation = "swiglu",
        std: float = 0.02,
        output_std: float | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        mesh = Mesh.single() if mesh is None else mesh
        check_activation(activation)
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: must be at least 1")
        if num_experts % mesh.expert:
            ranks = mesh.data * mesh.context
            fits = [str(n) for n in range(1, ranks + 1) if num_experts % n == 0 == ranks % n]
            raise ValueError(
                f"num_experts={num_experts}: must be a multiple of the expert axis {mesh.expert}; "
                f"expert may be {', '.join(fits)}"
            )
        self.dim, self.ffn_dim, self.activation = dim, ffn_dim, activation
        self.num_experts, self.num_local_experts = num_experts, num_experts // mesh.expert
        first = mesh.expert_rank * self.num_local_experts
        self.own_slice = slice(first, first + self.num_local_experts)
        up_rows = 2 * ffn_dim if activation == "swiglu" else ffn_dim
        stride = up_rows // ffn_dim
        up = self._drawn((num_experts, up_rows, dim), std, mesh, split=1, stride=stride)
        output_std = std if output_std is None else output_std
        self.down_proj = self._drawn((num_experts, dim, ffn_dim), output_std, mesh, split=2)
        self.register_parameter("gate_up_proj" if activation == "swiglu" else "up_proj", up)

    def _drawn(
        self, shape: tuple[int, ...], std: float, mesh: Mesh, *, split: int, stride: int = 1
    ) -> nn.Parameter:
        weight = torch.empty(shape)
        nn.init.normal_(weight, std=std)
        own = weight[self.own_slice].clone()
        parameter = split_parameter(own, split, mesh=mesh, name="ffn_dim", stride=stride)
        mark_expert_parameter(parameter, mesh)
        return parameter

    @property
    def up_weight(self) -> Tensor:
        """The weight of the first product, whatever the activation."""
        weight = self.gate_up_proj if self.activation == "swiglu" else self.up_proj
        assert isinstance(weight, Tensor)
        return weight

    def forward(
        self,
        x_TD: Tensor,
        *,
        pairs_N: Tensor,
        rows_per_expert_e: Tensor,
        weights_TK: Tensor | None = None,
        top_k: int = 1,
    ) -> Tensor:
        """The weighted sum of each token's experts: see `expert_feed_forward`."""
        return expert_feed_forward(
            x_TD,
            self.up_weight,
            self.down_proj,
            pairs_N=pairs_N,
            rows_per_expert_E=rows_per_expert_e,
            weights_TK=weights_TK,
            top_k=top_k,
            activation=self.activation,
        )

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The two products of every token-expert pair of `work`, see FlopCounter."""
        up_rows = 2 * self.ffn_dim if self.activation == "swiglu" else self.ffn_dim
        weight_grad = self.down_proj.requires_grad
        count.linear(self.dim, up_rows, work, weight_grad=weight_grad)
        count.linear(self.ffn_dim, self.dim, work, weight_grad=weight_grad)


class SharedExperts(Experts):
    """A feed-forward that every token uses, beside those that it chooses.

    Every rank of the expert axis has it.

    Args:
        dim, ffn_dim: D; F of all shared experts together.
        gated: weigh what they say by `sigmoid(h w)`, a number a token (Qwen2-MoE).
        mesh: how the ranks share the channels.
        options: of `Experts`.
    """

    def __init__(
        self, dim: int, ffn_dim: int, *, gated: bool = False, mesh: Mesh, **options: Any
    ) -> None:
        everywhere = replace(mesh, expert=1, expert_rank=0, expert_group=None)
        super().__init__(dim, ffn_dim, 1, mesh=everywhere, **options)
        std = options.get("std", 0.02)
        self.gate = LinearRouter(dim, 1, std=std, mesh=mesh) if gated else None

    def weights(self, hidden_TD: Tensor) -> Tensor | None:
        """[T, 1], of this rank's own tokens; None: there is no gate."""
        return None if self.gate is None else self.gate(hidden_TD).sigmoid()

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, *, valid_T: Tensor | None = None, weights_T1: Tensor | None = None
    ) -> Tensor:
        """[T, D], zeros at padding; a partial sum of tensor ranks, as of `Experts`."""
        if valid_T is not None:
            everyone = Assignment.from_choices(
                torch.zeros_like(valid_T, dtype=torch.long)[:, None], 1, taken_TK=valid_T[:, None]
            )
            pairs, rows = everyone.pairs, everyone.tokens_per_expert
        else:
            pairs = torch.arange(x_TD.shape[0], device=x_TD.device)
            rows = torch.full((1,), x_TD.shape[0], device=x_TD.device)
        out_TD = super().forward(x_TD, pairs_N=pairs, rows_per_expert_e=rows)
        return out_TD if weights_T1 is None else out_TD * weights_T1.to(out_TD.dtype)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Of every token, its gate included."""
        super().count_flops(count, work)
        if self.gate is not None:
            count(self.gate, work)
