"""AdaptiveComputationModule against the formula written out; its losses against sums over all."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive import AdaptiveComputationModule, BatchScope, RoutingTape, TokenLayout, checkpoint
from adaptive.routing.forced import force_choices
from adaptive.routing.losses import choice_diversity

D, WIDE, N = 12, 24, 3


def rows_of_learners(**options: Any) -> AdaptiveComputationModule:
    torch.manual_seed(0)
    module = AdaptiveComputationModule(D, WIDE, **{"num_learners": N, **options})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def swiglu(unit: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = (unit.get_submodule(n).weight for n in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def written_out(module: AdaptiveComputationModule, x_TD: Tensor, counts_T: Tensor) -> Tensor:
    """Σ_i g(count >= i) learner_i(x), token by token; what did not run is zero."""
    rows = []
    for x_D, count in zip(x_TD, counts_T.tolist(), strict=True):
        hidden = F.gelu(module.gate.up.weight @ x_D + module.gate.up.bias)
        soft = (module.gate.down.weight @ hidden + module.gate.down.bias).softmax(0)
        update = torch.zeros_like(x_D)
        for i in range(1, count + 1):
            at_least = soft[i:].sum()
            gate = 1 + at_least - at_least.detach()
            update = update + gate * swiglu(module.learners[i - 1], x_D)
        rows.append(update)
    return torch.stack(rows)


@settings(max_examples=20)
@given(st.lists(st.integers(0, N), min_size=6, max_size=6))
def test_update_and_every_gradient_are_the_formula(counts: list[int]) -> None:
    module = rows_of_learners().eval()
    chosen = torch.tensor(counts)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    with force_choices({module: chosen}):
        got = module(x)
    expected = written_out(module, x.flatten(0, 1), chosen).view_as(x)
    torch.testing.assert_close(got, expected)
    leaves = [x, *module.parameters()]
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, leaves, grad)
    theirs = torch.autograd.grad(expected + sum(0 * p.sum() for p in leaves), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_learner_runs_for_the_tokens_that_asked_for_it() -> None:
    module = rows_of_learners().eval()
    rows = []
    for learner in module.learners:
        learner.gate.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[0]))
    with force_choices({module: torch.tensor([0, 1, 3, 1, 2])}):
        module(torch.randn(1, 5, D, dtype=torch.float64))
    assert rows == [4, 2, 1]


def test_prefix_updates_are_what_forced_counts_compute() -> None:
    module = rows_of_learners().eval()
    x_TD = torch.randn(7, D, dtype=torch.float64)
    layout = TokenLayout.from_lengths([3, 4])
    prefixes = module.prefix_updates(x_TD, layout)
    for count in range(1, N + 1):
        with force_choices({module: torch.full((7,), count)}):
            torch.testing.assert_close(module(x_TD, layout=layout), prefixes[count - 1])


def test_evaluation_takes_the_argmax_and_padding_counts_nowhere() -> None:
    module = rows_of_learners().eval()
    x = torch.randn(2, 20, D, dtype=torch.float64)
    chosen = module.gate(x.flatten(0, 1)).argmax(-1)
    assert len(set(chosen.tolist())) > 2
    expected = written_out(module, x.flatten(0, 1), chosen).view_as(x)
    torch.testing.assert_close(module(x), expected)
    mask = torch.rand(2, 20) < 0.6
    with RoutingTape() as tape:
        out = module(x, token_mask=mask)
    torch.testing.assert_close(out[mask], expected[mask])
    assert not out[~mask].any()
    (record,) = tape.records
    assert record.tokens == int(mask.sum())
    assert record.executed.item() == pytest.approx(chosen[mask.flatten()].sum().item() / N)
    assert record.load.tolist() == chosen[mask.flatten()].bincount(minlength=N + 1).tolist()


def test_budget_is_over_all_modules_and_absolute() -> None:
    modules = [rows_of_learners(budget=0.5, diversity_coefficient=0.0).eval() for _ in range(2)]
    x = torch.randn(1, 4, D, dtype=torch.float64)
    for module in modules:
        module.control.coefficient = 1.0
    with (
        RoutingTape() as tape,
        force_choices({modules[0]: torch.full((4,), N), modules[1]: torch.full((4,), 1)}),
    ):
        for module in modules:
            module(x)
    # Two modules at 1 and 1/3, mean 2/3; as strong as two budgets of their own.
    assert tape.loss().item() == pytest.approx(2 * abs(2 / 3 - 0.5))


def test_diversity_is_the_mutual_information_of_the_global_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(-1)
    mean = p.mean(0)
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    expected = entropy(mean) - entropy(p).mean()
    (expected_grad,) = torch.autograd.grad(expected, logits)
    # Three micro-batches of different sizes, one of them empty.
    parts = logits.detach().split([5, 0, 4])
    scope = BatchScope(tokens=9, micro_batches=3)
    scope.start_census()
    for part in parts:
        with RoutingTape(scope=scope) as tape:
            choice_diversity(part.softmax(-1), tape)
    scope.finish_census()
    value, grads = 0.0, []
    for part in parts:
        leaf = part.clone().requires_grad_()
        with RoutingTape(scope=scope) as tape:
            share = choice_diversity(leaf.softmax(-1), tape)
        grads.append(torch.autograd.grad(share, leaf)[0])
        value += share.item()
    assert value == pytest.approx(expected.item())
    torch.testing.assert_close(torch.cat(grads), expected_grad)


def test_diversity_survives_choices_that_nobody_takes() -> None:
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    with RoutingTape() as tape:
        share = choice_diversity(p, tape)
    assert share.item() == pytest.approx(0.0, abs=1e-30)
    share.backward()
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    with RoutingTape() as tape:
        choice_diversity(logits.softmax(-1), tape).backward()
    assert logits.grad.isfinite().all()


def test_recomputation_takes_the_same_counts() -> None:
    module = rows_of_learners()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_learners": 5}, "num_learners=5: must divide ffn_dim=24"),
        ({"budget": 1.5}, "budget=1.5: must be in"),
        ({"diversity_coefficient": -1}, "diversity_coefficient=-1: must be 0 or more"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveComputationModule(D, WIDE, **options)
