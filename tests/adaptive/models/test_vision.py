"""VisionTransformer against transformers' ViT, timm's names both ways, and its operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive.flops import planned_flops
from adaptive.models.vision.model import VisionConfig, VisionTransformer
from adaptive.models.weights.timm import from_timm, to_timm

SMALL = VisionConfig(
    image_size=8, channels=3, patch_size=2, num_classes=5, dim=32, num_layers=2, num_heads=4
)


def their_names(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """transformers' ViTForImageClassification by timm's names, written out by hand."""
    made = {
        "cls_token": theirs["vit.embeddings.cls_token"],
        "pos_embed": theirs["vit.embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["vit.layernorm.weight"],
        "norm.bias": theirs["vit.layernorm.bias"],
        "head.weight": theirs["classifier.weight"],
        "head.bias": theirs["classifier.bias"],
    }
    for i in range(layers):
        of, to = f"vit.encoder.layer.{i}.", f"blocks.{i}."
        if of + "layernorm_before.weight" not in theirs:
            of = f"vit.layers.{i}."
        for kind in ("weight", "bias"):
            made[to + "norm1." + kind] = theirs[of + "layernorm_before." + kind]
            made[to + "norm2." + kind] = theirs[of + "layernorm_after." + kind]
            by_name = {name: theirs[name] for name in theirs if name.startswith(of)}

            def find(*words: str, kind: str = kind, by_name: dict[str, Tensor] = by_name) -> Tensor:
                found = [n for n in by_name if n.endswith(kind) and any(w in n for w in words)]
                assert len(found) == 1, (words, found, list(by_name))
                return by_name[found[0]]

            qkv = [find(f".{w}.", f".{w[0]}_proj.") for w in ("query", "key", "value")]
            made[to + "attn.qkv." + kind] = torch.cat(qkv)
            made[to + "attn.proj." + kind] = find("attention.output.dense", ".o_proj.")
            made[to + "mlp.fc1." + kind] = find("intermediate.dense", ".fc1.")
            made[to + "mlp.fc2." + kind] = find(f"layer.{i}.output.dense", ".fc2.")
    return made


def test_logits_are_those_of_transformers_and_names_go_both_ways() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
            num_labels=5,
            layer_norm_eps=1e-6,
        )
    ).eval()
    for parameter in theirs.parameters():  # biases and the class token begin at 0
        torch.nn.init.normal_(parameter, std=0.2)
    weights = their_names(dict(theirs.state_dict()), 2)
    ours = from_timm(weights, num_heads=4)
    assert ours.config == VisionConfig(**{**vars(SMALL), "ffn_dim": 128})
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)
    back = to_timm(ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in back)


def test_names_of_a_mean_over_tokens() -> None:
    config = VisionConfig(**{**vars(SMALL), "pooling": "mean"})
    model = VisionTransformer(config)
    weights = to_timm(model)
    assert "cls_token" not in weights
    assert weights["fc_norm.weight"].shape == (32,)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(from_timm(weights, num_heads=4)(images), model(images))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda w: w.pop("blocks.1.norm1.bias"), "blocks.1.norm1.bias: is missing from"),
        (lambda w: w.update(more=torch.zeros(1)), "more: is unknown in"),
        (lambda w: w.pop("pos_embed"), "pos_embed: is missing from"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(change, line: str) -> None:
    weights = to_timm(VisionTransformer(SMALL))
    change(weights)
    with pytest.raises(ValueError, match=line):
        from_timm(weights, num_heads=4)


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_planned_operations_are_those_that_torch_counts(pooling: str, positions: str) -> None:
    config = VisionConfig(**{**vars(SMALL), "pooling": pooling, "positions": positions})
    model = VisionTransformer(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(torch.randn(2, 3, 8, 8)).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert planned_flops(model, 2, config.tokens) == forward
    # Attention in plain torch repeats nothing.
    assert planned_flops(model, 2, config.tokens, backward=True) == counter.get_total_flops()


def test_a_batch_is_each_alone_and_rotary_knows_the_place() -> None:
    torch.manual_seed(1)
    config = VisionConfig(**{**vars(SMALL), "positions": "rotary"})
    model = VisionTransformer(config).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=0, atol=1e-14)
    assert (model(images) - model(images.flip(3))).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"patch_size": 3}, "patch_size=3: must divide image_size=8"),
        ({"num_heads": 5}, "num_heads=5: must divide dim=32"),
        ({"pooling": "max"}, "pooling='max': must be class_token or mean"),
        ({"num_heads": 16, "positions": "rotary"}, "a multiple of 4 with positions=rotary"),
    ],
)
def test_bad_configurations_are_one_line(values: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        VisionConfig(**{**vars(SMALL), **values})
