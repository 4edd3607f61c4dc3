"""Upcycled decoders equal the dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.convert.upcycling import upcycle, upcycled
from adaptive.models.weights.transformers import decoder_config, from_transformers, loaded
from tests.adaptive.models.test_transformers_weights import ids, random_model

EXPERTS = MixtureOfExpertsConfig(num_experts=4, top_k=2)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_a_transformers_model_is_read_and_upcycled_to_the_same_logits(
    kind: str, settings: dict[str, Any]
) -> None:
    theirs = random_model(kind, settings)
    config = decoder_config(theirs.config.to_dict())
    weights = from_transformers(theirs.state_dict(), config)
    sparse = loaded(*upcycle(weights, config, EXPERTS))
    torch.testing.assert_close(sparse(ids()), theirs(ids()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["all", [1]])
@pytest.mark.parametrize("router", ["linear", "hyperspherical"])
def test_our_dense_decoder_is_upcycled_to_the_same_logits(schedule: Any, router: Any) -> None:
    torch.manual_seed(0)
    dense = Decoder(DecoderConfig(dim=32, num_heads=4, num_layers=2, ffn_dim=48, init_std=0.3))
    experts = MixtureOfExpertsConfig(num_experts=4, top_k=2, schedule=schedule, router=router)
    sparse = upcycled(dense, experts)
    torch.testing.assert_close(sparse(ids()), dense(ids()), atol=1e-4, rtol=0)
    # A copy: training one leaves the other.
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in dense.parameters())


@pytest.mark.parametrize(
    "routing",
    [
        {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5)},
        {"skip_layer": SkipLayerConfig()},
    ],
)
def test_layers_that_route_tokens_are_upcycled_inside(routing: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_heads": 4, "num_layers": 2, "ffn_dim": 48, "init_std": 0.3}
    dense = Decoder(DecoderConfig(**sizes, **routing)).eval()
    sparse = upcycled(dense, EXPERTS)
    assert sparse.layers[1].block.ffn.experts.down_proj.shape == (4, 32, 48)
    torch.testing.assert_close(sparse(ids()), dense(ids()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1}, "top_k=1: an upcycled mixture equals the dense model only with"),
        ({"renormalize": False}, "renormalize=False: an upcycled"),
        ({"shared_experts": 1}, "shared_experts=1: an upcycled"),
        ({"idle_experts": 2}, "idle_experts=2: an upcycled"),
        ({"ffn_dim": 40}, "ffn_dim=40: .* of width 48 alone"),
        ({"activation": "gelu"}, "activation=gelu: an upcycled"),
    ],
)
def test_what_could_not_equal_the_dense_model_is_one_clear_line(
    options: dict[str, Any], message: str
) -> None:
    dense = Decoder(DecoderConfig(dim=32, num_heads=4, num_layers=1, ffn_dim=48))
    with pytest.raises(ValueError, match=message):
        upcycled(dense, MixtureOfExpertsConfig(num_experts=4, **options))
