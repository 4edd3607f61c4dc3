"""adapt: a model of transformers whose layers route."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, TypeVar

from transformers import PreTrainedModel

from adaptive.blocks.method import configured
from adaptive.hub.placing import apply_method, layers_field, method_named
from adaptive.hub.saving import remember

M = TypeVar("M", bound=PreTrainedModel)


def adapt(
    model: M, method: str, *, layers: str | int | list[int] | None = None, **options: Any
) -> M:
    """Put a method into layers of a model of transformers, in place.

    Weights keep their names; what the method adds is at `….routing` of each layer. Routers start
    so that a trained layer goes on as it was for the tokens that it computes.

    Args:
        model: any whose layers have one attention that says `is_causal` and reads its `config`:
            causal language models, and encoders of pictures or text.
        method: name of one of `adaptive.blocks.method.METHODS` that wraps whole layers, such as
            "mixture_of_depths" or "skip_layer".
        layers: which; a list, or what the method's configuration takes ("all", "every_other").
            None: the method's default.
        options: of the method's configuration.

    Returns:
        `model`.

    Raises:
        ValueError: an option is out of range, or a layer cannot be served; the model is then as it
            was.
    """
    kind = method_named(method)
    given = dict(kind.pretrained) | options
    if layers is not None:
        given[layers_field(kind)] = layers
    config = configured(kind, given)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model of type {type(model).__name__}: must be a PreTrainedModel")
    apply_method(model, config)
    remember(model, config, asdict(config))
    return model
