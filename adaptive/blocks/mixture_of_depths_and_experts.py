"""Mixture of depths and experts: a token may use experts, or none of them.

Shape legend: B batch, S sequence, T = B*S or packed tokens, R tokens chosen by depth, D width,
E experts.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.blocks.mixture_of_experts import ExpertsWithIdle, MixtureOfExperts
from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh

Variant = Literal["integrated", "staged"]


class MixtureOfDepthsAndExperts(nn.Module):
    """A feed-forward with its residual, `h + update`, in which tokens may be left out.

    "integrated": experts and idle experts compete for every token (reported better).
    "staged": a depth router first chooses a share of every sequence, whose update is multiplied by
    its weight; the chosen tokens then choose among experts. To route attention too, put
    MixtureOfExperts into a layer and MixtureOfDepths around it, as the decoder does with both its
    `mixture_of_depths` and `mixture_of_experts`.

    Args:
        dim, ffn_dim, num_experts: see MixtureOfExperts.
        variant: "integrated" or "staged".
        idle_experts: of the integrated variant; None: as many as `num_experts`, so that with an
            even load half of the choices are idle.
        capacity, depth_options: of the staged variant, see MixtureOfDepths.
        norm: applied to what the experts read; None: nothing.
        mesh: how the ranks share the model.
        options: further arguments of MixtureOfExperts.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 4.5 (MoDE).
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        variant: Variant = "integrated",
        idle_experts: int | None = None,
        capacity: float = 0.125,
        depth_options: dict[str, Any] | None = None,
        norm: nn.Module | None = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}: must be integrated or staged")
        self.variant = variant
        if variant == "integrated":
            idle_experts = num_experts if idle_experts is None else idle_experts
            ffn: nn.Module = ExpertsWithIdle(
                dim, ffn_dim, num_experts, idle_experts=idle_experts, mesh=mesh, **options
            )
            self.block: nn.Module = _Residual(norm, ffn)
        else:
            if idle_experts is not None:
                raise ValueError(
                    f"idle_experts={idle_experts}: only the integrated variant has any"
                )
            ffn = MixtureOfExperts(dim, ffn_dim, num_experts, mesh=mesh, **options)
            self.block = MixtureOfDepths(
                _Residual(norm, ffn), dim, capacity=capacity, mesh=mesh, **(depth_options or {})
            )

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """Update the tokens.

        Args:
            hidden: [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, which stays as it is.
            layout: where packed tokens came from.

        Returns:
            The shape and dtype of `hidden`.
        """
        return self.block(hidden, token_mask=token_mask, layout=layout)


class _Residual(nn.Module):
    """`h + experts(norm(h))`."""

    takes_packed = True

    def __init__(self, norm: nn.Module | None, experts: nn.Module) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.experts = experts

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        return hidden + self.experts(self.norm(hidden), token_mask=token_mask, layout=layout)
