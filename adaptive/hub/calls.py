"""The arguments of a layer's forward, by their names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def arguments_of(dense: type[nn.Module]) -> inspect.Signature:
    """What a layer's forward takes, without self; of an adapted one, what its dense one's did."""
    known: inspect.Signature | None = getattr(dense, "call_arguments", None)
    if known is not None:
        return known
    signature = inspect.signature(dense.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def named(
    arguments: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(arguments.parameters, args, strict=False)), **kwargs}


_CACHES = ("past_key_values", "past_key_value", "layer_past")


def cache_argument(arguments: inspect.Signature) -> str:
    """The argument by which a layer's forward takes a cache; "" if there is none."""
    return next((name for name in _CACHES if name in arguments.parameters), "")
