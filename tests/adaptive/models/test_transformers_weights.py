"""Models of transformers in and out of our decoder: every family, logits and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.weights.transformers import (
    decoder_config,
    from_transformers,
    loaded,
    to_transformers,
    transformers_settings,
)
from launch.checkpoint.published import read_published, write_published

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
SMALL = FOUR | {"moe_intermediate_size": 24}


def rope(kind: str, **options: Any) -> dict[str, Any]:
    scaling = {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0}
    return {"rope_parameters": scaling | options}


def of_llama(kind: str) -> dict[str, Any]:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    return rope(kind, original_max_position_embeddings=16, **bands)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {}, "llama"),
    ("Llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True} | of_llama("llama3"), "llama"),
    ("Llama", rope("linear"), "llama"),
    ("Llama", of_llama("yarn"), "llama"),
    ("Llama", rope("dynamic"), "llama"),
    ("Mistral", {"sliding_window": None}, "llama"),
    ("Mistral", {"sliding_window": 5}, "mistral"),
    ("Qwen2", {}, "qwen2"),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen2",
    ),
    ("Phi3", {"sliding_window": 5}, "mistral"),
    ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "qwen3"),
    ("Mixtral", {"num_local_experts": 4, "sliding_window": 5}, "mixtral"),
    (
        "Qwen2Moe",
        SMALL
        | {
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 3,
        },
        "qwen2_moe",
    ),
    (
        "Qwen2Moe",
        SMALL | {"shared_expert_intermediate_size": 24, "qkv_bias": False, "norm_topk_prob": True},
        "qwen2_moe",
    ),
    (
        "Qwen3Moe",
        SMALL | {"mlp_only_layers": [0], "norm_topk_prob": True, "head_dim": 16},
        "qwen3_moe",
    ),
    ("Olmoe", FOUR | {"tie_word_embeddings": True}, "olmoe"),
]


def random_model(family: str, settings: dict[str, Any]) -> Any:
    """A model of `transformers`, every tensor drawn."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def ids() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(61, (2, 15))


@pytest.mark.parametrize(("family", "settings", "out"), CASES)
def test_a_family_comes_in_and_goes_out_with_the_same_logits(
    family: str, settings: dict[str, Any], out: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = random_model(family, settings)
    expected = theirs(ids()).logits
    assert expected.abs().max() > 0.5
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    weights, config = read_published(tmp_path / "in")
    ours = loaded(weights, config)
    torch.testing.assert_close(ours(ids()), expected, atol=1e-4, rtol=0)
    # As transformers calls them in memory, experts stacked.
    in_memory = loaded(from_transformers(theirs.state_dict(), config), config)
    torch.testing.assert_close(in_memory(ids()), expected, atol=1e-4, rtol=0)

    write_published(ours.state_dict(), config, tmp_path / "out", tokenizer=None, shard_bytes=20_000)
    assert transformers_settings(config)["model_type"] == out
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(again.eval()(ids()).logits, expected, atol=1e-5, rtol=0)
    read = {f.name: load_file(f) for f in (tmp_path / "in").glob("*.safetensors")}
    wrote = {f.name: load_file(f) for f in (tmp_path / "out").glob("*.safetensors")}
    assert len(read) > 1
    assert len(wrote) > 1
    original = {name: t for file in read.values() for name, t in file.items()}
    written = {name: t for file in wrote.values() for name, t in file.items()}
    if family == "Phi3":  # it goes out as another family, whose products are apart
        assert sum(t.numel() for t in written.values()) == sum(t.numel() for t in original.values())
        return
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name


def test_scaled_frequencies_differ_from_plain_ones() -> None:
    """What the families above would not notice if scaling were forgotten on both sides."""
    plain = random_model("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500}})
    for kind in ("linear", "llama3", "yarn"):
        scaled = random_model("Llama", of_llama(kind) if kind != "linear" else rope(kind))
        assert (scaled(ids()).logits - plain(ids()).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "method",
    [
        MixtureOfDepthsConfig(capacity=0.5, schedule=[1]),
        MixtureOfDepthsConfig(capacity=0.5, schedule="all", weight="tanh_norm", predictor="mlp"),
        SkipLayerConfig(density=0.5, keys="executing"),
        SkipLayerConfig(density=0.5),
    ],
)
@pytest.mark.parametrize("experts", [None, MixtureOfExpertsConfig(num_experts=4)])
def test_layers_that_route_go_out_as_an_adapted_model_and_come_back(
    method: Any, experts: Any, tmp_path: Path
) -> None:
    from adaptive.hub import load_adapted

    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
    sizes |= {"sliding_window": 6}
    config = DecoderConfig(**sizes, init_std=0.3, **{method.name: method})
    config = config if experts is None else config.with_method(experts)
    torch.manual_seed(0)
    ours = Decoder(config).eval()
    expected = ours(ids())
    write_published(ours.state_dict(), config, tmp_path / "out", tokenizer=None)
    theirs = load_adapted(tmp_path / "out")
    torch.testing.assert_close(theirs.eval()(ids()).logits, expected, atol=1e-4, rtol=0)
    weights, again = read_published(tmp_path / "out")
    assert getattr(again, method.name) == method
    for name, tensor in ours.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    torch.testing.assert_close(loaded(weights, again)(ids()), expected, atol=1e-5, rtol=0)
    # And what transformers itself saves of it.
    theirs.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        loaded(*read_published(tmp_path / "again"))(ids()), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': must be one of llama"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope': must be one of def"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor: missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5: must"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"hidden_size": "wide"}, "hidden_size='wide': must be a whole number"),
        ({"rms_norm_eps": "small"}, "of another kind"),
        ({"vocab_size": 2**70}, "vocab_size=.*: must be a whole number between 1"),
        ({"model_type": "mixtral", **FOUR, "num_experts": 10**9}, "must be .* and 65536"),
        ({"model_type": "qwen3_moe", **SMALL, "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "olmoe", "clip_qkv": 8.0, **FOUR}, "clip_qkv=8.0: must be None"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1},
            "num_experts_per_tok=1: must be 2 or more",
        ),
        (
            {"model_type": "qwen2_moe", **SMALL, "shared_expert_intermediate_size": 36},
            "shared_expert_intermediate_size=36: must be a multiple",
        ),
        ({"model_type": "adaptive"}, "adaptive: must have base and adaptations"),
        (
            {
                "model_type": "adaptive",
                "adaptive": {"base": "llama", "adaptations": [{"method": "os"}]},
            },
            "method='os': must be one of",
        ),
    ],
)
def test_models_that_ours_cannot_be_are_one_clear_line(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config({"model_type": "llama", **SIZES, **change})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DecoderConfig(norm="parameter_free"), "no model of transformers"),
        (
            DecoderConfig(mixture_of_experts=MixtureOfExpertsConfig(router="hyperspherical")),
            "no model of transformers",
        ),
        (
            DecoderConfig(mixture_of_experts=MixtureOfExpertsConfig(schedule=2)),
            "no model of transformers",
        ),
    ],
)
def test_decoders_that_no_model_is_are_one_clear_line(config: DecoderConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformers_settings(config)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.norm.weight", "model.layers.1.block_sparse_moe.experts.2.w3.weight"],
)
def test_a_tensor_that_is_missing_is_named(name: str) -> None:
    config = decoder_config({"model_type": "mixtral", **FOUR, **SIZES})
    weights = to_transformers(Decoder(config).state_dict(), config)
    del weights[name]
    with pytest.raises(ValueError, match=f"{name}: missing from the weights"):
        from_transformers(weights, config)


def test_every_tensor_is_used_exactly_once() -> None:
    config = decoder_config({"model_type": "mixtral", **FOUR, **SIZES})
    weights = to_transformers(Decoder(config).state_dict(), config)
    first = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    pairs = [*weights.items(), (first, weights[first])]
    with pytest.raises(ValueError, match=f"{first}: comes twice"):
        from_transformers(pairs, config)
    stacked = Decoder(config).state_dict()["layers.0.ffn.experts.down_proj"]
    both = {**weights, "model.layers.0.mlp.experts.down_proj": stacked}
    with pytest.raises(ValueError, match="down_proj: comes twice"):
        from_transformers(both, config)
    with pytest.raises(ValueError, match=r"model.layers.0.other: a decoder has no place for it"):
        from_transformers({"model.layers.0.other": stacked, **weights}, config)
    with pytest.raises(ValueError, match=r"model.norm.weight of shape \[31\]: must be \[32\]"):
        from_transformers({"model.norm.weight": torch.ones(31)}, config)


def test_an_index_names_files_beside_it_alone(tmp_path: Path) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    for file, message in (("../x.safetensors", "must be a file beside it"), ("x", "no such file")):
        told["weight_map"]["lm_head.weight"] = file
        index.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=message):
            read_published(tmp_path)
