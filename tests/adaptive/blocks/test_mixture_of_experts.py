"""Mixture of experts against recorded tensors and the formula written out; one test a trap."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive import BatchScope, HypersphericalRouter, MixtureOfExperts, RoutingTape, checkpoint
from adaptive.routing.token_choice import ExpertGroups

GOLDEN = Path(__file__).parents[2] / "golden" / "mixtral_moe.safetensors"
DIM = 12


def experts(**options: Any) -> MixtureOfExperts:
    torch.manual_seed(0)
    module = MixtureOfExperts(DIM, 7, 4, std=0.5, **options)
    if "router" not in options:
        nn.init.normal_(module.router.weight)
    return module.double()


def tokens(count: int = 20, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, DIM, dtype=torch.float64)


def expert_output(module: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    gate, up = (module.experts.gate_up_proj[expert] @ x).chunk(2)
    return module.experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up)


def written_out(module: MixtureOfExperts, hidden_TD: Tensor, top_k: int) -> Tensor:
    rows = []
    for x in hidden_TD:
        scores = torch.exp(module.router.weight @ x)
        scores = scores / scores.sum()
        best = sorted(range(4), key=lambda e: -scores[e].item())[:top_k]
        total = sum(scores[e] for e in best) if module.renormalize else 1
        rows.append(sum(scores[e] / total * expert_output(module, e, x) for e in best))
    return torch.stack(rows)


def test_golden_mixtral_output_and_every_gradient() -> None:
    golden = load_file(GOLDEN)
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    module = MixtureOfExperts.from_mixtral_state_dict(weights, top_k=2)
    x = golden["x"].requires_grad_()
    y = module(x)
    y.backward(golden["grad_y"])
    got = {
        "y": y,
        "grad_x": x.grad,
        "grads.gate.weight": module.router.weight.grad,
        "grads.experts.gate_up_proj": module.experts.gate_up_proj.grad,
        "grads.experts.down_proj": module.experts.down_proj.grad,
    }
    for name, value in got.items():
        torch.testing.assert_close(value, golden[name], atol=1e-4, rtol=0, msg=name)
    for name, value in module.mixtral_state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(("top_k", "renormalize"), [(1, None), (2, None), (2, False), (4, True)])
def test_output_and_gradients_equal_the_formula(top_k: int, renormalize: bool | None) -> None:
    module, hidden = experts(top_k=top_k, renormalize=renormalize), tokens()
    leaves = [hidden.requires_grad_(), *module.parameters()]
    out, expected = module(hidden), written_out(module, hidden, top_k)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(got, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_router_of_ones_own_is_any_module_to_scores() -> None:
    own = nn.Sequential(nn.Linear(DIM, 5), nn.Tanh(), nn.Linear(5, 4))
    module = experts(router=own, gate="sigmoid", renormalize=False)
    out = module(tokens())
    scores = torch.sigmoid(own(tokens()))
    for t, x in enumerate(tokens()):
        best = scores[t].topk(2).indices.tolist()
        torch.testing.assert_close(
            out[t], sum(scores[t, e] * expert_output(module, e, x) for e in best)
        )


def test_the_temperature_of_the_router_reaches_the_weights() -> None:
    module = experts(router=HypersphericalRouter(DIM, 4), top_k=1).double()
    module(tokens()).sum().backward()
    assert isinstance(module.router, HypersphericalRouter)
    for name, parameter in module.router.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


def test_one_expert_may_take_everything_and_nothing_is_dropped() -> None:
    module = experts(top_k=1)
    with torch.no_grad():
        module.router.weight.zero_()  # all tied: everything goes to expert 0
    with RoutingTape() as tape:
        out = module(tokens())
    torch.testing.assert_close(out, written_out(module, tokens(), 1))
    record = tape.records[0]
    assert record.load is not None
    assert record.load.tolist() == [20, 0, 0, 0]
    assert (record.dropped, record.dead_units) == (0, 3)
    out.sum().backward()
    assert module.experts.down_proj.grad is not None
    assert torch.count_nonzero(module.experts.down_proj.grad[1:]) == 0


def test_what_overflows_a_capacity_leaves_as_zero_and_is_counted() -> None:
    module = experts(top_k=1, capacity_factor=0.5)
    with torch.no_grad():
        module.router.weight.zero_()
    with RoutingTape() as tape:
        out = module(tokens())
    expected = written_out(module, tokens(), 1)
    torch.testing.assert_close(out[:2], expected[:2])
    assert torch.count_nonzero(out[2:]) == 0
    record = tape.records[0]
    assert record.dropped == pytest.approx(18 / 20)
    assert record.executed == 2


def test_dropping_does_not_rescale_the_weights_that_stay() -> None:
    module, dropless = experts(capacity_factor=0.5), experts()
    with RoutingTape() as tape:
        out = module(tokens())
    assert 0 < float(tape.records[0].dropped or 0) < 1
    kept = dropless.choose(dropless.router(tokens()).softmax(-1), None)
    taken = module.choose(module.router(tokens()).softmax(-1), None)
    whole = [t for t in range(20) if {2 * t, 2 * t + 1} <= set(taken.pairs.tolist())]
    assert 0 < len(whole) < len(kept.pairs) / 2
    torch.testing.assert_close(out[whole], dropless(tokens())[whole])


def test_padding_changes_nothing_and_counts_nowhere() -> None:
    module = experts(z_coefficient=0.1, shared_experts=1)
    hidden = tokens(10)
    padded = torch.full((2, 8, DIM), torch.nan, dtype=torch.float64)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2:], mask[1, :4] = True, True
    padded[mask] = hidden
    with RoutingTape() as tape:
        expected = module(hidden)
    with RoutingTape() as padded_tape:
        out = module(padded, token_mask=mask)
    torch.testing.assert_close(out[mask], expected)
    assert torch.count_nonzero(out[~mask]) == 0
    plain, with_padding = tape.records[0], padded_tape.records[0]
    for name in ("load", "entropy", "weight_mean", "dropped"):
        torch.testing.assert_close(getattr(with_padding, name), getattr(plain, name), msg=name)
    assert int(with_padding.tokens) == 10
    for name, value in plain.losses.items():
        torch.testing.assert_close(with_padding.losses[name], value, msg=name)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_see_every_token(gated: bool) -> None:
    module = experts(shared_experts=2, shared_gate=gated)
    shared = module.shared
    assert shared is not None
    assert shared.gate_up_proj.shape == (1, 28, DIM)
    routed = written_out(module, tokens(), 2)
    for t, x in enumerate(tokens()):
        gate, up = (shared.gate_up_proj[0] @ x).chunk(2)
        weight = torch.sigmoid(shared.gate.weight[0] @ x) if gated else 1
        routed[t] += weight * (shared.down_proj[0] @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(module(tokens()), routed)


def test_weights_never_contain_the_bias_that_chose() -> None:
    module = experts(bias_rate=0.1, top_k=1)
    assert module.expert_bias is not None
    module.expert_bias.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    out = module(tokens())
    scores = torch.softmax(tokens() @ module.router.weight.T, -1)
    for t, x in enumerate(tokens()):
        torch.testing.assert_close(out[t], scores[t, 2] * expert_output(module, 2, x))


def test_expert_bias_moves_once_a_step_against_the_load_error() -> None:
    module = experts(bias_rate=0.01, top_k=1)
    assert module.expert_bias is not None
    with torch.no_grad():
        module.router.weight.zero_()
    module.start_step(0)
    assert torch.equal(module.expert_bias.bias, torch.zeros(4, dtype=torch.float64))
    for _ in range(3):  # micro-batches
        with RoutingTape() as tape:
            module(tokens())
    module.eval()
    module(tokens())  # evaluation does not count
    module.train()
    assert module.expert_bias.load.tolist() == [60, 0, 0, 0]
    module.start_step(1)
    expected = torch.tensor([-0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    torch.testing.assert_close(module.expert_bias.bias, expected)
    assert module.expert_bias.load.sum() == 0
    assert tape.records[0].losses.keys() == {"load_balancing"}
    # Now the others come first, and it takes the next step before the load is counted again.
    module(tokens())
    assert module.expert_bias.load.tolist() == [0, 20, 0, 0]


def test_recomputation_repeats_choice_and_noise_and_counts_once() -> None:
    hidden, results = tokens(), []
    for recompute in (False, True):
        module = experts(jitter=0.5, bias_rate=0.1, z_coefficient=0.1)
        assert module.expert_bias is not None
        torch.manual_seed(3)
        with RoutingTape() as tape:
            out = checkpoint(module, hidden) if recompute else module(hidden)
        loss = out.pow(2).sum() + tape.loss()
        loss.backward()
        assert len(tape.records) == 1
        assert module.expert_bias.load.sum() == 40
        results.append([loss, *(p.grad for p in module.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_jitter_is_for_training_and_for_the_router_only() -> None:
    module = experts(jitter=0.5, top_k=4, renormalize=False)
    plain = written_out(module, tokens(), 4)
    assert (module(tokens()) - plain).abs().max() > 1e-3
    module.eval()
    torch.testing.assert_close(module(tokens()), plain)


@pytest.mark.parametrize("frozen", ["router", "experts"])
def test_frozen_parts_stay_out_of_training(frozen: str) -> None:
    module = experts(**{f"freeze_{frozen}": True})
    module(tokens()).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_scores_are_float32_in_a_bfloat16_model() -> None:
    module = experts().bfloat16()
    hidden = tokens().bfloat16()
    with RoutingTape() as tape:
        assert module(hidden).dtype == torch.bfloat16
    weights = tape.records[0].weights
    assert weights is not None
    assert weights.dtype == torch.float32
    exact = (hidden.float() @ module.router.weight.float().T).softmax(-1)
    assert weights.sort().values.dtype == torch.float32
    best = exact.topk(2, -1).values
    expected = (best / best.sum(-1, keepdim=True)).flatten().sort().values
    torch.testing.assert_close(weights.sort().values, expected)


def test_losses_are_those_of_the_formula() -> None:
    module = experts(router=HypersphericalRouter(DIM, 4).double(), top_k=2, z_coefficient=0.1)
    assert isinstance(module.router, HypersphericalRouter)
    with torch.no_grad():
        module.router.temperature.fill_(0.6)
    with RoutingTape() as tape:
        module(tokens())
    cosines = module.router.cosines(tokens())
    share_sent = torch.bincount(cosines.topk(2, -1).indices.flatten(), minlength=4) / 40
    mean_probability = torch.softmax(cosines / 0.3, -1).mean(0)
    balance = 4 * (share_sent * mean_probability).sum()
    z = torch.logsumexp(cosines / 0.6, -1).pow(2).mean()
    record = tape.records[0]
    torch.testing.assert_close(record.losses["load_balancing"], balance.detach())
    torch.testing.assert_close(record.losses["z"], z.float().detach(), check_dtype=False)
    torch.testing.assert_close(tape.loss(), 0.01 * balance + 0.1 * z, check_dtype=False)


def test_losses_do_not_depend_on_accumulation() -> None:
    hidden = tokens(64).view(8, 8, DIM)

    def gradients(micro_batches: int) -> list[Tensor]:
        module = experts(z_coefficient=0.1)
        scope = BatchScope(tokens=64, replicas=micro_batches, micro_batches=micro_batches)
        if micro_batches > 1:
            scope.start_census()
            for part in hidden.chunk(micro_batches):
                with torch.no_grad(), RoutingTape(scope=scope):
                    module(part)
            scope.finish_census()
        total = torch.zeros(())
        for part in hidden.chunk(micro_batches):
            with RoutingTape(scope=scope) as tape:
                module(part)
            loss = tape.loss() / micro_batches
            assert isinstance(loss, Tensor)
            loss.backward()
            total = total + loss.detach()
        assert module.router.weight.grad is not None
        return [total, module.router.weight.grad]

    for whole, accumulated in zip(gradients(1), gradients(4), strict=True):
        torch.testing.assert_close(accumulated, whole, check_dtype=False)


def test_balance_loss_is_one_when_even_and_grows_with_skew() -> None:
    module = experts(top_k=1)
    with torch.no_grad():
        module.router.weight.copy_(torch.eye(4, DIM) * 50)
    even = torch.eye(4, DIM, dtype=torch.float64).repeat(5, 1)
    for hidden, expected in ((even, 1.0), (even[:1].expand(20, DIM), 4.0)):
        with RoutingTape() as tape:
            module(hidden)
        assert tape.records[0].losses["load_balancing"].item() == pytest.approx(expected)


def test_expert_choice_follows_the_formula_and_says_that_it_is_not_causal() -> None:
    module = experts(choice="expert", capacity_factor=1.0)
    assert not module.causal
    assert experts().causal
    scores = torch.softmax(tokens() @ module.router.weight.T, -1)
    expected = torch.zeros(20, DIM, dtype=torch.float64)
    for e in range(4):
        for t in scores[:, e].topk(10).indices.tolist():
            expected[t] += scores[t, e] * expert_output(module, e, tokens()[t])
    with RoutingTape() as tape:
        torch.testing.assert_close(module(tokens()), expected)
    assert tape.records[0].load is not None
    assert tape.records[0].load.tolist() == [10] * 4
    assert "load_balancing" not in tape.records[0].losses
    # The last token changes what the first ones become.
    changed = tokens()
    changed[-1] *= 100
    assert (module(changed)[:-1] - module(tokens())[:-1]).abs().max() > 0


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(count: int) -> None:
    module = experts(capacity_factor=1.0, shared_experts=1, bias_rate=0.1)
    with RoutingTape() as tape:
        out = module(tokens(count))
    (out.sum() + tape.loss()).backward()
    assert out.shape == (count, DIM)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    module.start_step(1)
    assert torch.isfinite(module.expert_bias.bias).all()


def test_collapse_is_measured_when_asked_for() -> None:
    module = experts(router=HypersphericalRouter(DIM, 4).double())
    with RoutingTape() as tape:
        module(tokens())
        module.measures_collapse = True
        module(tokens())
    assert tape.records[0].statistics == {}
    assert set(tape.records[1].statistics) == {"collapse/rc", "collapse/cosine_spread"}
    linear = experts()
    linear.measures_collapse = True
    with RoutingTape() as tape:
        linear(tokens())
    weight, hidden = linear.router.weight, tokens()
    cosines = (hidden @ weight.T) / (hidden.norm(dim=1)[:, None] * weight.norm(dim=1))
    found = tape.records[0].statistics["collapse/cosine_spread"]
    expected = cosines.std(0, correction=0).mean().detach()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5: must be between 1 and num_experts=4"),
        ({"top_k": 0}, "top_k=0: must be between 1 and num_experts=4"),
        ({"top_k": 1, "renormalize": True}, "renormalize=True: needs top_k of 2 or more"),
        ({"jitter": 1.0}, r"jitter=1.0: must be in \[0, 1\)"),
        ({"shared_experts": -1}, "shared_experts=-1: must be 0 or more"),
        ({"choice": "both"}, "choice='both': must be token or expert"),
        ({"choice": "expert"}, "capacity_factor=None: choice=expert needs a positive one"),
        ({"gate": "tanh"}, "gate='tanh': must be softmax or sigmoid"),
        ({"activation": "relu"}, "activation='relu': must be one of swiglu, gelu"),
        ({"groups": ExpertGroups(3, 1)}, "groups=3: must divide num_experts=4"),
        ({"bias_rate": -0.1}, "bias rate=-0.1: must be positive"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experts(**options)


def test_hidden_of_another_width_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"hidden of shape \[3, 5\]: must be \[B, S, 12\]"):
        experts()(torch.zeros(3, 5, dtype=torch.float64))
