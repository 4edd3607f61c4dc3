"""RoutingTape: what a forward pass decided, and the auxiliary losses that came with it.

    with RoutingTape(model) as tape:
        logits = model(input_ids)
    loss = task_loss + tape.loss()
    for record in tape.records: ...

No module keeps anything: outside a tape, blocks work and record nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide, recomputing, unwatched_compilation, watch
from adaptive.routing.scope import BatchScope

PoolPart = TypeVar("PoolPart")


@dataclass
class RoutingRecord:
    """What one routed module did with one batch, on this rank. One schema for every method.

    Numbers are detached scalar tensors (or Python numbers), left on the device so that recording
    never waits for it. Fields that a method does not have are None. Padding counts nowhere.

    Attributes:
        name: the module's path in the model given to the tape, else its kind and call number.
        kind: the method, e.g. "mixture_of_depths".
        tokens: valid tokens that reached the router.
        executed: tokens that the block computed (for experts: token-expert pairs).
        executed_lengths: [B], the executed tokens of each sequence, which decide what attention
            among them costs; None where no attention is inside.
        key_lengths: [B], how many keys each of those tokens attended to, where a cache held
            earlier ones; else None.
        planned_share: share of the tokens that the module is meant to execute.
        load: [units], tokens each unit received (experts), or None.
        choices: how many the router chooses among, where `load` tells fewer (idle experts) or none.
        entropy: mean entropy of the router's distribution, nats per token.
        dropped: share of tokens (or pairs) that wanted compute and did not get it.
        dead_units: units that received no token.
        weight_mean, weight_std: of the weights that multiply updates.
        predictor_accuracy: share of tokens whose causal prediction matched the choice.
        losses: this rank's share of each auxiliary loss, before its coefficient.
        statistics: further numbers of one method, by name (e.g. "collapse/rc").
        weights: the router weights themselves, for histograms; detached.
        chosen: which tokens took part: bool [tokens of the source] (depth), or the chosen
            experts int64 [tokens, top_k] (width).
        scores: what the router chose by, the larger first, noise and bias included: float [tokens]
            (depth) or [tokens, choices]; None where nothing was compared.
    """

    name: str
    kind: str
    tokens: Tensor | int
    executed: Tensor | int
    executed_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    planned_share: float | None = None
    load: Tensor | None = None
    choices: int | None = None
    entropy: Tensor | None = None
    dropped: Tensor | None = None
    dead_units: Tensor | None = None
    weight_mean: Tensor | None = None
    weight_std: Tensor | None = None
    predictor_accuracy: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    chosen: Tensor | None = None
    scores: Tensor | None = None


class AuxiliaryLoss(NamedTuple):
    """`share` is this rank's part of a global-batch loss (see BatchScope), differentiable."""

    share: Tensor
    coefficient: float


class RoutingTape:
    """Collects the RoutingRecords and auxiliary losses of the forwards run inside it.

    Args:
        model: names records after its modules; without it they are numbered.
        scope: the global batch that losses are means over; by default this forward alone.

    Attributes:
        records: what each routed module did, in order.
        lengths: int [B] for each forward of a model: the tokens of the sequences it was given.
    """

    def __init__(self, model: nn.Module | None = None, *, scope: BatchScope | None = None) -> None:
        self.scope = scope if scope is not None else BatchScope()
        self.records: list[RoutingRecord] = []
        self.lengths: list[Tensor] = []
        self._losses: list[AuxiliaryLoss] = []
        self._pools: dict[str, tuple[list[Any], Callable[[list[Any]], AuxiliaryLoss]]] = {}
        self._waiting: list[Callable[[], object]] = []
        self._with_gradients = self._warned = False
        self._totals = 0
        self._names: dict[int, str] = {}
        if model is not None:
            self._names = {id(module): name for name, module in model.named_modules()}
        self._tokens: list[Token[RoutingTape | None]] = []

    def __enter__(self) -> RoutingTape:
        self._tokens.append(_active.set(self))
        self._with_gradients = torch.is_grad_enabled()
        watch(1)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _active.reset(self._tokens.pop())
        watch(-1)
        waiting, self._waiting = self._waiting, []
        for change in waiting if kind is None else ():
            change()

    def loss(self) -> Tensor | float:
        """The sum of coefficient x loss, scaled so that the engine's average is the global loss.

        Returns 0.0 when nothing was recorded, so it can be added to any loss.
        """
        total: Tensor | float = 0.0
        pooled = [finish(parts) for parts, finish in self._pools.values()]
        for share, coefficient in [*self._losses, *pooled]:
            total = total + share * (coefficient * self.scope.replicas)
        return self.scope.complete(total) if isinstance(total, Tensor) else total

    def record(
        self,
        module: nn.Module,
        record: RoutingRecord,
        losses: dict[str, AuxiliaryLoss] | None = None,
    ) -> None:
        """Add what `module` did. In a recomputed forward this does nothing."""
        if recomputing():
            return
        # The model itself has the empty path.
        record.name = self._names.get(id(module), f"{record.kind}.{len(self.records)}")
        if losses:
            self._check_gradients(module)
        for name, loss in (losses or {}).items():
            self._losses.append(loss)
            record.losses[name] = loss.share.detach()
        self.records.append(record)

    def enter(self, layout: TokenLayout) -> None:
        """A model tells what it was given. In a recomputed forward this does nothing."""
        if not recomputing():
            self.lengths.append(layout.cu_seqlens.diff())

    def when_done(self, change: Callable[[], object]) -> None:
        """Change a module's state when the tape closes; not at all when a forward has failed.

        What a step counts for later (loads, prices) is then that of forwards that came to an end:
        one that ran out of memory may be tried again.
        """
        self._waiting.append(change)

    def pool(
        self, key: str, part: PoolPart, finish: Callable[[list[PoolPart]], AuxiliaryLoss]
    ) -> None:
        """Add one module's part of a loss over several modules. In a recomputed forward, nothing.

        `loss()` calls the `finish` of the key's first part with all parts in order. Whatever needs
        the global batch belongs into the part (see `total`): `finish` may not communicate.
        """
        if not recomputing():
            self._pools.setdefault(key, ([], finish))[0].append(part)

    def _check_gradients(self, module: nn.Module) -> None:
        """Warn where a loss is lost: its gradient would only be known when the backward is over."""
        lost = self._with_gradients and module.training and not torch.is_grad_enabled()
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                "RoutingTape: auxiliary losses come without gradients, as under "
                "torch.utils.checkpoint(use_reentrant=True); use adaptive.checkpoint, or "
                "use_reentrant=False with context_fn=adaptive.recompute_contexts",
                stacklevel=2,
            )

    def total(self, local: Tensor) -> Tensor:
        """The sum of `local` over the global batch, detached. A collective: every rank calls it."""
        return decide(lambda: self._next_total(local))

    def _next_total(self, local: Tensor) -> Tensor:
        ordinal, self._totals = self._totals, self._totals + 1
        return self.scope.total(ordinal, local)


_active: ContextVar[RoutingTape | None] = ContextVar("routing_tape", default=None)


def current_tape() -> RoutingTape | None:
    """The tape to record on, or None outside any.

    A recomputation gets the tape of its first pass, wherever the backward runs: it must repeat
    every operation, the losses' too, for autograd to find the activations that it saved. What it
    records is dropped.
    """
    if unwatched_compilation():
        return None
    return decide(_active.get)


def masked_mean(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Detached mean over valid tokens; 0 when there is none."""
    values_T = values_T.detach().float()
    if valid_T is None:
        return values_T.mean() if values_T.numel() else values_T.new_zeros(())
    return torch.where(valid_T, values_T, 0).sum() / valid_T.sum().clamp(min=1)
