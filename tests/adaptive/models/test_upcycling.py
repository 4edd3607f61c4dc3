"""Upcycled decoders equal the dense ones; weights of `transformers` models load and save back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.convert.upcycling import upcycle, upcycled
from adaptive.models.weights.transformers import (
    decoder_config,
    from_transformers,
    mixtral_settings,
    to_mixtral,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EXPERTS = MixtureOfExpertsConfig(num_experts=4, top_k=2)


def saved(kind: str, folder: Path, **settings: Any) -> torch.nn.Module:
    """A random model of `transformers`, saved as it saves models."""
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral"}
    config = getattr(transformers, f"{names[kind]}Config")(**SIZES, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    return model


def read(folder: Path) -> tuple[dict[str, Tensor], DecoderConfig]:
    config = decoder_config(json.loads((folder / "config.json").read_text()))
    return from_transformers(load_file(folder / "model.safetensors"), config), config


def ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(61, (2, 11))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500.0}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_a_transformers_model_is_read_and_upcycled_to_the_same_logits(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved(kind, tmp_path, **settings)
    weights, config = read(tmp_path)
    expected = theirs(ids()).logits
    dense = Decoder(config)
    dense.load_state_dict(weights)
    torch.testing.assert_close(dense(ids()), expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 0.5
    sparse_weights, sparse_config = upcycle(weights, config, EXPERTS)
    sparse = Decoder(sparse_config)
    sparse.load_state_dict(sparse_weights)
    torch.testing.assert_close(sparse(ids()), expected, atol=1e-4, rtol=0)


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


def test_mixtral_is_read_and_written_back(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    theirs = saved("mixtral", tmp_path / "in", num_local_experts=4, num_experts_per_tok=2)
    weights, config = read(tmp_path / "in")
    ours = Decoder(config)
    ours.load_state_dict(weights)
    expected = theirs(ids()).logits
    torch.testing.assert_close(ours(ids()), expected, atol=1e-4, rtol=0)
    out = tmp_path / "out"
    out.mkdir()
    written = to_mixtral(ours.state_dict(), config)
    save_file({n: t.contiguous() for n, t in written.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(mixtral_settings(config)))
    again = MixtralForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(again(ids()).logits, expected, atol=1e-5, rtol=0)
    original = load_file(tmp_path / "in" / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"]
)
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    saved("mixtral", tmp_path, num_local_experts=4)
    config = decoder_config(json.loads((tmp_path / "config.json").read_text()))
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    with pytest.raises(ValueError, match=f"{name}: missing from the weights"):
        from_transformers(weights, config)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of llama"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn': only default"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1},
            "num_experts_per_tok=1: must be 2 or more",
        ),
    ],
)
def test_models_that_ours_cannot_be_are_one_clear_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config({"model_type": "llama", **SIZES, **settings})


def test_a_decoder_that_is_no_mixtral_is_one_clear_line() -> None:
    for config in (
        DecoderConfig(),
        DecoderConfig(mixture_of_experts=MixtureOfExpertsConfig(router="hyperspherical")),
        DecoderConfig(mixture_of_experts=MixtureOfExpertsConfig(schedule=2)),
        DecoderConfig(qk_norm=True, mixture_of_experts=MixtureOfExpertsConfig()),
    ):
        with pytest.raises(ValueError, match="a Mixtral model"):
            mixtral_settings(config)
