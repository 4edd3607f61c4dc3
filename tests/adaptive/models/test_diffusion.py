"""The diffusion transformer against the official network's recorded outputs, and its traps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import RoutingTape, TokenLayout
from adaptive.flops import executed_flops, planned_flops
from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.layers import AxialRotary, patchify, rotate_pairs, unpatchify
from adaptive.models.weights.sprint import from_sprint_state_dict, sprint_state_dict
from parallel.flop_formulas import torch_flop_counter

GOLDEN = Path(__file__).parents[2] / "golden" / "sprint_sit.safetensors"
TINY = {"image_size": 8, "channels": 3, "patch_size": 2, "num_classes": 5, "dim": 32}
TINY |= {"num_heads": 2, "encoder_depth": 1, "middle_depth": 2, "decoder_depth": 1}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def official(golden: dict[str, Tensor]) -> DiffusionTransformer:
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if "weights." in k}
    model = from_sprint_state_dict(weights, num_heads=4, image_size=8, patch_size=1)
    return model.eval()


def tiny(**options: Any) -> DiffusionTransformer:
    """A small model whose zero-initialised layers are not zero, so that everything matters."""
    torch.manual_seed(0)
    model = DiffusionTransformer(DiffusionConfig(**{**TINY, **options}))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 4, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size, channels = sizes.get("size", 8), sizes.get("channels", 3)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


def test_all_tokens_reproduce_the_official_output(golden: Any, official: Any) -> None:
    out = official(golden["x"], golden["t"], golden["y"])
    torch.testing.assert_close(out, golden["dense"], atol=1e-4, rtol=0)


def test_kept_tokens_reproduce_the_official_output(golden: Any, official: Any) -> None:
    out = official(golden["x"], golden["t"], golden["y"], keep_ids=golden["ids_keep"])
    torch.testing.assert_close(out, golden["sparse"], atol=1e-4, rtol=0)


def test_path_drop_guidance_reproduces_the_official_halves(golden: Any, official: Any) -> None:
    x, t, y = (golden[f"pdg_{name}"] for name in "xty")
    drop = torch.tensor([False, False, True, True])
    torch.testing.assert_close(official(x, t, y, drop_path=drop), golden["pdg"], atol=1e-4, rtol=0)
    conditional, unconditional = golden["pdg"].chunk(2)
    for scale in (0.0, 1.0, 2.5):
        out = official.guided(x[:2], t[:2], y[:2], scale=scale, guidance="path_drop")
        want = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(out, want, atol=1e-4, rtol=0)


def test_weights_leave_in_the_official_naming(golden: Any, official: Any) -> None:
    weights = sprint_state_dict(official)
    names = {k.removeprefix("weights.") for k in golden if k.startswith("weights.")}
    assert weights.keys() == names
    for name, value in weights.items():
        assert torch.equal(value, golden[f"weights.{name}"]), name


@pytest.mark.parametrize("options", [{"ffn": "swiglu", "ffn_dim": 40}, {"qk_norm": False}])
def test_every_variant_survives_a_round_trip(options: dict) -> None:
    model = tiny(**options).eval()
    loaded = from_sprint_state_dict(
        sprint_state_dict(model), num_heads=2, image_size=8, patch_size=2
    ).eval()
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    if "ffn" in options:
        assert "middle_blocks.1.mlp.fc1_g.weight" in sprint_state_dict(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("renoise_linear.bias"), "renoise_linear.bias: is missing from"),
        (lambda w: w.update({"pos_embed": torch.zeros(1)}), "pos_embed: is unknown in"),
        (
            lambda w: w.update({"mask_token": torch.zeros(1, 1, 31)}),
            r"mask_token of shape \[1, 1, 31\]: gives \[31\], the model has \[32\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    weights = sprint_state_dict(tiny())
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_sprint_state_dict(weights, num_heads=2, image_size=8, patch_size=2)


def test_kept_tokens_of_another_image_are_refused() -> None:
    with pytest.raises(ValueError, match="keep_ids: holds 20, must be different numbers between 0"):
        tiny()(*inputs(2), keep_ids=torch.tensor([[0, 20], [3, 5]]))


@pytest.mark.parametrize("guidance", ["path_drop", "classifier_free"])
def test_guidance_is_the_same_in_training_mode(guidance: Any) -> None:
    """There the halves of classifier-free guidance drew different tokens and dropped paths."""
    model = tiny(path_drop=0.5).eval()
    want = model.guided(*inputs(), scale=2.0, guidance=guidance)
    model.train()
    torch.testing.assert_close(model.guided(*inputs(), scale=2.0, guidance=guidance), want)


def test_classifier_free_guidance_runs_the_middle_for_both_halves() -> None:
    model = tiny().eval()
    x, t, y = inputs()
    conditional, unconditional = model(x, t, y), model(x, t, torch.full_like(y, 5))
    out = model.guided(x, t, y, scale=3.0, guidance="classifier_free")
    torch.testing.assert_close(out, unconditional + 3 * (conditional - unconditional))
    assert not torch.allclose(out, model.guided(x, t, y, scale=3.0), atol=1e-3)


@pytest.mark.parametrize("options", [{"paths": "sparse"}, {"paths": "dense", "middle_depth": 0}])
def test_controls_are_guided_by_what_they_have(options: dict) -> None:
    model = tiny(**options).eval()
    x, t, y = inputs()
    null, drop = torch.full_like(y, 5), torch.ones(4, dtype=torch.bool)
    conditional, unconditional = model(x, t, y), model(x, t, null, drop_path=drop)
    out = model.guided(x, t, y, scale=3.0)
    torch.testing.assert_close(out, unconditional + 3 * (conditional - unconditional))


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    """adaLN-Zero: gates and the head start at zero."""
    torch.manual_seed(0)
    model = DiffusionTransformer(DiffusionConfig(**TINY)).eval()
    assert not model(*inputs()).any()
    block = model.trunk.encoder[0]
    hidden = torch.randn(2 * 16, 32)
    out = block(
        hidden,
        layout=TokenLayout.dense(2, 16),
        condition=torch.randn(2, 32),
        rotary=model.rotary,
    )
    assert torch.equal(out, hidden)


def test_patches_are_ordered_channel_row_column() -> None:
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = patchify(x, 2)
    # The second patch of the first row of patches: columns 2 and 3 of rows 0 and 1.
    assert patches[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]
    assert torch.equal(unpatchify(patches, (2, 3), 2), x)


def test_rotary_turns_interleaved_pairs_by_row_then_column() -> None:
    rotary = AxialRotary(8, (3, 5))
    x = torch.randn(15, 2, 8, dtype=torch.float64)
    turned = rotate_pairs(x, rotary(torch.arange(15)))
    for token in range(15):
        row, column = divmod(token, 5)
        for pair in range(4):
            place, i = (row, pair) if pair < 2 else (column, pair - 2)
            angle = torch.tensor(place * 10000.0 ** (-2 * i / 4), dtype=torch.float64)
            a, b = x[token, :, 2 * pair], x[token, :, 2 * pair + 1]
            want = torch.stack(
                [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
            )
            # The tables are float32.
            got = turned[token, :, 2 * pair : 2 * pair + 2]
            torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_kept_tokens_keep_their_places() -> None:
    """Rotary tables are gathered at kept positions, not at places in the pack."""
    model = tiny(encoder_depth=0, decoder_depth=0).eval()
    t, y = torch.tensor([0.5]), torch.tensor([0])
    x = inputs(1)[0]
    out = model(x, t, y, keep_ids=torch.tensor([[0, 5, 10, 15]]))[0]
    hidden, layout, condition = model._embed(x, t, y)
    kept = torch.tensor([0, 5, 10, 15])
    part = hidden[kept]
    for block in model.trunk.middle:
        part = block(part, layout=_layout_at(kept), condition=condition, rotary=model.rotary)
    restored = model.trunk.fusion.mask_token.expand(16, -1).clone()
    restored[kept] = part
    fusion = model.trunk.fusion
    fused = torch.cat([restored, hidden], -1) @ fusion.weight.T + fusion.bias
    want = model._velocity(fused, layout, condition)[0]
    torch.testing.assert_close(out, want)


def _layout_at(positions: Tensor) -> Any:
    cu_seqlens = torch.tensor([0, len(positions)], dtype=torch.int32)
    return TokenLayout(cu_seqlens, len(positions), positions)


def test_time_is_not_scaled_and_cosines_come_first() -> None:
    model = tiny()
    with torch.no_grad():
        embedding = model.time_embedding
        seen: list[Tensor] = []
        embedding.up.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        embedding(torch.tensor([0.75]))
    want = [
        f(torch.tensor(0.75 * 10000 ** (-i / 128)))
        for f in (torch.cos, torch.sin)
        for i in range(128)
    ]
    torch.testing.assert_close(seen[0][0], torch.stack(want))


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_sizes_have_the_published_parameters(size: str) -> None:
    """Transformer blocks have 18 D² weights each (adaLN 6, attention 4, feed-forward 8)."""
    published = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
    depth, dim = published[size]
    with torch.device("meta"):
        model = DiffusionTransformer(DiffusionConfig.of_size(size))
    blocks = [*model.trunk.encoder, *model.trunk.middle, *model.trunk.decoder]
    assert len(blocks) == depth
    assert len(model.trunk.encoder) == len(model.trunk.decoder) == 2
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    assert matrices == depth * 18 * dim**2


def counted(model: DiffusionTransformer, call: Any) -> int:
    """Operations that torch counts in a call; plain attention, whose products it sees."""
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 0.5},
        {"keep": 1.0},
        {"paths": "sparse"},
        {"paths": "dense", "middle_depth": 0},
        {"ffn": "swiglu", "ffn_dim": 48},
    ],
)
def test_planned_and_executed_operations_are_those_that_torch_counts(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(path_drop=0.0, **options)
    tape = RoutingTape(model)

    def forward() -> None:
        with tape:
            model(*inputs())

    torch_says = counted(model, forward)
    assert planned_flops(model, 4, 16) == planned_flops(model.config, 4, 16) == torch_says
    assert int(executed_flops(model, tape.records, 4, 16)) == torch_says
    # Attention that keeps its scores: flash attention and our kernel compute them again.
    monkeypatch.setenv("ADAPTIVE_BACKEND", "reference")
    with sdpa_kernel(SDPBackend.MATH):
        out = model(*inputs()).sum()
    backward = counted(model, out.backward)
    both = planned_flops(model, 4, 16, backward=True)
    assert both - torch_says == backward


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_samples_whose_path_is_dropped_cost_no_middle(keep: float) -> None:
    """Two of four dropped are what is planned at a rate of one half."""
    model = tiny(keep=keep, path_drop=0.5)
    tape = RoutingTape(model)

    def forward() -> None:
        with tape:
            model(*inputs(), drop_path=torch.tensor([True, False, False, True]))

    torch_says = counted(model, forward)
    assert int(executed_flops(model, tape.records, 4, 16)) == torch_says
    assert planned_flops(model, 4, 16) == torch_says


@pytest.mark.parametrize("options", [{}, {"paths": "sparse"}])
@pytest.mark.parametrize("guidance", ["path_drop", "classifier_free"])
def test_guided_operations_are_those_that_torch_counts(guidance: str, options: dict) -> None:
    model = tiny(**options).eval()

    def call() -> None:
        model.guided(*inputs(), scale=2.0, guidance=guidance)

    assert model.guided_flops(4, guidance=guidance) == counted(model, call)


def test_stage_one_and_guidance_cost_what_the_paper_says_at_xl() -> None:
    """(e + d + m/4) / (e + m + d) = 0.357 and (2e + m + 2d) / (2e + 2m + 2d) = 0.571.

    The whole network, everything counted: attention shrinks with the square of the kept tokens,
    while the fusion and the modulations are extra, so the figures hold within 1%.
    """
    with torch.device("meta"):
        model = DiffusionTransformer(DiffusionConfig.of_size("XL"))
        x, t = torch.randn(2, 4, 32, 32), torch.rand(2)
        y = torch.zeros(2, dtype=torch.long)
    sparse = counted(model, lambda: model(x, t, y))
    dense = counted(model.eval(), lambda: model(x, t, y))
    assert sparse / dense == pytest.approx(0.357, rel=0.01)
    halves = [
        counted(model, lambda g=guidance: model.guided(x, t, y, scale=2.0, guidance=g))
        for guidance in ("path_drop", "classifier_free")
    ]
    assert halves[0] / halves[1] == pytest.approx(0.571, rel=0.01)


def test_recomputation_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = tiny(recompute=recompute)
        torch.manual_seed(3)
        model(*inputs()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_training_compiles_to_one_graph() -> None:
    """Nothing reads a number back to the host: fixed keeping has static shapes."""
    model = tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    keep = torch.tensor([[0, 3, 8, 10]] * 4)
    drop = torch.tensor([True, False, False, True])
    given = {"keep_ids": keep, "drop_path": drop}
    torch.testing.assert_close(compiled(*inputs(), **given), model(*inputs(), **given))
    # And with its own draws.
    assert compiled(*inputs()).isfinite().all()


def test_every_parameter_takes_part_in_every_mode() -> None:
    for options in ({}, {"paths": "sparse"}, {"mask_token": "learnt"}, {"path_drop": 1.0}):
        model = tiny(**options)
        model(*inputs()).sum().backward()
        assert all(p.grad is not None for p in model.parameters()), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, "grid 5x5: must be divisible by the cell 2x2"),
        ({"patch_size": 3}, "patch_size=3: must divide image_size=8"),
        ({"keep": 0.33}, "keep=0.33: structured keeping needs one of"),
        ({"num_heads": 3}, "num_heads=3: must divide dim=32"),
        ({"ffn": "relu"}, "ffn='relu': must be gelu or swiglu"),
        ({"num_classes": 0}, "num_classes=0: must be at least 1"),
        ({"path_drop": -0.1}, r"path_drop=-0.1: must be in \[0, 1\]"),
        ({"paths": "dense"}, "middle_depth=2: must be 0 with paths=dense"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**{**TINY, **options})


def test_images_of_another_shape_are_refused() -> None:
    x, t, y = inputs()
    with pytest.raises(ValueError, match=r"x of shape \[4, 3, 8, 6\]: must be"):
        tiny()(x[..., :6], t, y)


def test_an_unknown_size_or_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="size='H': must be one of S, B, L, XL"):
        DiffusionConfig.of_size("H")
    with pytest.raises(ValueError, match="guidance='none': must be one of path_drop"):
        tiny().guided(*inputs(), scale=1.0, guidance="none")
