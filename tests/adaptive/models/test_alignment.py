"""Representation alignment: the cosine of the same token's features, of computed tokens only."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import BatchScope, RoutingTape
from adaptive.flops import executed_flops, planned_flops
from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.alignment import AlignmentConfig
from adaptive.models.weights.sprint import sprint_state_dict
from parallel.flop_formulas import torch_flop_counter


def model_with(layer: int, **options: Any) -> DiffusionTransformer:
    torch.manual_seed(0)
    config = DiffusionConfig(
        image_size=4,
        channels=1,
        patch_size=1,
        num_classes=3,
        dim=16,
        num_heads=2,
        encoder_depth=1,
        middle_depth=2,
        decoder_depth=1,
        alignment=AlignmentConfig(feature_dim=6, layer=layer, hidden_dim=8, coefficient=0.25),
        **options,
    )
    model = DiffusionTransformer(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


X, T, Y = torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
FEATURES = torch.randn(2, 16, 6)
KEEP = torch.tensor([[0, 3, 8, 11], [5, 6, 13, 14]])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_loss_is_minus_the_mean_cosine_of_the_aligned_layers_tokens(layer: int) -> None:
    model = model_with(layer).eval()
    block = [*model.trunk.encoder, *model.trunk.middle][layer - 1]
    seen: list[torch.Tensor] = []
    block.register_forward_hook(lambda _, __, out: seen.append(out))
    with RoutingTape(model) as tape:
        model(X, T, Y, keep_ids=KEEP, features=FEATURES)
    projected = model.trunk.projector(seen[0])
    wanted = FEATURES.flatten(0, 1)
    if layer > 1:
        wanted = torch.cat([FEATURES[row, KEEP[row]] for row in range(2)])
    dots = (projected * wanted).sum(-1) / (projected.norm(dim=-1) * wanted.norm(dim=-1))
    torch.testing.assert_close(tape.loss(), -0.25 * dots.mean())


def test_the_velocity_is_untouched() -> None:
    model = model_with(2).eval()
    with RoutingTape(model):
        with_features = model(X, T, Y, keep_ids=KEEP, features=FEATURES)
    assert torch.equal(with_features, model(X, T, Y, keep_ids=KEEP))


def test_shares_of_micro_batches_add_up_to_the_loss_of_the_whole() -> None:
    model = model_with(3).eval()
    with RoutingTape(model) as whole:
        model(X, T, Y, keep_ids=KEEP, features=FEATURES)
    parts = 0.0
    for row in (slice(0, 1), slice(1, 2)):
        with RoutingTape(model, scope=BatchScope(tokens=32)) as tape:
            model(X[row], T[row], Y[row], keep_ids=KEEP[row], features=FEATURES[row])
        parts = parts + tape.loss()
    torch.testing.assert_close(parts, whole.loss())


def test_a_middle_whose_path_is_dropped_is_aligned_all_the_same() -> None:
    losses = []
    for drop in ([False, False], [True, False]):
        model = model_with(2)
        with RoutingTape(model) as tape:
            model(X, T, Y, keep_ids=KEEP, drop_path=torch.tensor(drop), features=FEATURES)
        losses.append(tape.loss())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_projector_is_counted_where_it_computes(layer: int) -> None:
    model = model_with(layer)
    model.trunk.path_drop = 0.0
    tape = RoutingTape(model)
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as counter, tape:
        model(X, T, Y, features=FEATURES)
    assert planned_flops(model, 2, 16) == counter.get_total_flops()
    assert int(executed_flops(model, tape.records, 2, 16)) == counter.get_total_flops()


def test_official_weights_leave_without_the_projector() -> None:
    assert not any("projector" in name for name in sprint_state_dict(model_with(2)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alignment.layer=4: must be at most 3"):
        model_with(4)
    with pytest.raises(ValueError, match="feature_dim=0: must be at least 1"):
        AlignmentConfig(feature_dim=0)
    model = model_with(2)
    with RoutingTape(model), pytest.raises(ValueError, match=r"features of shape \[2, 16, 5\]"):
        model(X, T, Y, features=FEATURES[..., :5])
    # A class token in front (17 rows) shifted every feature by one place, and was taken.
    for tokens in (15, 17):
        line = rf"features of shape \[2, {tokens}, 6\]: must be \[2, 16, 6\], one row a token"
        with pytest.raises(ValueError, match=line):
            model(X, T, Y, features=torch.randn(2, tokens, 6))
    plain = DiffusionTransformer(
        DiffusionConfig(image_size=4, channels=1, patch_size=1, dim=16, num_heads=2)
    )
    with pytest.raises(ValueError, match="features: need an alignment"):
        plain(X, T, Y, features=FEATURES)
