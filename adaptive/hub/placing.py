"""Which layers of a model a method goes to, and putting it there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from adaptive.blocks.method import LayerContext, Method, RoutedBlock, methods
from adaptive.hub.exits import EarlyExitConfig, exits_together
from adaptive.hub.feed_forward import checked, find_feed_forward
from adaptive.hub.flops import count_rules
from adaptive.hub.layers import (
    DenseLayer,
    refuse_attention,
    refuse_changed,
    refuse_layer,
    route_layer,
    takes_queries,
)
from adaptive.hub.replacing import (
    AdaptedFeedForward,
    mask_layer,
    replaced_feed_forward,
    replaced_linears,
)
from parallel.mesh import Mesh

M = TypeVar("M", bound=PreTrainedModel)


def apply_method(model: M, config: Method, *, new: bool = False, takes: bool = True) -> M:
    """Put a method into the layers that its configuration names, in place.

    Args:
        config: of the method.
        new: what it puts in place of trained weights begins as drawn, not as those.
        takes: trained weights are there to be taken, and to be looked at; False where they are
            still to be loaded.

    Raises:
        ValueError: a layer cannot be served; the model is then as it was.
    """
    stack = layer_stack(model)
    chosen = config.routed_layers(len(stack))
    if config.place == "layer":
        _route_layers(model, config, stack, chosen)
        count_rules(model)
        return model
    dim = model.config.get_text_config().hidden_size
    built: dict[int, dict[str, nn.Module]] = {}
    for index in chosen:
        layer, context = stack[index], _context(model, index, len(stack))
        with _named_by(layer), _in_float32():
            refuse_changed(layer, AdaptedFeedForward)
            found = find_feed_forward(layer, dim)
            if config.place == "linear":
                refuse_attention(layer)
                built[index] = replaced_linears(config, context, layer, found)
                continue
            found = checked(found) if takes and not new else found
            made = replaced_feed_forward(config, context, found, new=new, takes=takes)
            built[index] = {found.name: made}
    for index, parts in built.items():
        weight = next(p for p in stack[index].parameters() if p.is_floating_point())
        for name, part in parts.items():
            part.to(weight.device, weight.dtype).train(stack[index].training)
            stack[index].set_submodule(name, part)
        mask_layer(stack[index])
    count_rules(model)
    return model


def _route_layers(
    model: PreTrainedModel, config: Method, stack: nn.ModuleList, chosen: list[int]
) -> None:
    for index in chosen:
        refuse_layer(stack[index])
    built: dict[int, RoutedBlock] = {}
    for index in chosen:
        inner = DenseLayer(takes_queries=takes_queries(stack[index]))
        with _named_by(stack[index]), _in_float32():
            built[index] = config.build(_context(model, index, len(stack)), inner)
    exits_together(built.values())
    for index, routing in built.items():
        route_layer(stack[index], routing)


def layer_stack(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers, in the order in which they run.

    Raises:
        ValueError: there is no list of as many modules as its config says, or more than one.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: has an encoder and a decoder; give a model of one stack")
    count = getattr(config, "num_hidden_layers", None)
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # What a layer is made of (experts) may come in as many.
    inside = {id(m) for stack in stacks for layer in stack for m in layer.modules()}
    stacks = [stack for stack in stacks if id(stack) not in inside]
    if len(stacks) != 1:
        raise ValueError(
            f"{name}: has {len(stacks) or 'no'} lists of num_hidden_layers={count} modules; "
            "needs one"
        )
    return stacks[0]


def method_named(name: str) -> type[Method]:
    """A method that can be put into other people's models, by its name."""
    kinds: list[type[Method]] = [*methods("layer", "feed_forward", "linear"), EarlyExitConfig]
    served = {method.name: method for method in kinds}
    if name not in served:
        known = [method.name for method in methods()]
        what = "runs no layers of transformers" if name in known else "is no method"
        raise ValueError(f"method={name!r}: {what}; must be one of {', '.join(served)}")
    return served[name]


def layers_field(kind: type[Method]) -> str:
    names = {field.name for field in fields(kind)}
    for name in ("layers", "schedule"):
        if name in names:
            return name
    raise ValueError(f"layers: {kind.name} takes none; it changes every layer")


@contextmanager
def _named_by(layer: nn.Module) -> Iterator[None]:
    """Refusals inside begin with the layer's class; so does what a method would do instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    except (UserWarning, ValueError) as refusal:
        raise ValueError(f"{type(layer).__name__}: {refusal}") from None


@contextmanager
def _in_float32() -> Iterator[None]:
    """transformers loads under the dtype of the weights, too coarse for what is compared."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _context(model: PreTrainedModel, layer: int, num_layers: int) -> LayerContext:
    config = model.config.get_text_config()
    dim = config.hidden_size
    std = float(getattr(config, "initializer_range", None) or 0.02)
    return LayerContext(
        layer=layer,
        num_layers=num_layers,
        dim=dim,
        ffn_dim=getattr(config, "intermediate_size", None) or 4 * dim,
        std=std,
        output_std=std,
        mesh=Mesh.single(),
    )
