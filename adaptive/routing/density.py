"""Density: the share of compute that routed tokens use, and what holds it at a target.

"Cost" is a token's share of a module's full compute: 1 for a token that executes, 0 for one that
skips, in between for a token that takes a smaller unit.

Shape legend: T tokens (valid ones only).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.routing.recompute import recomputing
from adaptive.routing.tape import AuxiliaryLoss, RoutingTape

Penalty = Literal["squared", "absolute"]
Target = Literal["layer", "model"]


@dataclass(frozen=True)
class Usage:
    """What one module used in one micro-batch on this rank, and on all of them.

    Attributes:
        local: float scalar, sum of costs here, differentiable.
        local_tokens: valid tokens here.
        total, total_tokens: the same over the global batch, detached, equal on every rank.
    """

    local: Tensor
    local_tokens: int
    total: Tensor
    total_tokens: Tensor

    @staticmethod
    def measure(cost_T: Tensor, tape: RoutingTape) -> Usage:
        """Sum costs over the global batch. A collective: every rank calls it, tokens or none.

        Args:
            cost_T: float [T], of valid tokens only; differentiable.
        """
        local = cost_T.sum()
        known = local.detach().float()
        counts = torch.stack([known, known.new_full((), cost_T.shape[0])])
        total, tokens = tape.total(counts).unbind()
        return Usage(local, cost_T.shape[0], total, tokens)

    @property
    def density(self) -> Tensor:
        """Mean cost over the global batch's valid tokens, detached."""
        return self.total / self.total_tokens.clamp(min=1)


def usage_loss(usages: list[Usage], target: float, *, penalty: Penalty = "squared") -> Tensor:
    """This rank's share of `(density - target)²` (or its absolute value).

    The penalty is not linear in the tokens, so a mean of the ranks' own penalties would be wrong:
    two ranks at 0 and 1 have a density of ½. The slope is taken at the global density; the value
    is the global penalty times this rank's share of the tokens, so that shares add up to it.

    Args:
        usages: of one module, or of all whose mean density has one target.
        target: density to reach, in [0, 1].

    Source: SkipLayer, arXiv 2311.15436, section 3 (squared, one module).
    """
    tokens = torch.stack([u.total_tokens for u in usages]).sum().clamp(min=1)
    error = torch.stack([u.total for u in usages]).sum() / tokens - target
    local = torch.stack([u.local for u in usages]).sum()
    here = sum(u.local_tokens for u in usages) / tokens
    value, slope = (
        (error.square(), 2 * error) if penalty == "squared" else (error.abs(), error.sign())
    )
    return value * here + slope * (local - local.detach()) / tokens


class DensityController(ExactBuffers):
    """Holds a density at its target by integral control of the price of compute.

    The loss is `price · (density - target)`. After every optimizer step the price rises by
    `gain · (density - target)`, so it stops moving only where the density is at its target,
    whatever the task's own gradient is; a fixed coefficient leaves an offset.

    The state is in buffers, computed from counts over the global batch, hence equal on all ranks
    and saved with the model. Counts are integers (millionths) so that no rounding depends on the
    order of a sum.

    Args:
        target: density to hold, in [0, 1].
        gain: change of price, in units of loss, per unit of density error and step.
        limit: largest price, either sign: bounds the wind-up while a target is out of reach.
    """

    # Steps are smaller than the ulp of a bfloat16 price.
    exact_buffers = ("price",)
    price: Tensor
    used: Tensor
    seen: Tensor

    def __init__(self, target: float, *, gain: float = 0.02, limit: float = 10.0) -> None:
        super().__init__()
        if not 0 <= target <= 1:
            raise ValueError(f"target={target}: must be in [0, 1]")
        if not gain > 0:
            raise ValueError(f"gain={gain}: must be above 0")
        self.target, self.gain, self.limit = target, gain, limit
        self.register_buffer("price", torch.zeros(()))
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def loss(self, usage: Usage) -> Tensor:
        """This rank's share of `price · (density - target)`; linear, so no total is needed."""
        tokens = usage.total_tokens.clamp(min=1)
        return self.price.detach() * (usage.local - self.target * usage.local_tokens) / tokens

    @torch.no_grad()
    def observe(self, used: Tensor, tokens: Tensor) -> None:
        """Count one micro-batch of the step under way: sums over the global batch."""
        self.used += (used.double() * 1e6).round().long()
        self.seen += tokens.long()

    @torch.no_grad()
    def start_step(self, step: int) -> None:
        """Move the price by what the step before used."""
        density = self.used.double() / (1e6 * self.seen.clamp(min=1))
        moved = self.price + self.gain * (density - self.target).float() * (self.seen > 0)
        self.price.copy_(moved.clamp(-self.limit, self.limit))
        self.used.zero_()
        self.seen.zero_()


class DensityControl(nn.Module):
    """What a routed module adds to the loss to keep its density: fixed or controlled.

    Args:
        target: density to reach, in (0, 1].
        coefficient: weight of the penalty on (density - target).
        penalty: "squared" (SkipLayer) or "absolute" (Adaptive Computation Modules).
        controller: adds integral control to the penalty.
        over: "layer": every module has the target; "model": their mean has. The controllers of
            such modules see the mean too, so they hold one price, each in its own buffers.
    """

    def __init__(
        self,
        target: float,
        *,
        coefficient: float,
        penalty: Penalty = "squared",
        controller: DensityController | None = None,
        over: Target = "layer",
    ) -> None:
        super().__init__()
        if not 0 <= target <= 1:
            raise ValueError(f"density={target}: must be in [0, 1]")
        if not coefficient >= 0:
            raise ValueError(f"density_coefficient={coefficient}: must be 0 or more")
        if over not in ("layer", "model"):
            raise ValueError(f"over={over!r}: must be layer or model")
        self.target, self.coefficient = target, coefficient
        self.penalty, self.over = penalty, over
        self.controller = controller

    def losses(
        self, cost_T: Tensor, tape: RoutingTape, *, kind: str
    ) -> tuple[dict[str, AuxiliaryLoss], Usage]:
        """The module's own losses, and its usage. A collective: every rank calls it.

        A penalty over the whole model goes to the tape's pool of this `kind` of modules, not into
        the returned dictionary; its weight is `coefficient` times their number, so that each
        module feels the same pull as with a target of its own.
        """
        usage = Usage.measure(cost_T, tape)
        losses = {}
        observer = None
        if self.controller is not None:
            losses["density_payment"] = AuxiliaryLoss(self.controller.loss(usage), 1.0)
            if self.training and not tape.scope.counting and not recomputing():
                observer = self.controller
        if self.over == "model":
            tape.pool(f"density/{kind}", (usage, observer), self._pooled)
            return losses, usage
        if observer is not None:
            tape.when_done(partial(observer.observe, usage.total, usage.total_tokens))
        share = usage_loss([usage], self.target, penalty=self.penalty)
        losses["density_penalty"] = AuxiliaryLoss(share, self.coefficient)
        return losses, usage

    def statistics(self) -> dict[str, Tensor]:
        """The controller's price, for the record."""
        return {} if self.controller is None else {"density_price": self.controller.price.clone()}

    def _pooled(self, parts: list[tuple[Usage, DensityController | None]]) -> AuxiliaryLoss:
        usages = [usage for usage, _ in parts]
        total = torch.stack([usage.total for usage in usages]).sum()
        tokens = torch.stack([usage.total_tokens for usage in usages]).sum()
        for _, observer in parts:
            if observer is not None:
                observer.observe(total, tokens)
        share = usage_loss(usages, self.target, penalty=self.penalty)
        return AuxiliaryLoss(share, self.coefficient * len(usages))
