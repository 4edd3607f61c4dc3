"""SizedFeedForward against the formula written out for every token; one test a trap."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive import RoutingTape, SizedFeedForward, checkpoint
from adaptive.blocks.sized_feed_forward import BIG, BYPASS, SMALL, SizedFeedForwardConfig
from adaptive.flops import executed_flops, nominal_flops
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.forced import force_choices
from adaptive.routing.gumbel import GumbelSchedule

D, WIDE, NARROW = 12, 16, 4


def sized(**options: Any) -> SizedFeedForward:
    torch.manual_seed(0)
    module = SizedFeedForward(D, WIDE, small_ffn_dim=NARROW, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def swiglu(unit: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = (unit.get_submodule(n).weight for n in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def written_out(module: SizedFeedForward, x_TD: Tensor, paths_T: Tensor) -> Tensor:
    """Σ_p g_p ffn_p(x), token by token; what was not taken is zero."""
    rows = []
    for x_D, path in zip(x_TD, paths_T.tolist(), strict=True):
        soft = (module.router.weight @ x_D + module.router.bias).softmax(0)
        hard = F.one_hot(torch.tensor(path), 3).double()
        gate = hard + soft - soft.detach()
        update = torch.zeros_like(x_D)
        if path == SMALL:
            update = gate[SMALL] * swiglu(module.small, x_D)
        if path == BIG:
            update = gate[BIG] * swiglu(module.big, x_D)
        rows.append(update)
    return torch.stack(rows)


paths = st.lists(st.integers(0, 2), min_size=8, max_size=8)


@settings(max_examples=20)
@given(paths)
def test_update_and_every_gradient_are_the_formula(path_list: list[int]) -> None:
    module = sized().eval()
    chosen = torch.tensor(path_list)
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    with force_choices({module: chosen}):
        got = module(x)
    expected = written_out(module, x.flatten(0, 1), chosen).view_as(x)
    torch.testing.assert_close(got, expected)
    leaves = [x, *module.parameters()]
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, leaves, grad)
    # Nothing may be unused: ZeRO 3 would hang.
    theirs = torch.autograd.grad(expected + sum(0 * p.sum() for p in leaves), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_takes_the_argmax_and_a_bypassed_token_gets_zero() -> None:
    module = sized().eval()
    x = torch.randn(1, 40, D, dtype=torch.float64)
    chosen = (x[0] @ module.router.weight.T + module.router.bias).argmax(-1)
    assert set(chosen.tolist()) == {BYPASS, SMALL, BIG}
    out = module(x)[0]
    torch.testing.assert_close(out, written_out(module, x[0], chosen))
    assert not out[chosen == BYPASS].any()


def test_each_unit_computes_its_own_tokens_only() -> None:
    module = sized().eval()
    rows = {}
    for name in ("small", "big"):
        module.get_submodule(name).gate.register_forward_hook(
            lambda _, args, out, name=name: rows.update({name: args[0].shape[0]})
        )
    with force_choices({module: torch.tensor([BIG, SMALL, BYPASS, SMALL])}):
        module(torch.randn(1, 4, D, dtype=torch.float64))
    assert rows == {"small": 2, "big": 1}


def test_random_stage_takes_every_path_equally_and_teaches_the_router_nothing() -> None:
    module = sized(random_steps=5)
    module.router.bias.data += torch.tensor([9.0, 0.0, 0.0])
    module.start_step(4)
    with RoutingTape() as tape:
        out = module(torch.randn(1, 3000, D, dtype=torch.float64))
    (out.square().sum() + tape.loss()).backward()
    assert not module.router.weight.grad.any()
    assert module.big.down.weight.grad.any()
    assert module.small.down.weight.grad.any()
    load = tape.records[0].load
    # Four standard deviations of a count.
    assert (load - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5
    module.start_step(5)
    with RoutingTape() as tape:
        module(torch.randn(1, 3000, D, dtype=torch.float64))
    assert tape.records[0].load[BYPASS] > 2500


def test_cost_is_the_share_of_the_big_units_compute() -> None:
    module = sized(budget=0.5, budget_coefficient=2.0).eval()
    with RoutingTape() as tape, force_choices({module: torch.tensor([BIG, SMALL, SMALL, BYPASS])}):
        module(torch.randn(1, 4, D, dtype=torch.float64))
    (record,) = tape.records
    cost = (1 + 2 * NARROW / WIDE) / 4
    assert record.executed == pytest.approx(4 * cost)
    assert record.statistics["cost"].item() == pytest.approx(cost)
    assert tape.loss().item() == pytest.approx(2.0 * (cost - 0.5) ** 2)
    assert record.load.tolist() == [1, 2, 1]


def test_flops_follow_the_paths() -> None:
    torch.manual_seed(0)
    config = DecoderConfig(
        dim=16, num_layers=1, num_heads=2, ffn_dim=32, sized_feed_forward=SizedFeedForwardConfig()
    )
    model = Decoder(config)
    module = model.layers[0].ffn
    assert isinstance(module, SizedFeedForward)
    ids = torch.randint(256, (1, 6))
    counted = {}
    for path in (BYPASS, SMALL, BIG):
        with (
            RoutingTape(model) as tape,
            force_choices({module: torch.full((6,), path)}),
        ):
            model(ids)
        counted[path] = float(executed_flops(model, tape.records, 1, 6))
    router = 2 * 6 * 16 * 3
    assert counted[BIG] == nominal_flops(model, 1, 6) + router
    one_unit = 2 * 6 * 3 * 16 * 32
    assert counted[BIG] - counted[BYPASS] == pytest.approx(one_unit)
    assert counted[SMALL] - counted[BYPASS] == pytest.approx(one_unit / 4)


def test_padding_neither_computes_nor_counts() -> None:
    module = sized().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    with RoutingTape() as tape:
        out = module(x, token_mask=mask)
    torch.testing.assert_close(out[mask], module(x)[mask])
    assert not out[~mask].any()
    assert tape.records[0].tokens == 7
    assert (tape.records[0].chosen.view(2, 5)[~mask] == -1).all()


def test_recomputation_takes_the_same_paths() -> None:
    module = sized()
    x = torch.randn(1, 50, D, dtype=torch.float64, requires_grad=True)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(1)
        with RoutingTape() as tape:
            out = checkpoint(module, x) if recompute else module(x)
        torch.manual_seed(2)
        loss = out.square().sum() + tape.loss()
        grads.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_router_learns_to_stay_within_a_budget() -> None:
    module = sized(budget=0.4, budget_coefficient=1.0, schedule=GumbelSchedule())
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.1)
    x = torch.randn(1, 300, D, dtype=torch.float64)
    costs = []
    for _ in range(60):
        with RoutingTape() as tape:
            module(x)
        optimizer.zero_grad()
        tape.loss().backward()
        optimizer.step()
        costs.append(tape.records[0].statistics["cost"].item())
    assert sum(costs[-20:]) / 20 == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"small_ffn_dim": 16}, "small_ffn_dim=16: must be between 1 and ffn_dim=16"),
        ({"budget": 0}, "budget=0: must be in"),
        ({"random_steps": -1}, "random_steps=-1: must be 0 or more"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SizedFeedForward(D, WIDE, **options)


def test_two_feed_forwards_in_one_layer_are_refused() -> None:
    from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig

    with pytest.raises(ValueError, match="give one of them"):
        DecoderConfig(
            sized_feed_forward=SizedFeedForwardConfig(),
            adaptive_computation=AdaptiveComputationConfig(),
        )
