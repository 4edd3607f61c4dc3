"""Straight-through Gumbel-softmax: a hard choice forward, the gradient of a soft one backward.

Shape legend: T tokens, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.draws import draw_own_rows
from parallel.mesh import Mesh


class GumbelChoice(NamedTuple):
    """A draw, detached: what is saved for recomputation.

    Attributes:
        chosen: int64 [T], the choice of each token.
        noise: float [T, K], the Gumbel noise that made it, scaled.
    """

    chosen: Tensor
    noise: Tensor


def gumbel_choice(
    router_logits_TK: Tensor,
    *,
    noise: float,
    mesh: Mesh | None = None,
    shard_sizes: tuple[int, ...] | None = None,
) -> GumbelChoice:
    """Draw one choice a token: `argmax(logits + noise * Gumbel(0, 1))`.

    With `noise=1` choice k has probability `softmax(logits)_k`; with `noise=0` it is the argmax,
    ties to the lower index. The draw uses torch's default generator: take it inside `decide`.

    With noise, a collective over the tensor group (see `draw_own_rows`).

    Args:
        router_logits_TK: float [T, K]; this rank's rows.
        noise: scale of the noise, 0 or more.
        mesh: how the ranks share the model; one rank by default.
        shard_sizes: rows of each shard under sequence or context parallelism.

    Source: Gumbel-max, arXiv 1611.01144, section 2.
    """
    logits_TK = router_logits_TK.detach()
    noise_TK = torch.zeros_like(logits_TK)
    if noise > 0:
        choices = logits_TK.shape[1]
        noise_TK = draw_own_rows(
            lambda tokens: logits_TK.new_empty(tokens, choices).exponential_().log_().neg_(),
            logits_TK.shape[0],
            mesh,
            shard_sizes,
        ).mul(noise)
    return GumbelChoice((logits_TK + noise_TK).argmax(-1), noise_TK)


def soft_choice(router_logits_TK: Tensor, noise_TK: Tensor, *, temperature: float) -> Tensor:
    """float [T, K]: `softmax((logits + noise) / temperature)`, whose gradient the router gets."""
    return torch.softmax((router_logits_TK + noise_TK) / temperature, dim=-1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, exactly, with the gradient of `soft`.

    `hard + soft - soft.detach()` would differ from `hard` by a rounding error, which is enough to
    change tokens that must leave as they came in.
    """
    return _StraightThrough.apply(hard.to(soft.dtype), soft)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def gated_identity(
    hidden_TD: Tensor, gate_T: Tensor, rows_R: Tensor, update_RD: Tensor | None = None
) -> Tensor:
    """`hidden`, bit for bit, while the gates at `rows` get the gradient of what they kept out.

    Args:
        hidden_TD: [T, D].
        gate_T: float [T], zero at `rows`.
        rows_R: int64 [R], rows whose gate is closed.
        update_RD: [R, D], detached: what an open gate would have added; None: `-hidden`, as if
            an open gate put a zero in the row's place.

    Returns:
        [T, D]. Backward: `grad_gate[i] = <grad_out[i], update[i]>` at `rows`, zero elsewhere.
    """
    return _GatedIdentity.apply(hidden_TD, gate_T, rows_R, update_RD)


class _GatedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, gate_T: Tensor, rows_R: Tensor, update_RD: Tensor | None
    ) -> Tensor:
        # Without an update the residual stream itself is kept, which the norm keeps anyway.
        ctx.save_for_backward(rows_R, hidden_TD if update_RD is None else update_RD)
        ctx.negates = update_RD is None
        ctx.gate_dtype = gate_T.dtype
        return hidden_TD.view_as(hidden_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_R, kept = ctx.saved_tensors
        if ctx.negates:
            # One pass over all rows is cheaper than gathering two sets of them.
            product_T = -torch.linalg.vecdot(grad_TD.to(ctx.gate_dtype), kept.to(ctx.gate_dtype))
            grad_gate_T = torch.zeros_like(product_T)
            grad_gate_T[rows_R] = product_T[rows_R]
            return grad_TD, grad_gate_T, None, None
        grad_RD = grad_TD.index_select(0, rows_R).to(ctx.gate_dtype)
        grad_gate_T = grad_RD.new_zeros(grad_TD.shape[0])
        grad_gate_T[rows_R] = torch.linalg.vecdot(grad_RD, kept.to(ctx.gate_dtype))
        return grad_TD, grad_gate_T, None, None


@dataclass(frozen=True)
class GumbelSchedule:
    """Temperature and noise that go geometrically, and linearly, to their ends within `steps`.

    Attributes:
        temperature, final_temperature: of the soft choice, above 0. A low temperature makes the
            gradient sharper; it does not change what is chosen.
        noise, final_noise: scale of the Gumbel noise, 0 or more. At 1 the choices are samples of
            `softmax(logits)`; at 0 training chooses as evaluation does.
        steps: training steps of the way; 0: the first values stay.
    """

    temperature: float = 1.0
    final_temperature: float | None = None
    noise: float = 1.0
    final_noise: float | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        for name in ("noise", "final_noise", "steps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value}: must be 0 or more")

    def at(self, step: int) -> tuple[float, float]:
        """(temperature, noise) of a training step."""
        share = min(max(step, 0) / self.steps, 1.0) if self.steps else 0.0
        last = self.temperature if self.final_temperature is None else self.final_temperature
        quietest = self.noise if self.final_noise is None else self.final_noise
        temperature = self.temperature * (last / self.temperature) ** share
        return temperature, self.noise + (quietest - self.noise) * share
