"""What stands in place of feed-forwards and linear layers of transformers.

Feed-forwards that choose their compute a token (experts, ACM, Duo) begin as the trained one: every
expert a copy, the big unit itself, a row of learners its hidden units in groups.

Shape legend: B sequences, S tokens, T = B*S, N taken pairs, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.blocks.adaptive_computation import AdaptiveComputationModule
from adaptive.blocks.mixture_of_experts import MixtureOfExperts, MixtureOfExpertsConfig
from adaptive.blocks.protocol import LayerContext, Linears, Method
from adaptive.blocks.sized_feed_forward import BIG, SizedFeedForward
from adaptive.hub.attention import attentions, token_mask
from adaptive.hub.calls import arguments_of, named
from adaptive.hub.feed_forward import (
    FeedForward,
    Unit,
    dropped,
    important_units,
    is_linear,
    sizes,
)
from adaptive.models.convert.upcycling import check_copies
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.permute import permute, unpermute

_TOKENS: ContextVar[Tensor | None] = ContextVar("tokens", default=None)
"""bool [B, S]: which tokens of the layer under way are no padding; None: all."""


@contextmanager
def real_tokens(mask_BS: Tensor | None) -> Iterator[None]:
    """Say, for what is inside, which tokens are real; None: all."""
    before = _TOKENS.set(mask_BS)
    try:
        yield
    finally:
        _TOKENS.reset(before)


class AdaptedFeedForward(nn.Module):
    """In a layer, where its feed-forward was: the method's module, at `routing`."""

    def __init__(self, routing: nn.Module, dropout: nn.Dropout | None) -> None:
        super().__init__()
        self.routing = routing
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """The update [B, S, D] of normed hidden states; zero at padding."""
        mask_BS = _TOKENS.get()
        if mask_BS is not None:
            mask_BS = mask_BS.view(hidden.shape[:-1])
        update = self.routing(hidden, token_mask=mask_BS)
        return dropped(update, self.dropout, training=self.training)


class MaskedLayer(nn.Module):
    """What a layer's class derives from first, so that its feed-forward learns of padding.

    Attributes:
        call_arguments: what its forward takes.
        tells_tokens: who calls it says which tokens are real, by `real_tokens`.
    """

    call_arguments: inspect.Signature
    tells_tokens = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.tells_tokens:
            return super().forward(*args, **kwargs)
        given = named(self.call_arguments, args, kwargs)
        hidden = given[next(iter(self.call_arguments.parameters))]
        with real_tokens(token_mask(given.get("attention_mask"), *hidden.shape[:2])):
            return super().forward(*args, **kwargs)


class UnitExperts(nn.Module):
    """Experts of any activation, biases included, one after the other; as `Experts` otherwise.

    Reads how many rows each expert has back to the host.
    """

    compiles = False

    def __init__(self, units: list[Unit]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

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
        parts = permute(x_TD, pairs_N, top_k).split(rows_per_expert_e.tolist())
        y_ND = torch.cat([unit(part) for unit, part in zip(self.units, parts, strict=True)])
        return unpermute(y_ND, pairs_N, weights_TK, (x_TD.shape[0], top_k))

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Every token-expert pair of `work` passes one unit."""
        count(self.units[0], work)


def replaced_feed_forward(
    config: Method, context: LayerContext, found: FeedForward, *, new: bool, takes: bool
) -> AdaptedFeedForward:
    """The method's module, for the place of a feed-forward.

    Args:
        config: of place "feed_forward".
        context: where, its `ffn_dim` ignored.
        found: what stands there now.
        new: the method's own weights and form, drawn; else those of `found`.
        takes: weights of `found` are taken; False where they are still to be loaded.

    Raises:
        ValueError: the method cannot begin as what stands there.
    """
    context = replace(context, ffn_dim=found.width)
    if isinstance(config, MixtureOfExpertsConfig):
        routing = _experts(config, context, found, new=new, takes=takes)
    else:

        def unit(width: int) -> Unit:
            return found.unit(width)

        routing = config.build(context, unit)
        _start_whole(routing)
        for module in routing.modules():
            if isinstance(module, Unit) and new:
                _draw(module, context.std)
        if takes and not new:
            _take(routing, found)
    return AdaptedFeedForward(routing, found.dropout)


def replaced_linears(
    config: Method, context: LayerContext, layer: nn.Module, found: FeedForward
) -> dict[str, nn.Module]:
    """What stands in place of the linear layers of a layer's attention, and of its feed-forward.

    Args:
        config: of place "linear".

    Returns:
        By their paths in the layer.
    """
    made: Linears = config.build(context, Linears(nn.Linear, nn.Linear))
    (attention,) = attentions(layer)
    path = next(name for name, module in layer.named_modules() if module is attention)
    linears = {f"{path}.{n}": m for n, m in attention.named_modules() if is_linear(m)}
    output = list(linears)[-1]
    out: dict[str, nn.Module] = {
        name: (made.output if name == output else made.input)(*sizes(linear))
        for name, linear in linears.items()
    }
    assert made.feed_forward is not None
    out[found.name] = AdaptedFeedForward(made.feed_forward(found.width), found.dropout)
    return out


def mask_layer(layer: nn.Module) -> None:
    """Let the feed-forward of a layer learn of padding."""
    if not isinstance(layer, MaskedLayer):
        layer.__class__ = _masked(type(layer))


def _masked(dense: type[Any]) -> type[MaskedLayer]:
    if dense not in _MASKED:
        given = {"call_arguments": arguments_of(dense)}
        _MASKED[dense] = type(f"Masked{dense.__name__}", (MaskedLayer, dense), given)
    return _MASKED[dense]


_MASKED: dict[Any, type[MaskedLayer]] = {}


def _experts(
    config: MixtureOfExpertsConfig,
    context: LayerContext,
    found: FeedForward,
    *,
    new: bool,
    takes: bool,
) -> nn.Module:
    if new:
        return config.build(context, None)  # type: ignore[arg-type]
    check_copies(config, found.width)
    routing = config.build(context, None)  # type: ignore[arg-type]
    assert isinstance(routing, MixtureOfExperts)
    whole = slice(None)
    if found.gated and not found.biases and _is_silu(found):
        if takes:
            gate, up, down = found.products()
            assert gate is not None
            with torch.no_grad():
                routing.experts.up_weight.copy_(torch.cat([gate.weight, up.weight]))
                routing.experts.down_proj.copy_(down.weight)
        return routing
    units = [found.unit(found.width) for _ in range(config.num_experts)]
    for unit in units if takes else ():
        unit.take(found, whole, output_bias=True)
    routing.experts = UnitExperts(units)  # type: ignore[assignment]
    routing.experts.requires_grad_(not config.freeze_experts)
    return routing


def _is_silu(found: FeedForward) -> bool:
    x = torch.linspace(-8, 8, 65, device="cpu")
    return torch.allclose(found.activation(x), nn.functional.silu(x), atol=1e-6)


def _start_whole(routing: nn.Module) -> None:
    """Let every token take all of the feed-forward until training says otherwise."""
    router: Any = None
    if isinstance(routing, AdaptiveComputationModule):
        router, whole = routing.gate.down, len(routing.learners)
    elif isinstance(routing, SizedFeedForward):
        router, whole = routing.router, BIG
    if router is not None:
        nn.init.zeros_(router.weight)
        with torch.no_grad():
            router.bias[whole] = 2.0


def _take(routing: nn.Module, found: FeedForward) -> None:
    order_F = important_units(found)
    if isinstance(routing, AdaptiveComputationModule):
        for index, units_U in enumerate(order_F.chunk(len(routing.learners))):
            _unit(routing.learners[index]).take(found, units_U, output_bias=not index)
        return
    if isinstance(routing, SizedFeedForward):
        small = _unit(routing.small)
        _unit(routing.big).take(found, slice(None), output_bias=True)
        small.take(found, order_F[: small.up.out_features], output_bias=True)
        return
    raise ValueError(
        f"{type(routing).__name__}: cannot begin as a trained feed-forward; pass new_weights=True"
    )


def _unit(module: nn.Module) -> Unit:
    assert isinstance(module, Unit)
    return module


def _draw(unit: Unit, std: float) -> None:
    for linear in (unit.gate, unit.up, unit.down):
        if linear is not None:
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
