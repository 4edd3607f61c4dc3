"""The density loss and its controller, on a router of one number."""

import copy

import pytest
import torch
from torch import Tensor

from adaptive import RoutingTape
from adaptive.routing.density import DensityControl, DensityController, Usage, usage_loss
from adaptive.routing.gumbel import gumbel_choice, soft_choice, straight_through


def gates(logit: Tensor, tokens: int) -> Tensor:
    """Straight-through gates of `tokens` draws with one probability σ(logit)."""
    logits_T2 = torch.stack([torch.zeros_like(logit), logit]).expand(tokens, 2)
    choice = gumbel_choice(logits_T2, noise=1.0)
    soft_T2 = soft_choice(logits_T2, choice.noise, temperature=1.0)
    return straight_through(choice.chosen == 1, soft_T2[:, 1])


def density_after_training(control: DensityControl, steps: int) -> float:
    """Mean density of the last half, when the task pays 0.2 for every unit of density."""
    torch.manual_seed(0)
    logit = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.02)
    seen = []
    for step in range(steps):
        if control.controller is not None:
            control.controller.start_step(step)
        with RoutingTape() as tape:
            losses, usage = control.losses(gates(logit, 256), tape, kind="test")
        loss = sum(share * coefficient for share, coefficient in losses.values())
        optimizer.zero_grad()
        (loss - 0.2 * usage.local / 256).backward()
        optimizer.step()
        seen.append(usage.density.item())
    return sum(seen[steps // 2 :]) / (steps - steps // 2)


def test_controller_holds_a_target_from_which_a_fixed_coefficient_stays_away() -> None:
    fixed = DensityControl(0.3, coefficient=0.5)
    # Where the slopes meet: 2 · 0.5 · (density - 0.3) = 0.2.
    assert density_after_training(fixed, 1000) == pytest.approx(0.5, abs=0.03)
    held = DensityControl(0.3, coefficient=0.5, controller=DensityController(0.3, gain=0.01))
    assert density_after_training(held, 1000) == pytest.approx(0.3, abs=0.02)
    price = held.controller.price.item()
    assert price == pytest.approx(0.2, abs=0.05)  # what the task pays


def test_shares_add_up_to_the_global_penalty_and_slope() -> None:
    costs = [torch.tensor(c, dtype=torch.float64) for c in ([1.0, 1.0, 1.0], [0.0], [])]
    total = torch.tensor(3.0, dtype=torch.float64)
    for penalty, value, slope in (("squared", 0.25, 1.0), ("absolute", 0.5, 1.0)):
        leaves = [c.clone().requires_grad_() for c in costs]
        usages = [Usage(c.sum(), len(c), total, torch.tensor(4.0)) for c in leaves]
        shares = [usage_loss([u], 0.25, penalty=penalty) for u in usages]
        assert sum(s.item() for s in shares) == pytest.approx(value)
        for share, leaf in zip(shares, leaves, strict=True):
            share.backward()
            torch.testing.assert_close(leaf.grad, torch.full_like(leaf, slope / 4))


def test_a_step_without_tokens_moves_nothing() -> None:
    controller = DensityController(0.5, gain=0.1)
    controller.start_step(0)
    assert controller.price.item() == 0
    control = DensityControl(0.5, coefficient=0.1, controller=controller)
    with RoutingTape() as tape:
        losses, _ = control.losses(torch.zeros(0, requires_grad=True), tape, kind="test")
    assert all(share.isfinite() for share, _ in losses.values())
    controller.start_step(1)
    assert controller.price.item() == 0


def test_price_moves_once_a_step_by_the_density_of_all_micro_batches() -> None:
    controller = DensityController(0.5, gain=0.1, limit=0.05)
    control = DensityControl(0.5, coefficient=0.0, controller=controller)
    for cost_T in (torch.ones(3), torch.zeros(1)):
        with RoutingTape() as tape:
            control.losses(cost_T, tape, kind="test")
        assert controller.price.item() == 0
    controller.start_step(1)
    assert controller.price.item() == pytest.approx(0.1 * (0.75 - 0.5))
    controller.start_step(2)
    assert controller.price.item() == pytest.approx(0.1 * (0.75 - 0.5))
    with RoutingTape() as tape:
        control.losses(torch.ones(4), tape, kind="test")
    controller.start_step(3)
    assert controller.price.item() == pytest.approx(0.05)  # the limit


def test_controllers_over_the_model_hold_one_price_from_the_mean_density() -> None:
    controls = [
        DensityControl(
            0.5, coefficient=1.0, over="model", controller=DensityController(0.5, gain=0.1)
        )
        for _ in range(2)
    ]
    with RoutingTape() as tape:
        for control, cost in zip(controls, (1.0, 0.6), strict=True):
            control.losses(torch.full((4,), cost), tape, kind="test")
        assert tape.loss().item() == pytest.approx(2 * (0.8 - 0.5) ** 2)
    for control in controls:
        control.controller.start_step(1)
        assert control.controller.price.item() == pytest.approx(0.1 * (0.8 - 0.5))


def test_half_precision_does_not_round_the_price() -> None:
    controller = DensityController(0.5)
    controller.price.fill_(1.0001)
    half = copy.deepcopy(controller).bfloat16()
    assert half.price.dtype == torch.float32
    half.price.add_(0.0001)
    assert half.price.item() != 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DensityController(1.5), "target=1.5: must be in"),
        (lambda: DensityController(0.5, gain=0), "gain=0: must be above 0"),
        (lambda: DensityControl(-0.1, coefficient=1), "density=-0.1: must be in"),
        (lambda: DensityControl(0.1, coefficient=1, over="x"), "over='x': must be"),
    ],
)
def test_wrong_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_cast_of_the_model_does_not_round_the_price() -> None:
    controller = DensityController(0.5)
    controller.price.fill_(0.1234567)
    assert torch.equal(controller.bfloat16().price, torch.tensor(0.1234567))
