"""Merging around attention at sampling: nothing changes at 0, guided halves alike, counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive import RoutingTape
from adaptive.flops import planned_flops
from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.merging import merged_attention
from adaptive.models.diffusion.samplers import SamplingConfig, operations_per_image, sample

CONFIG = DiffusionConfig(
    image_size=8,
    channels=1,
    patch_size=2,
    num_classes=3,
    dim=32,
    num_heads=4,
    encoder_depth=1,
    middle_depth=1,
    decoder_depth=1,
)


@pytest.fixture
def model() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(CONFIG).eval()
    for parameter in model.parameters():  # gates begin at 0
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.rand(batch), torch.arange(batch) % 3


def test_an_amount_of_0_changes_nothing_and_any_other_is_undone(model) -> None:
    plain = model(*inputs())
    with merged_attention(model, 0.0):
        assert torch.equal(model(*inputs()), plain)
    with merged_attention(model, 0.5):
        assert (model(*inputs()) - plain).abs().max() > 1e-4
    assert torch.equal(model(*inputs()), plain)
    names = dict(model.named_parameters()).keys()
    with merged_attention(model, 0.5):
        assert len(list(model.parameters())) == len(names)


def test_operations_are_those_that_torch_counts(model) -> None:
    for amount in (0.25, 0.5, 0.75, 3):
        with (
            merged_attention(model, amount),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            RoutingTape(model) as tape,
            torch.no_grad(),
        ):
            model(*inputs())
        with merged_attention(model, amount):
            counted = counter.get_total_flops()
            # The time embedding has one row a sample: planned work knows.
            assert planned_flops(model, 2, CONFIG.tokens) == counted
    sampling = SamplingConfig(steps=2, sampler="euler", merge=0.5)
    plain = SamplingConfig(steps=2, sampler="euler")
    assert operations_per_image(model, sampling) < operations_per_image(model, plain)
    assert len(tape.records) == 4


def test_both_halves_of_a_guided_batch_merge_alike(model) -> None:
    x, t, y = inputs()
    with merged_attention(model, 0.5), RoutingTape(model) as tape:
        # Guided by itself: both halves are the same sample, and must stay so.
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]))
    torch.testing.assert_close(both[:2], both[2:], rtol=0, atol=0)
    for record in tape.records:
        if record.kind == "tomesd":
            first, second = record.chosen.chunk(2)
            assert torch.equal(first, second)


def test_sampling_merges_and_stays_reproducible(model) -> None:
    labels = torch.tensor([0, 1])
    config = SamplingConfig(steps=2, sampler="euler", merge=0.5)
    first, second = (sample(model, labels, config, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    plain = sample(model, labels, SamplingConfig(steps=2, sampler="euler"), seed=3)
    assert (first - plain).abs().max() > 1e-5


def test_what_cannot_merge_is_one_line(model) -> None:
    with pytest.raises(ValueError, match=r"merge=1.0: must be in \[0, 1\)"):
        SamplingConfig(merge=1.0)
    odd = DiffusionTransformer(DiffusionConfig(**{**vars(CONFIG), "image_size": 6, "keep": 1.0}))
    line = r"merge=0.5: the grid \[3, 3\] must be of even sides"
    with pytest.raises(ValueError, match=line), merged_attention(odd, 0.5):
        pass
