"""FlopCounter: a walk over a model that adds up the floating-point operations of its products.

A module takes part by one method,

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        chosen = count.chosen(self, planned=work.share(self.capacity), dense=work)
        count.routing(self.router, work)
        count(self.block, chosen)

which says what it computes for the tokens of `work` and hands the rest to its children. Modules
without the method are walked through; modules of other libraries get a rule by `register_flops`.

Conventions, those of `torch.utils.flop_counter`: a multiply-add is two operations; matrix products
count, element-wise work does not; causal attention counts its whole square. The backward pass of a
product is twice the product, once where its input or its weight needs no gradient. FLOPs are the
whole model's: a layer split over tensor ranks counts all its parts.

Shape legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import RoutingRecord


@dataclass(frozen=True, eq=False)
class Work:
    """How many tokens of each sequence a module computes, and what they attend to.

    Attributes:
        tokens: float64 [B], tokens that the module computes: queries of attention.
        source: float64 [B], tokens whose keys and values it computes.
        keys: float64 [B], keys that each query is compared with: the source, or more of them
            when earlier ones come from a cache.
        sequences: float64 [B], how many there are of each sequence, a share where a plan expects
            only some of them; None: one of each.
    """

    tokens: Tensor
    source: Tensor
    keys: Tensor
    sequences: Tensor | None = None

    @staticmethod
    def of(
        lengths: Sequence[int] | Tensor | TokenLayout, *, keys: Sequence[int] | Tensor | None = None
    ) -> Work:
        """Tokens that attend among themselves, or (`keys`) to that many keys in each sequence."""
        if isinstance(lengths, TokenLayout):
            lengths = lengths.cu_seqlens.diff()
        tokens_B = torch.as_tensor(lengths).double()
        keys_B = tokens_B if keys is None else torch.as_tensor(keys).double()
        return Work(tokens_B, tokens_B, keys_B)

    @staticmethod
    def dense(batch_size: int, seq_len: int) -> Work:
        """`batch_size` sequences of `seq_len` tokens each."""
        return Work.of(torch.full((batch_size,), float(seq_len), dtype=torch.float64))

    def share(self, capacity: float) -> Work:
        """The planned work on a share of every sequence, attending among itself.

        As many as `capacity_tokens` keeps: rounded, halves up, at least one of a sequence's tokens.
        """
        kept_B = torch.floor(self.tokens * capacity + 0.5).clamp(min=1)
        kept_B = torch.minimum(kept_B, self.tokens)
        return Work(kept_B, kept_B, kept_B, self.sequences)

    def of_sequences(self, share: float) -> Work:
        """The planned work where that share of the sequences takes part."""
        ones_B = torch.ones_like(self.tokens) if self.sequences is None else self.sequences
        return replace(self, sequences=ones_B * share)

    @property
    def of_samples(self) -> Work:
        """The work on one row for every sequence (a condition of each sample)."""
        ones_B = torch.ones_like(self.tokens)
        return Work(ones_B, ones_B, ones_B, self.sequences)

    def queries(self, share: float) -> Work:
        """The planned work on a share of the tokens, which attend to all keys (SkipLayer)."""
        return replace(self, tokens=self.tokens * share)

    def times(self, factor: float) -> Work:
        """Rows of a product that sees every token `factor` times (top-k experts). No attention."""
        rows_B = self.tokens * factor
        return Work(rows_B, rows_B, rows_B, self.sequences)

    @property
    def of_source(self) -> Work:
        """The work on the tokens whose keys and values are computed."""
        if self.is_self_attention:
            return self
        return Work(self.source, self.source, self.source, self.sequences)

    @property
    def is_self_attention(self) -> bool:
        """Whether the computed tokens are also the source of keys and values."""
        return self.source is self.tokens


class Flops(NamedTuple):
    """Operations of one pass over some work: 0-d float64 tensors, on the records' device.

    `backward` holds each product's two gradients, without `repeated`: what a backward pass
    computes a second time, because activations were not kept (`recompute`) or because attention
    keeps no scores (flash kernels).
    """

    forward: Tensor
    backward: Tensor
    repeated: Tensor


class _Cost(NamedTuple):
    """Operations for each token of a Work (`pair` False), or for each of its query-key pairs."""

    work: Work
    pair: bool


Rule = Callable[[nn.Module, "FlopCounter", Work], None]
R = TypeVar("R", bound=Rule)

_RULES: dict[type[nn.Module], Rule] = {}


def register_flops(*types: type[nn.Module]) -> Callable[[R], R]:
    """Say what modules of these types, which are not ours to change, compute.

    The decorated function has `(module, count, work)` and calls `count.linear`, `count.attention`
    or `count(child, work)`.
    """

    def add(rule: R) -> R:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return add


class FlopCounter:
    """Adds up operations; `total()` gives them.

    Args:
        records: what routed modules did, by `id` of the module; None counts what is planned.
        nominal: count as if every token were computed everywhere: the dense model's operations.
    """

    def __init__(
        self,
        records: Mapping[int, Sequence[RoutingRecord]] | None = None,
        *,
        nominal: bool = False,
    ) -> None:
        self._records = records
        self._nominal = nominal
        self._costs: dict[_Cost, list[float]] = {}
        self._repeating = False
        self._keeps: nn.Module | None = None

    def __call__(self, module: nn.Module | None, work: Work) -> None:
        """Count what `module` computes for `work`; None counts nothing.

        Raises:
            ValueError: if it has a weight matrix of its own and does not say what for.
        """
        if module is None:
            return
        repeating = self._repeating
        self._repeating = repeating and module is not self._keeps
        # Looked up on the type: a module that has none would search all its children first.
        says = getattr(type(module), "count_flops", None)
        if says is not None:
            says(module, self, work)
        else:
            self._by_rule(module, work)
        self._repeating = repeating

    def routing(self, module: nn.Module | None, work: Work) -> None:
        """Count a router or predictor: like a call, but no part of the nominal operations."""
        if not self._nominal:
            self(module, work)

    def linear(
        self,
        in_features: int,
        out_features: int,
        work: Work,
        *,
        input_grad: bool = True,
        weight_grad: bool = True,
    ) -> None:
        """A product of every token with a matrix [in_features, out_features].

        Args:
            in_features, out_features: of the whole layer, whatever this rank's part.
            work: the tokens.
            input_grad: False where the input is detached.
            weight_grad: False where the weight is frozen.
        """
        forward = 2 * in_features * out_features
        self._add(work, forward, forward * (input_grad + weight_grad))

    def attention(self, heads: int, head_dim: int, work: Work) -> None:
        """Scores and weighted sum of every query with its keys, for all heads.

        A backward that keeps no scores computes them again: half the forward, in `repeated`.
        """
        forward = 4 * heads * head_dim
        self._add(work, forward, 2 * forward, pair=True, repeated=forward / 2)

    def comparison(self, width: int, work: Work) -> None:
        """Every token's product with every key, no gradient: a matching's, no part of nominal."""
        if not self._nominal:
            self._add(work, 2 * width, 0, pair=True)

    def chosen(self, module: nn.Module, *, planned: Work, dense: Work) -> Work:
        """The work that a routed module really did, as its records say.

        Args:
            module: the routed module.
            planned: what it plans. Tells, besides counts, whether the chosen tokens attend among
                themselves (`share`) or to all keys (`queries`).
            dense: what a dense model would compute in its place; for experts, the same as planned.

        Raises:
            ValueError: if there are records, but none of this module.
        """
        if self._nominal:
            return dense
        if self._records is None:
            return planned
        records = self._records.get(id(module))
        if not records:
            raise ValueError(
                f"no record of a {type(module).__name__}: run the model inside RoutingTape(model)"
            )
        return _executed(records, planned)

    @contextmanager
    def recomputed(self, *, keeps: nn.Module | None = None) -> Iterator[None]:
        """What is counted inside is computed again in the backward pass, except in `keeps`."""
        before = self._repeating, self._keeps
        self._repeating, self._keeps = True, keeps
        try:
            yield
        finally:
            self._repeating, self._keeps = before

    def total(self) -> Flops:
        """The operations so far. Tensors; reading them waits for the device."""
        sums = [torch.zeros((), dtype=torch.float64)] * 3
        for (work, pair), coefficients in self._costs.items():
            units_B = work.tokens * work.keys if pair else work.tokens
            units = (units_B if work.sequences is None else units_B * work.sequences).sum()
            sums = [a + units * c for a, c in zip(sums, coefficients, strict=True)]
        return Flops(*sums)

    def _add(
        self,
        work: Work,
        forward: float,
        backward: float,
        *,
        pair: bool = False,
        repeated: float = 0,
    ) -> None:
        repeated += forward if self._repeating else 0
        cost = self._costs.setdefault(_Cost(work, pair), [0, 0, 0])
        for index, value in enumerate((forward, backward, repeated)):
            cost[index] += value

    def _by_rule(self, module: nn.Module, work: Work) -> None:
        for kind in type(module).__mro__:
            if kind in _RULES:
                return _RULES[kind](module, self, work)
        own = module._parameters.values()
        if any(p is not None and p.dim() > 1 for p in own):
            raise ValueError(
                f"{type(module).__name__}: has a weight matrix and says no FLOPs: give it a method "
                "count_flops(count, work), or a rule by register_flops"
            )
        for child in module._modules.values():
            self(child, work)
        return None


def _executed(records: Sequence[RoutingRecord], planned: Work) -> Work:
    """The records of one module, several when it ran several times, as one Work."""
    if all(record.executed_lengths is not None for record in records):
        tokens_B = _joined([record.executed_lengths for record in records])
    else:
        # Attention inside would need to know of which sequences; without it the sum is exact.
        executed = sum(torch.as_tensor(record.executed).double() for record in records)
        tokens_B = planned.tokens * (executed / planned.tokens.sum().clamp(min=1))
    source_B = tokens_B if planned.is_self_attention else planned.source
    keys_B = tokens_B if planned.is_self_attention else planned.keys
    if all(record.key_lengths is not None for record in records):
        keys_B = _joined([record.key_lengths for record in records])
    return Work(tokens_B, source_B, keys_B)


def _joined(lengths: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([length_B.double() for length_B in lengths if length_B is not None])


@register_flops(nn.Linear)
def _linear(module: nn.Module, count: FlopCounter, work: Work) -> None:
    assert isinstance(module, nn.Linear)
    weight_grad = module.weight.requires_grad
    count.linear(module.in_features, module.out_features, work, weight_grad=weight_grad)


@register_flops(nn.MultiheadAttention)
def _multihead_attention(module: nn.Module, count: FlopCounter, work: Work) -> None:
    assert isinstance(module, nn.MultiheadAttention)
    width = module.embed_dim
    count.linear(width, width, work)
    for source_width in (module.kdim, module.vdim):
        count.linear(source_width, width, work.of_source)
    count.attention(module.num_heads, module.head_dim, work)
    count.linear(width, width, work)


@register_flops(nn.Embedding)
def _embedding(module: nn.Module, count: FlopCounter, work: Work) -> None:
    """A look-up: no product."""
