"""Saved and loaded as models of transformers are: an entry in config.json says what was adapted.

The entry names methods of `METHODS` and their options, nothing else: a folder runs no code. Its
`model_type` is "adaptive", so that who does not know us refuses it instead of loading it dense.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adaptive.blocks.method import Method, configured
from adaptive.hub.placing import apply_method, method_named

ENTRY = "adaptive"
_AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
_CLASSES: dict[Any, Any] = {}


class AdaptedConfig:
    """What an adapted model's configuration derives from first."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_type": ENTRY}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        known = config_dict | {"model_type": getattr(cls, "model_type", None)}
        return super().from_dict(known, **kwargs)  # type: ignore[misc]


class AdaptedModel(PreTrainedModel):
    """What an adapted model's class derives from first."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for method, new in _adaptations(config):
            apply_method(self, method, new=new, takes=False)


class AdaptiveConfig(PreTrainedConfig):
    """The way in: reads whose configuration a folder has, and makes that adapted."""

    model_type = ENTRY

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        entry = _entry(config_dict.get(ENTRY))
        adapted = _adapted_config(CONFIG_MAPPING[entry["base"]])
        _register(adapted)
        return adapted.from_dict(config_dict, **kwargs)


AutoConfig.register(ENTRY, AdaptiveConfig)


def remember(model: PreTrainedModel, method: Method, *, new: bool = False) -> None:
    """Write into the model's configuration what was done to it, and let it be saved so.

    Args:
        model: adapted by now.
        method: the configuration that did it.
        new: what it put in place of trained weights began as drawn.
    """
    config = model.config
    if not isinstance(config, AdaptedConfig):
        entry = {"base": config.model_type, "architecture": type(model).__name__}
        setattr(config, ENTRY, entry | {"adaptations": []})
        config.__class__ = _adapted_config(type(config))
        model.__class__ = _adapted_model(type(model))
    said: dict[str, Any] = {"method": method.name, "options": asdict(method)}
    getattr(config, ENTRY)["adaptations"].append(said | ({"new_weights": True} if new else {}))


def load_adapted(folder: str | os.PathLike[str], **options: Any) -> Any:
    """An adapted model as `save_pretrained` left it, of the class that it had.

    Args:
        folder: with config.json and safetensors files.
        options: of `from_pretrained`.

    Raises:
        ValueError: the folder holds no adapted model, or names a method or an architecture that is
            not here.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, AdaptedConfig):
        raise ValueError(f"{folder}: holds no adapted model; adapt it and save it first")
    name = getattr(config, ENTRY)["architecture"]
    base = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise ValueError(f"{folder}: architecture={name!r}: transformers has no such model")
    model = _adapted_model(base)
    return model.from_pretrained(folder, config=config, use_safetensors=True, **options)


def _entry(entry: Any) -> dict[str, Any]:
    """The entry of a config.json that anybody may have written.

    Raises:
        ValueError: it is not what `remember` writes.
    """
    parts = {"base": str, "architecture": str, "adaptations": list}
    for name, kind in parts.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise ValueError(
                f"config.json: {ENTRY}.{name}: must be a {kind.__name__}, as save_pretrained of "
                "an adapted model writes it"
            )
    if entry["base"] not in CONFIG_MAPPING or entry["base"] == ENTRY:
        raise ValueError(
            f"config.json: {ENTRY}.base={entry['base']!r}: transformers has no such model"
        )
    return entry


def _adaptations(config: PreTrainedConfig) -> list[tuple[Method, bool]]:
    """The methods, and whether what they put in place of weights is of their own form."""
    found = []
    for adaptation in _entry(getattr(config, ENTRY, None))["adaptations"]:
        if not isinstance(adaptation, dict) or not isinstance(adaptation.get("options"), dict):
            raise ValueError(f"config.json: {ENTRY}.adaptations: must have method and options")
        kind = method_named(str(adaptation.get("method")))
        new = adaptation.get("new_weights") is True
        found.append((configured(kind, adaptation["options"]), new))
    return found


def _adapted_config(base: type[PreTrainedConfig]) -> Any:
    return _derived(AdaptedConfig, base, {})


def _adapted_model(base: Any) -> Any:
    return _derived(AdaptedModel, base, {"config_class": _adapted_config(base.config_class)})


def _derived(first: type, base: type, given: dict[str, Any]) -> Any:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Adapted{base.__name__}", (first, base), given)
    return _CLASSES[base]


def _register(adapted: Any) -> None:
    """Let every AutoModel that has a class for the configuration's base have its adapted one."""
    base = adapted.__mro__[2]
    for name in _AUTO:
        mapping = getattr(transformers, name)._model_mapping
        model = mapping.get(base, None)
        if isinstance(model, type) and issubclass(model, nn.Module):
            mapping.register(adapted, _adapted_model(model), exist_ok=True)
