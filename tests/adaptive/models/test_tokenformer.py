"""The TokenFormer decoder: golden model, published names, compositions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from adaptive import RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.flops import planned_flops
from adaptive.growth import grow
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.weights.tokenformer import (
    from_tokenformer_state_dict,
    published_names,
    tokenformer_config,
    tokenformer_state_dict,
)
from parallel.mesh import Mesh

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenformer_lm.safetensors"


def golden():
    tensors = load_file(GOLDEN)
    weights = {k: v for k, v in tensors.items() if k.startswith("weights.")}
    return tensors, weights


def tiny(**changes):
    config = DecoderConfig(
        vocab_size=37,
        dim=32,
        num_layers=3,
        num_heads=4,
        rotary_fraction=0.25,
        norm="parameter_free",
        pattention=PattentionConfig(tokens=24, ffn_tokens=40),
    )
    return replace(config, **changes)


@pytest.mark.parametrize("save_memory", [False, True])
def test_agrees_with_the_golden_model(save_memory):
    tensors, weights = golden()
    model = from_tokenformer_state_dict(weights, num_heads=4)
    for layer in model.layers:
        layer.ffn.save_memory = save_memory
    logits = model(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tensors["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(loss, tensors["loss"].squeeze(), atol=1e-4, rtol=0)
    loss.backward()
    for ours, theirs in published_names(model).items():
        if f"grads.{theirs}" in tensors:
            grad = model.get_parameter(ours).grad
            torch.testing.assert_close(grad, tensors[f"grads.{theirs}"], atol=1e-4, rtol=0)
    assert sum(name.startswith("grads.") for name in tensors) == 2


def test_published_weights_survive_a_round_trip(tmp_path):
    tensors, weights = golden()
    model = from_tokenformer_state_dict(weights, num_heads=4)
    saved = tokenformer_state_dict(model)
    assert {f"weights.{name}" for name in saved} == set(weights)
    save_file(saved, tmp_path / "weights.safetensors")
    again = from_tokenformer_state_dict(load_file(tmp_path / "weights.safetensors"), num_heads=4)
    assert torch.equal(again(tensors["input_ids"]), model(tensors["input_ids"]))


def test_a_grown_model_keeps_its_scale_in_published_form():
    """Trap: public code takes √n of the present n, which rescales every old score."""
    tensors, weights = golden()
    model = from_tokenformer_state_dict(weights, num_heads=4)
    grow(model, tokens=96, ffn_tokens=256)
    saved = tokenformer_state_dict(model)
    assert float(saved["layers.0.ffn.scale"]) == math.sqrt(192)
    again = from_tokenformer_state_dict(saved, num_heads=4)
    torch.testing.assert_close(again(tensors["input_ids"]), tensors["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop("weights.norm_f.bias"), "norm_f.bias: missing"),
        (lambda w: w.update({"weights.lm_head.x": torch.ones(1)}), "lm_head.x: not a tensor"),
        (
            lambda w: w.update({"weights.layers.1.ffn.value_param_tokens": torch.ones(3, 64)}),
            r"layers.1.ffn.value_param_tokens of shape \[3, 64\]: must be \[192, 64\]",
        ),
        (lambda w: w.update({"weights.layers.5.ffn.x": torch.ones(1)}), r"layers \[0, 1, 5\]"),
    ],
)
def test_bad_weights_are_named(change, line):
    weights = golden()[1]
    change(weights)
    with pytest.raises(ValueError, match=line):
        from_tokenformer_state_dict(weights, num_heads=4)


def test_other_decoders_have_no_published_form():
    with pytest.raises(ValueError, match="must have pattention"):
        tokenformer_state_dict(Decoder(tiny(pattention=None)))
    with pytest.raises(ValueError, match="routes tokens"):
        tokenformer_state_dict(Decoder(tiny(mixture_of_depths=MixtureOfDepthsConfig())))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rotary_fraction": 1.0}, "rotary_fraction=1.0: must be 0.25"),
        ({"rope_base": 500.0}, "rope_base=500.0: must be 10000.0"),
        ({"qk_norm": True}, "qk_norm=True: must be False"),
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"num_kv_heads": 2}, "num_kv_heads=2, head_dim=None: must be 4 heads of width 8"),
        ({"head_dim": 16}, "must be 4 heads of width 8"),
        ({"mixture_of_experts": MixtureOfExpertsConfig(num_experts=2)}, "mixture_of_experts="),
        ({"pattention": PattentionConfig(24, 40, top_k=4)}, "top_k, ffn_top_k: must be null"),
    ],
)
def test_what_published_names_cannot_tell_is_not_written(changes, line):
    """Read back, a model with other rotary positions or a top-k computed another function."""
    with pytest.raises(ValueError, match=line):
        tokenformer_state_dict(Decoder(tiny(**changes)))


def test_a_part_of_a_model_is_not_written():
    """Half the parameter tokens and half the vocabulary were read back as a smaller model."""
    with pytest.raises(ValueError, match="this rank holds a part of the weights"):
        tokenformer_state_dict(Decoder(tiny(vocab_size=38), mesh=Mesh(tensor=2)))


@pytest.mark.parametrize(
    ("size", "millions"), [("150M", 150), ("450M", 450), ("900M", 900), ("1.5B", 1500)]
)
def test_named_sizes_have_the_paper_s_parameters(size, millions):
    with torch.device("meta"):
        model = Decoder(tokenformer_config(size))
    config = model.config
    in_layers = sum(p.numel() for p in model.layers.parameters())
    # 2 L D (n_q + n_k + n_v + n_o + n_ff), methods section 4.
    tokens, ffn_tokens = config.pattention.tokens, config.pattention.ffn_tokens
    assert in_layers == 2 * config.num_layers * config.dim * (4 * tokens + ffn_tokens)
    # The names count the embedding once and round by a few percent.
    assert abs(in_layers + model.embedding.weight.numel() - millions * 1e6) < 0.06 * millions * 1e6


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="size='2B': must be one of 150M, 450M"):
        tokenformer_config("2B")


@pytest.mark.parametrize(
    "wrapped",
    [
        {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5)},
        {"skip_layer": SkipLayerConfig(density=0.5)},
        {"recompute": True},
        {"pattention": PattentionConfig(tokens=24, ffn_tokens=40, top_k=8, ffn_top_k=10)},
    ],
)
def test_composes_and_every_parameter_gets_a_gradient(wrapped):
    torch.manual_seed(0)
    model = Decoder(tiny(**wrapped))
    ids = torch.randint(0, 37, (2, 16))
    with RoutingTape(model) as tape:
        loss = model.token_losses(ids, ids.roll(-1, 1)).mean()
    (loss + tape.loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "tokens" in name)


def test_recomputation_changes_nothing():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Decoder(tiny(recompute=recompute, pattention=PattentionConfig(24, 40, dropout=0.3)))
        ids = torch.randint(0, 37, (2, 16))
        model.token_losses(ids, ids.roll(-1, 1)).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_planned_flops_count_both_products_of_every_layer():
    config, tokens = tiny(), 2 * 16
    per_token = 2 * 2 * 32 * (4 * 24 + 40) + 4 * 32 * 16
    expected = tokens * (3 * per_token + 2 * 32 * 37)
    assert planned_flops(config, 2, 16) == expected
    sparse = tiny(pattention=PattentionConfig(24, 40, top_k=6, ffn_top_k=10))
    saved = tokens * 3 * 2 * 32 * (4 * 18 + 30)
    assert planned_flops(sparse, 2, 16) == expected - saved
