"""SkipLayer against the dense formula `(1-g) h + g · block(h)`; one test a trap."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive import MixtureOfExperts, RoutingTape, SkipLayer, TokenLayout, checkpoint
from adaptive.blocks.sized_feed_forward import SizedFeedForward
from adaptive.routing.gumbel import GumbelSchedule
from tests.adaptive.blocks.skip_layers import (
    TEMPERATURE,
    CausalMean,
    D,
    decoder_layer,
    dense_formula,
    hidden_for,
    skipping,
)

masks = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3)


@settings(max_examples=25)
@given(masks, st.booleans())
def test_output_and_every_gradient_are_the_dense_formula(
    mask: list[list[bool]], exact: bool
) -> None:
    check_against_dense_formula(torch.tensor(mask), exact)


@pytest.mark.parametrize("exact", [False, True])
def test_a_sequence_may_execute_nothing_and_another_everything(exact: bool) -> None:
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1] = True
    mask[2, ::2] = True
    check_against_dense_formula(mask, exact)
    check_against_dense_formula(torch.zeros(2, 5, dtype=torch.bool), exact)
    check_against_dense_formula(torch.ones(2, 5, dtype=torch.bool), exact)


def check_against_dense_formula(executes_BS: Tensor, exact: bool) -> None:
    layer = skipping(skipped_gradient="exact" if exact else "masked").eval()
    hidden = hidden_for(executes_BS)
    got, expected = layer(hidden), dense_formula(layer, hidden, executes_BS, exact=exact)
    torch.testing.assert_close(got, expected)
    leaves = [hidden, *layer.parameters()]
    grad = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(got[~executes_BS], hidden[~executes_BS])


@settings(max_examples=15)
@given(masks, st.integers(0, 2**32 - 1), st.booleans())
def test_gradients_with_padding_are_the_dense_formula_of_the_valid_tokens(
    mask: list[list[bool]], seed: int, exact: bool
) -> None:
    executes = torch.tensor(mask)
    layer = skipping(skipped_gradient="exact" if exact else "masked").eval()
    valid = torch.rand(executes.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    hidden = hidden_for(executes)
    got = layer(hidden, token_mask=valid)
    expected = hidden.clone()
    for row in range(len(executes)):
        here = valid[row]
        if here.any():
            part = (hidden[row, here][None], executes[row, here][None])
            expected[row, here] = dense_formula(layer, *part, exact=exact)[0]
    torch.testing.assert_close(got, expected)
    leaves = [hidden, *layer.parameters()]
    grad = torch.randn_like(got)
    ours = torch.autograd.grad(got, leaves, grad)
    # Without a valid token the formula has no parameters; ours take part with zeros.
    theirs = torch.autograd.grad(expected + sum(0 * p.sum() for p in leaves), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_in_training_the_noise_is_in_the_choice_and_in_the_gradient() -> None:
    layer = skipping()
    hidden = torch.randn(1, 30, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = layer(hidden)
    torch.manual_seed(5)
    noise = -torch.empty(30, 2, dtype=torch.float64).exponential_().log()
    logits = F.layer_norm(hidden[0], (D,)) @ layer.router.weight.T + layer.router.bias + noise
    hard = logits.argmax(-1) == 1
    assert not torch.equal(hard, (logits - noise).argmax(-1) == 1)
    soft = (logits / TEMPERATURE).softmax(-1)[:, 1]
    gate = (hard.double() + soft - soft.detach())[:, None]
    block = layer.block(hidden[0], layout=TokenLayout.dense(1, 30)) * hard[:, None]
    expected = ((1 - gate) * hidden[0] + gate * block)[None]
    torch.testing.assert_close(out, expected)
    leaves = [hidden, *layer.parameters()]
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_skipped_gradient_none_leaves_the_router_what_executing_tokens_say() -> None:
    layer = skipping(skipped_gradient="none").eval()
    executes = torch.tensor([[True, False, False, True]])
    hidden = hidden_for(executes)
    grad = torch.randn_like(hidden)
    (got,) = torch.autograd.grad(layer(hidden), layer.router.weight, grad)
    # As if skipped tokens had no gate: h + g · (block(h) - h) with the update masked.
    h_SD = hidden[0]
    logits = F.layer_norm(h_SD, (D,)) @ layer.router.weight.T + layer.router.bias
    soft_S = (logits / TEMPERATURE).softmax(-1)[:, 1]
    update = layer.block(h_SD, layout=TokenLayout.dense(1, 4)) - h_SD
    out = h_SD + ((soft_S * executes[0])[:, None] * update).detach().sum() * 0
    out = out + (soft_S[:, None] * (update * executes[0][:, None]).detach())
    (expected,) = torch.autograd.grad(out, layer.router.weight, grad[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing_and_is_nobodys_key(left: bool) -> None:
    layer = skipping().eval()
    executes = torch.tensor([[True, False, True, True], [False, True, True, False]])
    hidden = hidden_for(executes)
    expected = layer(hidden)
    lengths = (4, 2)
    padded = torch.full((2, 6, D), 7.0, dtype=torch.float64)  # would execute: channel 0 is high
    mask = torch.zeros(2, 6, dtype=torch.bool)
    places = [slice(6 - n, 6) if left else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        padded[row, place] = hidden[row, : lengths[row]].detach()
        mask[row, place] = True
    with RoutingTape() as tape:
        out = layer(padded, token_mask=mask)
    for row, place in enumerate(places):
        torch.testing.assert_close(out[row, place], expected[row, : lengths[row]])
    assert torch.equal(out[~mask], padded[~mask])
    (record,) = tape.records
    assert (record.tokens, record.executed) == (6, 4)
    assert record.statistics["density"].item() == pytest.approx(4 / 6)
    assert record.chosen is not None
    assert torch.equal(record.chosen.view(2, 6)[0, places[0]], executes[0])
    assert not record.chosen.view(2, 6)[~mask].any()


def test_packed_documents_give_what_each_gives_alone() -> None:
    layer = skipping().eval()
    executes = torch.tensor([True, False, True, False, True, True, False, True])
    hidden = hidden_for(executes)
    together = layer(hidden, layout=TokenLayout.from_lengths([3, 0, 5]))
    apart = [layer(part[None])[0] for part in hidden.split([3, 5])]
    torch.testing.assert_close(together, torch.cat(apart))


def test_only_executing_tokens_are_computed() -> None:
    layer = skipping().eval()
    rows: dict[str, int] = {}
    for name, module in layer.block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, out, name=name: rows.update({name: args[0].shape[0]})
            )
    layer(hidden_for(torch.tensor([[True, False, False, True], [False, False, True, False]])))
    assert rows.pop("attention.key") == rows.pop("attention.value") == 8
    assert len(rows) == 5
    assert set(rows.values()) == {3}  # queries, output projection, feed-forward


def test_keys_executing_is_the_block_on_executing_tokens_with_their_positions() -> None:
    layer = skipping(keys="executing").eval()
    executes = torch.tensor([[True, False, False, True, True, False]])
    hidden = hidden_for(executes)
    chosen = executes[0].nonzero().squeeze(1)
    alone = TokenLayout(torch.tensor([0, 3], dtype=torch.int32), 3, chosen)
    expected = layer.block(hidden[0, chosen], layout=alone)
    torch.testing.assert_close(layer(hidden)[0, chosen], expected)
    with_all = skipping(keys="all").eval()
    assert not torch.allclose(with_all(hidden)[0, chosen], expected)


@pytest.mark.parametrize("granularity", ["attention", "ffn"])
@pytest.mark.parametrize("keys", ["all", "executing"])
def test_granularity_skips_one_half_and_runs_the_other(granularity: str, keys: str) -> None:
    layer = skipping(granularity=granularity, keys=keys).eval()
    # A small attention update leaves channel 0's sign, so that the ffn's router reads it too.
    nn.init.normal_(layer.block.attention.output.weight, std=0.01)
    executes = torch.tensor([[True, False, True, False, True]])
    hidden = hidden_for(executes)
    layout = TokenLayout.dense(1, 5)
    block, h_SD, gate = layer.block, hidden[0], executes[0].double()[:, None]
    normed = block.attention_norm(h_SD)
    attention = block.attention(normed, layout=layout)
    if granularity == "attention":
        if keys == "executing":
            chosen = executes[0].nonzero().squeeze(1)
            alone = TokenLayout(torch.tensor([0, 3], dtype=torch.int32), 3, chosen)
            attention = attention.index_copy(
                0, chosen, block.attention(normed[chosen], layout=alone)
            )
        expected = h_SD + gate * attention
        expected = expected + block.ffn(block.ffn_norm(expected), layout=layout)
    else:
        expected = h_SD + attention
        expected = expected + gate * block.ffn(block.ffn_norm(expected), layout=layout)
    torch.testing.assert_close(layer(hidden)[0], expected)


def test_a_users_block_runs_on_executing_tokens_and_says_so() -> None:
    with pytest.warns(UserWarning, match="takes_queries"):
        layer = skipping(CausalMean())
    assert layer.keys == "executing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skipping(CausalMean(), keys="executing")
    layer.eval()
    executes = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    hidden = hidden_for(executes)
    out = layer(hidden)
    for row in (0, 2):
        chosen = executes[row]
        torch.testing.assert_close(out[row, chosen], layer.block(hidden[row, chosen][None])[0])
    assert torch.equal(out[~executes], hidden[~executes])


def test_a_users_block_takes_part_when_nothing_executes() -> None:
    layer = skipping(CausalMean(), keys="executing").eval()
    hidden = hidden_for(torch.zeros(2, 3, dtype=torch.bool))
    out = layer(hidden)
    assert torch.equal(out, hidden)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_users_block_may_take_all_keys_by_one_method() -> None:
    class Averaging(SkipLayer):
        def inner_among_all(self, hidden_TD, layout, selection, **kwargs):  # type: ignore[no-untyped-def]
            return self.block(hidden_TD[None])[0][selection.indices]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = Averaging(CausalMean(), D).double().eval()
    assert layer.keys == "all"
    hidden = torch.randn(1, 9, D, dtype=torch.float64)
    out = layer(hidden)
    executed = (out != hidden).any(-1)
    torch.testing.assert_close(out[executed], layer.block(hidden)[executed])


def test_training_draws_from_the_softmax_and_evaluation_takes_the_argmax() -> None:
    layer = skipping()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1.0
    hidden = torch.randn(1, 1, D, dtype=torch.float64).expand(1, 4000, D)
    logit = F.layer_norm(hidden[0, 0], (D,))[0]
    with RoutingTape() as tape:
        layer(hidden)
    share = tape.records[0].executed / 4000
    # Four standard deviations of a binomial share.
    assert share == pytest.approx(torch.sigmoid(logit).item(), abs=4 * 0.5 / 4000**0.5)
    with RoutingTape() as tape:
        layer.eval()(hidden)
    assert tape.records[0].executed == (4000 if logit > 0 else 0)


def test_schedule_ends_where_training_chooses_as_evaluation() -> None:
    schedule = GumbelSchedule(
        temperature=2.0, final_temperature=0.5, noise=1.0, final_noise=0.0, steps=10
    )
    assert schedule.at(0) == (2.0, 1.0)
    assert schedule.at(5) == (pytest.approx(1.0), pytest.approx(0.5))
    assert schedule.at(99) == (0.5, 0.0)
    layer = skipping(schedule=schedule)
    layer.start_step(10)
    hidden = torch.randn(2, 20, D, dtype=torch.float64)
    assert torch.equal(layer.train()(hidden), layer.eval()(hidden))


@pytest.mark.parametrize("skipped_gradient", ["masked", "exact"])
def test_recomputation_takes_the_same_decisions(skipped_gradient: str) -> None:
    layer = skipping(skipped_gradient=skipped_gradient, controller_gain=0.1)
    hidden = torch.randn(2, 12, D, dtype=torch.float64, requires_grad=True)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        with RoutingTape() as tape:
            out = checkpoint(layer, hidden) if recompute else layer(hidden)
        # A new draw in the recomputed forward would execute other tokens.
        torch.manual_seed(4)
        loss = out.square().sum() + tape.loss()
        grads.append(torch.autograd.grad(loss, [hidden, *layer.parameters()]))
        assert len(tape.records) == 1
        # Counted once, not once more in the recomputed forward.
        assert layer.control.controller.seen.item() == 24
        layer.control.controller.seen.zero_()
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_every_parameter_has_a_gradient_when_nothing_executes() -> None:
    layer = skipping()
    layer.eval()(hidden_for(torch.zeros(2, 4, dtype=torch.bool))).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0: must be in"),
        ({"keys": "some"}, "keys='some': must be one of"),
        ({"granularity": "head"}, "granularity='head': must be one of"),
        ({"skipped_gradient": "x"}, "skipped_gradient='x': must be one of"),
        ({"density_coefficient": -1.0}, "density_coefficient=-1.0: must be 0 or more"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipLayer(decoder_layer(), D, **options)
    with pytest.raises(ValueError, match="attention_norm"):
        SkipLayer(CausalMean(), D, granularity="ffn")


def test_bfloat16_hidden_states_stay_bfloat16_and_skipped_ones_unchanged() -> None:
    layer = skipping(keys="executing").bfloat16().eval()
    executes = torch.tensor([[True, False, True, False]])
    hidden = hidden_for(executes).detach().bfloat16().requires_grad_()
    out = layer(hidden)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[~executes], hidden[~executes])
    out.float().square().sum().backward()
    assert layer.router.weight.grad.isfinite().all()


def test_the_exact_gradients_forward_is_counted_by_nothing_inside() -> None:
    """Two forwards, one step: an expert's bias must move by the executing tokens alone."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MixtureOfExperts(8, 16, 4, top_k=1, bias_rate=0.001)
            self.sized = SizedFeedForward(8, 16, controller_gain=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts(x) + self.sized(x)

    counted = []
    for gradient in ("masked", "exact"):
        torch.manual_seed(0)
        block = Layer()
        module = SkipLayer(block, 8, keys="executing", skipped_gradient=gradient)
        torch.manual_seed(1)
        with RoutingTape() as tape:
            module(torch.randn(2, 8, 8))
        tape.loss()
        assert block.experts.expert_bias is not None
        seen = block.sized.control.controller.seen
        counted.append((block.experts.expert_bias.load.sum(), seen.clone(), len(tape.records)))
    assert counted[0] == counted[1]
    assert 0 < counted[0][0] < 16
