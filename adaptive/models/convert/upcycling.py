"""Upcycling: a dense decoder becomes a mixture of experts that computes the same at first.

Every expert starts as a copy of the dense feed-forward, and a token's weights sum to 1, so the
first forward equals the dense model's. Experts grow apart as they see other tokens.

Source: sparse upcycling, arXiv 2212.05055, section 3; with renormalised top-k weights, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models.decoder.model import Decoder, DecoderConfig

_DENSE = ("gate.weight", "up.weight", "down.weight")
_EXPERTS = "experts.gate_up_proj"


def upcycle(
    weights: Mapping[str, Tensor], config: DecoderConfig, experts: MixtureOfExpertsConfig
) -> tuple[dict[str, Tensor], DecoderConfig]:
    """Weights and configuration of the mixture that a dense decoder becomes.

    Routers are drawn from torch's default generator.

    Args:
        weights: of the dense decoder, whole, under its own names.
        config: of the dense decoder.
        experts: which layers get experts, and how.

    Returns:
        Weights as `Decoder(new_config).state_dict()` has them, in the dtype of `weights`.

    Raises:
        ValueError: if the mixture could not equal the dense model, or a weight is missing.
    """
    check_upcyclable(config, experts)
    new_config = config.with_method(experts)
    with torch.device("meta"):
        places = Decoder(new_config).state_dict()
    routed = experts.routed_layers(config.num_layers)
    out: dict[str, Tensor] = {}
    for name in places:
        if name in weights:
            out[name] = weights[name]
    for layer in routed:
        # Inside a layer that routes tokens there is a `block` between.
        prefix = _feed_forward(places, layer)
        gate, up, down = (_weight(weights, prefix + name) for name in _DENSE)
        copies = experts.num_experts
        mixture = experts.feed_forward(config.dim, ffn_dim=config.ffn_width, std=config.init_std)
        for name, tensor in mixture.state_dict().items():
            out[f"{prefix}{name}"] = tensor.to(gate)
        out[f"{prefix}{_EXPERTS}"] = torch.cat([gate, up]).repeat(copies, 1, 1)
        out[f"{prefix}experts.down_proj"] = down.repeat(copies, 1, 1)
    for name, place in places.items():
        if name not in out:
            raise ValueError(f"{name}: missing from the dense weights")
        if out[name].shape != place.shape:
            raise ValueError(
                f"{name} of shape {list(out[name].shape)}: must be {list(place.shape)}"
            )
    return out, new_config


def upcycled(dense: Decoder, experts: MixtureOfExpertsConfig) -> Decoder:
    """A mixture of experts that computes what `dense` computes; its own copy of every weight."""
    weights, config = upcycle(dense.state_dict(), dense.config, experts)
    model = Decoder(config).to(next(dense.parameters()))
    model.load_state_dict(weights)
    return model.train(dense.training)


def check_upcyclable(config: DecoderConfig, experts: MixtureOfExpertsConfig) -> None:
    """Raise ValueError where a mixture could not start as the dense model."""
    for method in config.methods:
        if method.place != "layer":
            raise ValueError(
                f"{method.name}: only a decoder with dense feed-forwards can be upcycled"
            )
    check_copies(experts, config.ffn_width)
    if experts.activation != "swiglu":
        raise ValueError(
            f"activation={experts.activation}: an upcycled mixture equals the dense model only "
            "with swiglu, the decoder's"
        )


def check_copies(experts: MixtureOfExpertsConfig, width: int) -> None:
    """Raise ValueError where experts that are copies would not compute what one does.

    Args:
        width: of the feed-forward that they are copies of.
    """
    renormalize = experts.top_k > 1 if experts.renormalize is None else experts.renormalize
    rules = {
        "top_k=1": experts.top_k == 1,
        "renormalize=False": not renormalize,
        f"choice={experts.choice}": experts.choice != "token",
        f"idle_experts={experts.idle_experts}": experts.idle_experts > 0,
        f"shared_experts={experts.shared_experts}": experts.shared_experts > 0,
        f"ffn_dim={experts.ffn_dim}": experts.ffn_dim not in (None, width),
    }
    for value, wrong in rules.items():
        if wrong:
            raise ValueError(
                f"{value}: an upcycled mixture equals the dense model only with token choice, "
                f"top_k of 2 or more, renormalised weights and experts of width {width} alone"
            )


def _feed_forward(places: Mapping[str, Tensor], layer: int) -> str:
    """What the names of a layer's mixture begin with."""
    whole = (n for n in places if n.startswith(f"layers.{layer}.") and n.endswith(_EXPERTS))
    return next(whole).removesuffix(_EXPERTS)


def _weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"{name}: missing from the dense weights")
    return weights[name]
