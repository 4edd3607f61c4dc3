"""A dense decoder whose layers become those of a method that wraps whole layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptive.models.decoder.model import Decoder, DecoderConfig


def wrap_layers(
    weights: Mapping[str, Tensor], dense: DecoderConfig, config: DecoderConfig
) -> dict[str, Tensor]:
    """Weights of the decoder that a dense one becomes when methods wrap its layers.

    What the dense decoder lacks (routers, predictors, gates) is drawn from torch's default
    generator.

    Args:
        weights: of the dense decoder, whole, under its own names; tied ones once or twice.
        dense: its configuration.
        config: the same with methods of the place "layer".

    Returns:
        Weights as `Decoder(config).state_dict()` has them, tied ones twice.

    Raises:
        ValueError: if the two differ in more than such methods.
    """
    added = [method for method in config.methods if method not in dense.methods]
    if not added or any(method.place != "layer" for method in added):
        names = ", ".join(method.name for method in added) or "nothing"
        raise ValueError(f"model: gains {names}: must gain methods that wrap whole layers")
    without: dict[str, Any] = {method.name: None for method in added}
    if replace(config, **without) != dense:
        raise ValueError("model: other keys than those of the methods are not the source's")
    out = Decoder(config).state_dict()
    left = dict(weights)
    for name in out:
        # A wrapped layer stands as the `block` of what wraps it.
        for source in (name, name.replace(".block.", ".")):
            if source in weights:
                out[name] = weights[source]
                left.pop(source, None)
                break
    if left:
        raise ValueError(f"{min(left)}: has no place in the new model")
    return out


def keep_layers(
    weights: Mapping[str, Tensor], config: DecoderConfig, layers: Sequence[int]
) -> tuple[dict[str, Tensor], DecoderConfig]:
    """The decoder of some layers of another, in this order: a smaller dense model to compare with.

    Raises:
        ValueError: a layer that it does not have.
    """
    for layer in layers:
        if not 0 <= layer < config.num_layers:
            raise ValueError(
                f"layers={list(layers)}: {layer} must be in 0..{config.num_layers - 1}"
            )
    out = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.")}
    for place, layer in enumerate(layers):
        prefix = f"layers.{layer}."
        for name, tensor in weights.items():
            if name.startswith(prefix):
                out[f"layers.{place}.{name.removeprefix(prefix)}"] = tensor
    return out, replace(config, num_layers=len(layers))
