"""The feed-forward of a layer of transformers: found by its structure, cut into units of its own.

`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`, with biases or without; gate and up may lie in
one matrix. What a module is called is never asked; what it computes is.

Shape legend: D width, F feed-forward width, U units taken, O features of an output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptive.hub.attention import attentions
from adaptive.routing.layout import TokenLayout

Activation = Callable[[Tensor], Tensor]


class Product(NamedTuple):
    """A linear layer's weight [O, in] and bias [O] or None, or some rows of them."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, chosen: Tensor | slice) -> Product:
        return Product(self.weight[chosen], None if self.bias is None else self.bias[chosen])


class FeedForward(NamedTuple):
    """A layer's feed-forward.

    Attributes:
        name: its path in the layer.
        module: itself.
        up, down: its linear layers; `up` has 2F outputs where it holds the gate.
        gate: the third linear layer; None: there is none, or `up` holds it.
        fused: `up` holds the gate.
        activation: of the gate, or of `up` where there is none.
        dropout: of the output; None: there is none.
        gate_last: the gate stands behind `up`, not before it.
    """

    name: str
    module: nn.Module
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None
    fused: bool
    activation: Activation
    dropout: nn.Dropout | None
    gate_last: bool = False

    @property
    def width(self) -> int:
        """F."""
        return sizes(self.down)[0]

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None

    @property
    def biases(self) -> bool:
        """Whether any of its products has one."""
        parts = (self.up, self.down, self.gate)
        return any(getattr(part, "bias", None) is not None for part in parts)

    def products(self) -> tuple[Product | None, Product, Product]:
        """Of gate (or None), up and down."""
        up, down = product(self.up), product(self.down)
        if self.gate is not None:
            gate = product(self.gate)
        elif self.fused:
            gate, up = up.rows(slice(self.width)), up.rows(slice(self.width, None))
        else:
            return None, up, down
        return (up, gate, down) if self.gate_last else (gate, up, down)

    def unit(self, width: int) -> Unit:
        """A feed-forward like it, of another width."""
        return Unit(
            sizes(self.up)[0],
            width,
            gated=self.gated,
            activation=self.activation,
            input_bias=getattr(self.up, "bias", None) is not None,
            output_bias=getattr(self.down, "bias", None) is not None,
        )


class Unit(nn.Module):
    """`down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`.

    Args:
        dim, width: D; hidden channels.
        gated: whether there is a gate.
        activation: act.
        input_bias, output_bias: whether gate and up, and down, have biases.
    """

    takes_packed = True

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        gated: bool,
        activation: Activation,
        input_bias: bool,
        output_bias: bool,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=input_bias) if gated else None
        self.up = nn.Linear(dim, width, bias=input_bias)
        self.down = nn.Linear(width, dim, bias=output_bias)
        self.activation = activation

    def forward(self, x: Tensor, *, layout: TokenLayout | None = None) -> Tensor:
        """[..., D] -> [..., D]; tokens do not see each other."""
        up = self.up(x)
        if self.gate is None:
            return self.down(self.activation(up))
        return self.down(self.activation(self.gate(x)) * up)

    @torch.no_grad()
    def take(self, source: FeedForward, units_U: Tensor | slice, *, output_bias: bool) -> None:
        """Become these hidden units of a feed-forward, and its bias of the output, if asked for."""
        gate, up, down = source.products()
        pairs = [(self.up, up.rows(units_U))]
        if self.gate is not None and gate is not None:
            pairs.append((self.gate, gate.rows(units_U)))
        for mine, theirs in pairs:
            mine.weight.copy_(theirs.weight)
            if theirs.bias is not None:
                mine.bias.copy_(theirs.bias)
        self.down.weight.copy_(down.weight[:, units_U])
        if down.bias is not None:
            self.down.bias.copy_(down.bias if output_bias else torch.zeros_like(down.bias))


def find_feed_forward(layer: nn.Module, dim: int) -> FeedForward:
    """The feed-forward of a layer.

    Args:
        layer: of transformers.
        dim: D.

    Raises:
        ValueError: there is none, or more than one.
    """
    inside = {id(module) for attention in attentions(layer) for module in attention.modules()}
    found = []
    for name, module in layer.named_modules():
        if id(module) in inside or not name:
            continue
        parts = _parts(name, module, dim)
        around = layer.get_submodule(name.partition(".")[0])
        # A shared expert is no feed-forward of the layer.
        if parts is not None and _tensors(around) == _tensors(module):
            found.append(parts)
    if len(found) != 1:
        raise ValueError(
            f"has {len(found) or 'no'} gated or plain feed-forwards (a module of two or three "
            f"linear layers from and to {dim} features and an activation), and needs one"
        )
    return found[0]


def checked(found: FeedForward) -> FeedForward:
    """A feed-forward that is seen to compute what its parts say, with its gate where it is.

    On the meta device nothing can be seen.

    Raises:
        ValueError: it computes something else.
    """
    if product(found.up).weight.is_meta:
        return found
    try:
        _check_computes(found)
    except ValueError:
        other = found._replace(gate_last=True)
        if not found.gated:
            raise
        _check_computes(other)
        return other
    return found


@torch.no_grad()
def _check_computes(found: FeedForward) -> None:
    name = f"its {found.name} ({type(found.module).__name__})"
    weight = product(found.up).weight
    unit = found.unit(found.width).to(weight)
    unit.take(found, slice(None), output_bias=True)
    draw = torch.Generator().manual_seed(0)
    x_1SD = torch.randn(1, 8, weight.shape[1], generator=draw).to(weight)
    training = found.module.training
    try:
        for mode in (False, True):
            found.module.train(mode)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                try:
                    theirs = found.module(x_1SD)
                except TypeError:
                    raise ValueError(f"{name} takes more than hidden states") from None
                torch.manual_seed(0)
                mine = dropped(unit(x_1SD), found.dropout, training=mode)
            close = 1e-4 if weight.dtype.itemsize >= 4 else 3e-2
            if (
                not isinstance(theirs, Tensor)
                or theirs.shape != mine.shape
                or (theirs - mine).abs().amax() > close * mine.abs().amax()
            ):
                when = "in training, " if mode else ""
                raise ValueError(
                    f"{name} computes, {when}something else than its linear layers and its "
                    "activation say"
                )
    finally:
        found.module.train(training)


def dropped(x: Tensor, dropout: nn.Dropout | None, *, training: bool) -> Tensor:
    """The output of a feed-forward behind its dropout."""
    return x if dropout is None else F.dropout(x, dropout.p, training)


def important_units(found: FeedForward) -> Tensor:
    """int64 [F]: hidden units, those first whose weights are largest (‖up‖ ‖down‖, and ‖gate‖)."""
    gate, up, down = found.products()
    size_F = up.weight.detach().float().norm(dim=1) * down.weight.detach().float().norm(dim=0)
    if gate is not None:
        size_F = size_F * gate.weight.detach().float().norm(dim=1)
    return size_F.argsort(descending=True, stable=True)


def _tensors(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def product(linear: Any) -> Product:
    """Weight [O, in] and bias of a linear layer, however it keeps them."""
    weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
    return Product(weight, linear.bias)


def _parts(name: str, module: nn.Module, dim: int) -> FeedForward | None:
    """The feed-forward that a module is, by what it is made of; None: it is none."""
    children = list(module.children())
    linears = [child for child in children if is_linear(child)]
    own = {id(parameter) for linear in linears for parameter in linear.parameters()}
    if any(id(parameter) not in own for parameter in module.parameters()):
        return None
    ups = [linear for linear in linears if sizes(linear)[0] == dim]
    downs = [linear for linear in linears if sizes(linear)[1] == dim]
    if len(linears) == 2 and len(ups) == len(downs) == 2:  # a width of D: by their order
        ups, downs = ups[:1], downs[1:]
    if len(downs) != 1 or len(ups) != len(linears) - 1 or downs[0] in ups:
        return None
    width = sizes(downs[0])[0]
    wide = [sizes(up)[1] for up in ups]
    if wide not in ([width], [2 * width], [width, width]):
        return None
    activations = _activations(module, children)
    if len(activations) != 1:
        return None
    gate = ups[0] if len(ups) == 2 else None
    return FeedForward(
        name=name,
        module=module,
        up=ups[-1],
        down=downs[0],
        gate=gate,
        fused=wide == [2 * width],
        activation=activations[0],
        dropout=next((child for child in children if isinstance(child, nn.Dropout)), None),
    )


def _activations(module: nn.Module, children: Sequence[nn.Module]) -> list[Activation]:
    plain = [
        child
        for child in children
        if not isinstance(child, nn.Dropout | nn.Identity | nn.LayerNorm)
        and not any(True for _ in child.parameters())
    ]
    held = [value for value in vars(module).values() if inspect.isroutine(value)]
    return [*plain, *held]
