"""adapt: a model of transformers whose layers route."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PreTrainedModel

from adaptive.blocks.method import configured
from adaptive.hub.placing import apply_method, layers_field, method_named
from adaptive.hub.saving import remember

M = TypeVar("M", bound=PreTrainedModel)


def adapt(
    model: M,
    method: str,
    *,
    layers: str | int | list[int] | None = None,
    new_weights: bool = False,
    **options: Any,
) -> M:
    """Put a method into layers of a model of transformers, in place.

    What wraps whole layers is at `….routing` of each, whose weights keep their names. What stands
    in place of a feed-forward is at its name, `….routing`, and begins as the trained one: experts
    as copies, Duo's big unit as itself, ACM's learners as its hidden units, most important first;
    every token takes all of it until training says otherwise. Pattention begins as drawn.

    Args:
        model: any whose layers have one attention that says `is_causal` and reads its `config`, or,
            for feed-forwards, a gated or plain one: causal language models, and encoders of
            pictures or text.
        method: name of one of `adaptive.blocks.method.METHODS` that wraps layers or stands in place
            of feed-forwards or linear layers ("mixture_of_depths", "mixture_of_experts"), or
            "early_exit".
        layers: which; a list, or what the method's configuration takes ("all", "every_other").
            None: the method's default.
        new_weights: experts and units begin as drawn, in the method's own form.
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
    if new_weights and kind.place == "layer":
        raise ValueError(f"new_weights=True: {method} keeps the layer's weights")
    apply_method(model, config, new=new_weights)
    remember(model, config, new=new_weights)
    return model
