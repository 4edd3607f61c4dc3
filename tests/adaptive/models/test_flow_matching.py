"""Flow matching as specified, and samplers against distributions whose velocity is known."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.diffusion.flow_matching import (
    draw,
    draw_times,
    flow_matching_loss,
    noised,
)
from adaptive.models.diffusion.samplers import (
    SamplingConfig,
    euler,
    heun,
    image_noise,
    operations_per_image,
    sample,
    sde,
)
from parallel.flop_formulas import torch_flop_counter

CONFIG = DiffusionConfig(
    image_size=4,
    channels=1,
    patch_size=1,
    num_classes=3,
    dim=16,
    num_heads=2,
    encoder_depth=1,
    middle_depth=1,
    decoder_depth=1,
)


def model() -> DiffusionTransformer:
    torch.manual_seed(0)
    net = DiffusionTransformer(CONFIG)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_times_are_logistic_normal() -> None:
    t = draw_times(20000, generator=torch.Generator().manual_seed(0))
    log_sigma = torch.log(t / (1 - t))
    # Standard errors are 0.007 and 0.005.
    assert abs(log_sigma.mean()) < 0.035
    assert abs(log_sigma.std() - 1) < 0.025


def test_noise_and_data_mix_linearly_and_the_target_is_their_difference() -> None:
    x0, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    t = torch.tensor([0.0, 0.25])
    x_t = noised(x0, noise, t)
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])

    class Perfect(DiffusionTransformer):
        def forward(self, x, t, y, **_):  # type: ignore[no-untyped-def]
            return (x - x0) / t.view(-1, 1, 1, 1)  # = ε - x0 of x_t

    perfect = Perfect(CONFIG)
    draws = draw(torch.tensor([0, 1]), CONFIG)
    torch.testing.assert_close(
        flow_matching_loss(perfect, x0, draws), torch.zeros(2), atol=1e-8, rtol=0
    )


def test_the_loss_is_the_mean_square_over_pixels_on_the_drawn_tokens() -> None:
    net, x0 = model(), torch.randn(3, 1, 4, 4)
    draws = draw(torch.tensor([0, 1, 2]), CONFIG)
    out = net(
        noised(x0, draws.noise, draws.t),
        draws.t,
        draws.y,
        keep_ids=draws.keep_ids,
        drop_path=draws.drop_path,
    )
    want = [(out[i] - draws.noise[i] + x0[i]).pow(2).mean() for i in range(3)]
    torch.testing.assert_close(flow_matching_loss(net, x0, draws), torch.stack(want))


def test_drawn_tokens_rule_also_where_the_model_would_draw_its_own() -> None:
    net, x0 = model().train(), torch.randn(2, 1, 4, 4)
    draws = draw(torch.tensor([0, 1]), dataclasses.replace(CONFIG, keep=1.0))
    losses = flow_matching_loss(net, x0, draws)
    torch.testing.assert_close(flow_matching_loss(net.eval(), x0, draws), losses)


def test_class_dropout_and_path_drop_are_independent() -> None:
    draws = draw(
        torch.ones(20000, dtype=torch.long), CONFIG, generator=torch.Generator().manual_seed(0)
    )
    null, dropped = draws.y == 3, draws.drop_path
    assert ((draws.y == 1) | null).all()
    for share, wanted in (
        (null.float().mean(), 0.1),
        (dropped.float().mean(), 0.1),
        ((null & dropped).float().mean(), 0.01),
    ):
        # Five standard errors.
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 20000)


def test_both_stages_draw_the_same_noise() -> None:
    dense = dataclasses.replace(CONFIG, keep=1.0)
    draws = [
        draw(torch.tensor([0, 1]), config, generator=torch.Generator().manual_seed(1))
        for config in (CONFIG, dense)
    ]
    assert torch.equal(draws[0].noise, draws[1].noise)
    assert torch.equal(draws[0].t, draws[1].t)
    assert torch.equal(draws[0].drop_path, draws[1].drop_path)
    assert (draws[0].keep_ids.shape[1], draws[1].keep_ids.shape[1]) == (4, 16)


MEAN, STD = 1.5, 0.4


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[ε - x0 | x_t] when x0 ~ N(MEAN, STD²)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x - (1 - t) * MEAN
    return centred * (t - (1 - t) * STD**2) / variance - MEAN


def exact(x1: Tensor) -> Tensor:
    """The ODE maps quantiles to quantiles."""
    return MEAN + STD * x1


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_ode_samplers_converge_at_their_order(solver: object, order: int) -> None:
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = [(solver(gaussian_velocity, x1, n) - exact(x1)).abs().max() for n in (32, 64)]
    assert errors[1] < 0.05
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_sde_samples_the_data_distribution() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(20000, generator=generator, dtype=torch.float64)

    x0 = sde(gaussian_velocity, noise(), 200, noise)
    # Statistical error 0.003; the discretisation adds about as much.
    assert x0.mean() == pytest.approx(MEAN, abs=0.02)
    assert x0.std() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("sampler", ["heun", "euler", "sde"])
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    net, labels = model(), torch.tensor([0, 1, 2, 3])
    config = SamplingConfig(sampler=sampler, steps=3)
    together = sample(net, labels, config, seed=7)
    alone = sample(net, labels[2:3], config, seed=7, first=2)
    torch.testing.assert_close(together[2:3], alone)
    assert not torch.allclose(together, sample(net, labels, config, seed=8))
    assert torch.equal(together, sample(net, labels, config, seed=7))


def test_guidance_applies_inside_its_interval_only() -> None:
    net, labels = model().eval(), torch.tensor([0, 1])
    config = SamplingConfig(sampler="euler", steps=4, guidance_low=0.4, guidance_high=0.8, scale=3)
    # By hand: t = 1 and 0.25 without, 0.75 and 0.5 with guidance.
    x = image_noise(net, range(2), 0)()
    with torch.no_grad():
        for t in (1.0, 0.75, 0.5, 0.25):
            t_B = torch.full((2,), t)
            guided = net.guided(x, t_B, labels, scale=3.0)
            x = x - (guided if t in (0.75, 0.5) else net(x, t_B, labels)) / 4
    torch.testing.assert_close(sample(net, labels, config, seed=0), x)


def test_guidance_reaches_the_ends_of_its_interval() -> None:
    """At 0.2 of ten steps too, which 1 - 8/10 misses by a rounding error."""
    asked: list[float] = []
    euler(lambda x, t: asked.append(t) or torch.zeros_like(x), torch.zeros(1), 10)
    for tenth, t in zip(range(10, 0, -1), asked, strict=True):
        assert SamplingConfig(guidance_low=tenth / 10).guides(t)
        assert SamplingConfig(guidance_high=tenth / 10).guides(t)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(steps=3),
        SamplingConfig(steps=4, sampler="euler", guidance="classifier_free", guidance_high=0.6),
        SamplingConfig(steps=3, sampler="sde", guidance="none"),
    ],
)
def test_operations_per_image_are_those_that_torch_counts(config: SamplingConfig) -> None:
    net = model()
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as counter:
        sample(net, torch.tensor([1]), config)
    assert operations_per_image(net, config) == counter.get_total_flops()


def test_sampling_leaves_the_model_in_its_mode() -> None:
    net = model().train()
    sample(net, torch.tensor([1]), SamplingConfig(steps=1))
    assert net.training


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label}: must be between 0 and 2"):
        sample(model(), torch.tensor([0, label]), SamplingConfig(steps=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ddim"}, "sampler='ddim': must be heun, euler, sde"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"guidance": "half"}, "guidance='half': must be path_drop, classifier_free or none"),
        ({"scale": -1.0}, "scale=-1.0: must be 0 or more"),
        ({"scale": math.nan}, "scale=nan: must be 0 or more"),
        ({"scale": math.inf}, "scale=inf: must be 0 or more"),
        ({"guidance_low": 0.9, "guidance_high": 0.1}, "must be 0 <= low <= high <= 1"),
    ],
)
def test_bad_sampling_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
