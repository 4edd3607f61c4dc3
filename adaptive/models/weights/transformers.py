"""Decoders with the settings and weights of models of `transformers`, both ways.

Names are those of their safetensors files; settings those of their config.json. Rotary pairs are
the same (rotate-half), so weights go as they are. A layer that routes tokens keeps its weights
under the dense layer's names, and what the method adds is at `model.layers.N.routing.…`, with an
entry `adaptive` in the settings: a model of `adaptive.hub`, as its `save_pretrained` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.blocks.method import Method, configured, methods
from adaptive.models.decoder.model import Decoder, DecoderConfig
from adaptive.models.weights.families import (
    Family,
    family_named,
    family_of,
    read_settings,
    write_settings,
)

ENTRY = "adaptive"

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    "query.weight": "q_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "output.weight": "o_proj.weight",
    "query_bias": "q_proj.bias",
    "key_bias": "k_proj.bias",
    "value_bias": "v_proj.bias",
    "query_norm.weight": "q_norm.weight",
    "key_norm.weight": "k_norm.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"ffn.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    "ffn.shared.gate.weight": "mlp.shared_expert_gate.weight",
}
# What transformers 5 calls tensors in memory, and its files of some families.
_STACKED = {
    "ffn.router.weight": ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
    "ffn.experts.gate_up_proj": ("mlp.experts.gate_up_proj",),
    "ffn.experts.down_proj": ("mlp.experts.down_proj",),
}


class Part(NamedTuple):
    """Where one of their tensors lies in ours: all of `name`, or the part `at`."""

    name: str
    at: tuple[int | slice, ...] = ()


def decoder_config(settings: Mapping[str, Any]) -> DecoderConfig:
    """The configuration of a decoder from a config.json.

    Raises:
        ValueError: names the setting that is missing or that our decoder cannot express.
    """
    layers: list[Method] = []
    if settings.get("model_type") == ENTRY:
        base, layers = _entry(settings.get(ENTRY))
        settings = {**settings, "model_type": base}
    try:
        config = read_settings(settings)
    except TypeError as error:
        raise ValueError(f"the settings have a value of another kind: {error}") from None
    for method in layers:
        config = config.with_method(method)
    return config


def transformers_settings(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder.

    Raises:
        ValueError: no model of transformers computes the same; names the method, or says what
            there is.
    """
    dense, layers = _without_routing(config)
    settings = write_settings(family_of(dense), dense)
    if not layers:
        return settings
    adaptations = [{"method": m.name, "options": asdict(m)} for m in layers]
    entry = {"base": settings["model_type"], "architecture": settings["architectures"][0]}
    return {**settings, "model_type": ENTRY, ENTRY: {**entry, "adaptations": adaptations}}


def from_transformers(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: DecoderConfig,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Weights under a decoder's names, as `Decoder.state_dict()` has them.

    Every tensor has exactly one place, and every place is filled. Nothing is copied but experts
    that come one by one, into their stack, and what is of another dtype.

    Args:
        weights: by their names; or pairs, so that all of them need never be in memory twice.
        config: see `decoder_config`.
        dtype: of the result; None: as they come.

    Raises:
        ValueError: names the first tensor that is missing, comes twice, has another shape, or that
            the decoder has no place for.
    """
    places, parts, others = _names(config)
    left = {name: place.numel() for name, place in places.items()}
    ours: dict[str, Tensor] = {}
    head, used = _WHOLE["output.weight"], set()
    copy: Tensor | None = None
    given = weights.items() if isinstance(weights, Mapping) else weights
    for theirs, tensor in _apart(given, config):
        if theirs.endswith("rotary_emb.inv_freq"):
            continue
        if theirs == head and config.tie_embeddings:
            copy = tensor
            continue
        part = parts.get(theirs) or others.get(theirs)
        if part is None:
            raise ValueError(f"{theirs}: a decoder has no place for it")
        shape = places[part.name][part.at].shape
        if tensor.shape != shape:
            raise ValueError(
                f"{theirs} of shape {list(tensor.shape)}: must be {list(shape)} by the settings"
            )
        left[part.name] -= tensor.numel()
        if theirs in used or left[part.name] < 0:
            raise ValueError(f"{theirs}: comes twice")
        used.add(theirs)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if not part.at:
            ours[part.name] = tensor.to(wanted)
            continue
        if part.name not in ours:
            ours[part.name] = torch.empty(places[part.name].shape, dtype=wanted)
        ours[part.name][part.at] = tensor
    for theirs, part in parts.items():
        if left[part.name] and theirs not in used:
            raise ValueError(f"{theirs}: missing from the weights")
    if config.tie_embeddings:
        ours["output.weight"] = ours["embedding.weight"]
        if copy is not None and not torch.equal(
            copy.to(ours["output.weight"]), ours["output.weight"]
        ):
            raise ValueError(f"{head}: differs from the embedding that it is tied to")
    return ours


def to_transformers(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """A decoder's weights under the names of published files, one tensor an expert: views.

    Args:
        weights: as `Decoder.state_dict()` has them; tied ones once or twice.
        config: of the decoder.

    Raises:
        ValueError: no model of transformers computes the same, or a weight is missing or unknown.
    """
    places, parts, _ = _names(config)
    for name in weights:
        if name not in places and not (config.tie_embeddings and name == "output.weight"):
            raise ValueError(f"{name}: is not in this decoder")
    for name in places:
        if name not in weights:
            raise ValueError(f"{name}: missing from the weights")
    return {theirs: weights[part.name][part.at] for theirs, part in parts.items()}


def loaded(weights: Mapping[str, Tensor], config: DecoderConfig) -> Decoder:
    """A decoder in evaluation mode that holds these very tensors, all of one dtype."""
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(dict(weights), assign=True)
    if config.tie_embeddings:
        model.output.weight = model.embedding.weight
    return model.eval()


def _names(
    config: DecoderConfig,
) -> tuple[dict[str, Tensor], dict[str, Part], dict[str, Part]]:
    """Our tensors (of shapes alone), what each of theirs is of ours, and other names for them."""
    dense, layers = _without_routing(config)
    family = family_of(dense)
    with torch.device("meta"):
        places = Decoder(config).state_dict()
    if config.tie_embeddings:
        del places["output.weight"]
    parts: dict[str, Part] = {}
    others: dict[str, Part] = {}
    for name, place in places.items():
        if name in _WHOLE:
            parts[_WHOLE[name]] = Part(name)
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        routed = any(int(layer) in method.routed_layers(config.num_layers) for method in layers)
        if routed and not rest.startswith("block."):
            parts[f"{prefix}routing.{rest}"] = Part(name)
            continue
        rest = rest.removeprefix("block.") if routed else rest
        for theirs, index in _published(family, rest, place):
            parts[prefix + theirs] = Part(name, index)
        others |= {prefix + theirs: Part(name) for theirs in _STACKED.get(rest, ())}
    return places, parts, others


def _published(
    family: Family, rest: str, place: Tensor
) -> list[tuple[str, tuple[int | slice, ...]]]:
    """The published names of a layer's tensor, and the part of it that each is."""
    if rest in _LAYER:
        return [(_LAYER[rest], ())]
    names = family.experts
    assert names is not None, rest
    if rest == "ffn.router.weight":
        return [(names.router, ())]
    _, kind, weight = rest.split(".")
    parts: tuple[tuple[str, tuple[slice, ...]], ...] = ((names.down, ()),)
    if weight == "gate_up_proj":
        width = place.shape[1] // 2
        parts = (names.gate, (slice(width),)), (names.up, (slice(width, None),))
    if kind == "shared":
        return [(f"mlp.shared_expert.{part}.weight", (0, *index)) for part, index in parts]
    return [
        (names.expert.format(expert, part), (expert, *index))
        for expert in range(place.shape[0])
        for part, index in parts
    ]


def _apart(
    weights: Iterable[tuple[str, Tensor]], config: DecoderConfig
) -> Iterator[tuple[str, Tensor]]:
    """Tensors, those that hold several of a layer's products (Phi-3) as views of each."""
    width = config.head_dim or config.dim // config.num_heads
    rows = {
        "qkv_proj": dict(
            zip(
                ("q_proj", "k_proj", "v_proj"),
                (config.num_heads * width, *[config.kv_heads * width] * 2),
                strict=True,
            )
        ),
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.ffn_width),
    }
    for theirs, tensor in weights:
        before, _, part = theirs.removesuffix(".weight").rpartition(".")
        parts = rows.get(part)
        # Experts are stacked under the second name, and are one tensor of ours.
        if parts is None or not theirs.endswith(".weight"):
            yield theirs, tensor
            continue
        if tensor.shape[0] != sum(parts.values()):
            raise ValueError(
                f"{theirs} of shape {list(tensor.shape)}: must have {sum(parts.values())} rows by "
                "the settings"
            )
        for name, piece in zip(parts, tensor.split(list(parts.values())), strict=True):
            yield f"{before}.{name}.weight", piece


def _without_routing(config: DecoderConfig) -> tuple[DecoderConfig, list[Method]]:
    """The decoder whose layers compute every token, and the methods that choose for some of them.

    Raises:
        ValueError: names a method that no published tensors can tell.
    """
    layers = [method for method in config.methods if method.place == "layer"]
    for method in config.methods:
        if method not in layers and method.name != "mixture_of_experts":
            raise ValueError(f"{method.name}: models of transformers have nothing like it")
    without: dict[str, Any] = {method.name: None for method in layers}
    routing = [method for method in layers if method.routed_layers(config.num_layers)]
    return replace(config, **without), routing


def _entry(entry: Any) -> tuple[str, list[Method]]:
    """The base and the methods of an adapted model, from a file that anybody may have written."""
    found = entry if isinstance(entry, Mapping) else {}
    adaptations = found.get("adaptations")
    if not isinstance(adaptations, list):
        raise ValueError(f"{ENTRY}: must have base and adaptations, as adaptive.hub writes them")
    base = family_named(found.get("base")).name
    known = {method.name: method for method in methods("layer")}
    chosen = []
    for adaptation in adaptations:
        given = adaptation if isinstance(adaptation, Mapping) else {}
        name, options = given.get("method"), given.get("options")
        if name not in known or not isinstance(options, dict):
            raise ValueError(
                f"{ENTRY}.adaptations: method={name!r}: must be one of {', '.join(known)}, "
                "with options"
            )
        chosen.append(configured(known[name], options))
    return base, chosen
