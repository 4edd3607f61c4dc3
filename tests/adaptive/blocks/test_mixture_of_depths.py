"""Mixture-of-Depths against the formula written out token by token; one test a trap."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import LinearRouter, MixtureOfDepths, RoutingTape, Selection, TokenLayout
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU
from adaptive.routing.recompute import checkpoint


class CausalMean(nn.Module):
    """A user's own [B, S, D] block: attends to a running mean, then transforms each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        count = torch.arange(1, x_BSD.shape[1] + 1, dtype=x_BSD.dtype)[:, None]
        seen = self.mix(x_BSD).cumsum(1) / count
        return x_BSD + self.out(torch.tanh(x_BSD + seen))


def decoder_layer(dim: int = 16) -> DecoderLayer:
    return DecoderLayer(RMSNorm(dim), Attention(dim, 2), RMSNorm(dim), SwiGLU(dim, 24))


def routed(block: nn.Module, **options: Any) -> MixtureOfDepths:
    torch.manual_seed(0)
    module = MixtureOfDepths(block, 16, **{"capacity": 0.5, **options})
    nn.init.normal_(module.router.weight)
    return module.double()


def written_out(module: MixtureOfDepths, hidden_BSD: Tensor, keep: int) -> Tensor:
    """out_i = h_i + w(r_i) f_i(h̃) for the k best tokens of each row, by Python loops."""
    rows = []
    for h_SD in hidden_BSD:
        r_S = h_SD @ module.router.weight[0]
        order = sorted(range(len(r_S)), key=lambda i: -r_S[i].item())
        chosen = sorted(order[:keep])
        gathered = torch.stack([h_SD[i] for i in chosen])[None]
        update = module.block(gathered)[0] - gathered[0]
        weight = {
            "raw": r_S,
            "sigmoid": 1 / (1 + torch.exp(-r_S)),
            "tanh_norm": 1 + 0.2 * torch.tanh(r_S),
        }[module.weight]
        row = [
            h_SD[i] + weight[i] * update[chosen.index(i)] if i in chosen else h_SD[i]
            for i in range(len(h_SD))
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("weight", ["raw", "sigmoid", "tanh_norm"])
def test_output_and_every_gradient_are_the_papers_formula(weight: str) -> None:
    module = routed(CausalMean(16), weight=weight)
    hidden = torch.randn(3, 10, 16, dtype=torch.float64, requires_grad=True)
    got, expected = module(hidden), written_out(module, hidden, keep=5)
    torch.testing.assert_close(got, expected)
    leaves = [hidden, module.router.weight, *module.block.parameters()]
    grad = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"keys": "all"}, {"granularity": "ffn"}], ids=str)
def test_it_is_the_dense_layer_where_a_token_is_chosen(options: dict[str, Any]) -> None:
    """With keys of all tokens; and where the feed-forward alone is routed."""
    module = routed(decoder_layer(), weight="sigmoid", **options)
    hidden = torch.randn(3, 10, 16, dtype=torch.float64, requires_grad=True)
    with RoutingTape() as tape:
        got = module(hidden)
    assert tape.records[0].executed == 3 * 5
    before, layout = hidden, TokenLayout.dense(3, 10)
    if module.granularity == "ffn":
        normed = module.block.attention_norm(hidden.flatten(0, 1))
        before = hidden + module.block.attention(normed, layout=layout).view_as(hidden)
    scores = before @ module.router.weight[0]
    chosen = torch.zeros(3, 10, 1, dtype=torch.float64)
    chosen.scatter_(1, scores.topk(5).indices[..., None], 1.0)
    dense = torch.stack([module.block(h, layout=TokenLayout.dense(1, 10)) for h in hidden])
    expected = before + chosen * scores.sigmoid()[..., None] * (dense - before)
    torch.testing.assert_close(got, expected)
    leaves = [hidden, module.router.weight, *module.block.parameters()]
    grad = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, leaves, grad) for out in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_whole_block_passes_gradcheck() -> None:
    module = routed(decoder_layer())
    hidden = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    parameters = [module.router.weight, *module.block.parameters()]

    def run(hidden: Tensor, *_: Tensor) -> Tensor:
        return module(hidden)

    # Random projections of the Jacobian: the full one takes a minute.
    assert torch.autograd.gradcheck(run, (hidden, *parameters), fast_mode=True)


def test_unselected_tokens_leave_bit_for_bit() -> None:
    module = routed(CausalMean(16)).float()
    hidden = torch.randn(2, 9, 16) * 100
    with RoutingTape() as tape:
        out = module(hidden)
    chosen = tape.records[0].chosen
    assert chosen is not None
    chosen = chosen.view(2, 9)
    assert torch.equal(out[~chosen], hidden[~chosen])
    assert (out[chosen] != hidden[chosen]).any(-1).all()


def test_ties_choose_exactly_k_and_the_earliest() -> None:
    """Traps: strict > against the k-th score keeps fewer, >= keeps more."""
    module = routed(CausalMean(16))
    nn.init.zeros_(module.router.weight)
    with RoutingTape() as tape:
        module(torch.randn(2, 8, 16, dtype=torch.float64))
    chosen = tape.records[0].chosen
    assert chosen is not None
    assert chosen.view(2, 8).tolist() == [[True] * 4 + [False] * 4] * 2


def test_rotary_uses_original_positions() -> None:
    """Trap: positions compacted to 0..k-1. A relative rotation would hide a shift, not a gap."""
    seen: list[Tensor] = []

    class Positions(MixtureOfDepths):
        def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
            seen.append(selection.positions)
            return super().inner(packed_RD, selection, **kwargs)

    torch.manual_seed(3)
    module = Positions(decoder_layer(), 16, capacity=0.5).double()
    nn.init.normal_(module.router.weight)
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    out = module(hidden)
    r = (hidden[0] @ module.router.weight[0]).tolist()
    chosen = sorted(sorted(range(8), key=lambda i: -r[i])[:4])
    assert seen[0].tolist() == chosen
    assert chosen != list(range(4))
    # The same four tokens under compacted positions give another result: the test can fail.
    packed = hidden[0, chosen]
    compact = module.block(packed, layout=TokenLayout.dense(1, 4))
    update = (out[0, chosen] - packed) / torch.tensor(r, dtype=torch.float64)[chosen, None]
    assert not torch.allclose(packed + update, compact, atol=1e-6)


REACHES = [{}, {"keys": "all"}, {"granularity": "ffn"}]


@pytest.mark.parametrize("options", REACHES, ids=str)
def test_padding_changes_nothing_and_is_never_computed(options: dict[str, Any]) -> None:
    module = routed(decoder_layer(), **options)
    hidden = torch.randn(2, 10, 16, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    junk = hidden.clone()
    junk[1, 6:] = 1e6
    with RoutingTape() as tape:
        out = module(junk, token_mask=mask)
    alone = module(hidden[1:, :6])
    torch.testing.assert_close(out[1, :6], alone[0])
    assert torch.equal(out[1, 6:], junk[1, 6:])
    record = tape.records[0]
    assert (int(record.tokens), record.executed) == (16, 5 + 3)
    assert record.chosen is not None
    assert torch.equal(record.chosen.view(2, 10)[1, 6:], torch.zeros(4, dtype=torch.bool))
    assert record.chosen.sum() == 8
    assert all(loss < 10 for loss in record.losses.values())


def test_left_padding_gives_the_same_tokens_as_right_padding() -> None:
    module = routed(decoder_layer())
    tokens = torch.randn(1, 6, 16, dtype=torch.float64)
    blank = torch.zeros(1, 3, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    right = module(torch.cat([tokens, blank], 1), token_mask=mask)
    left = module(torch.cat([blank, tokens], 1), token_mask=mask.flip(1))
    torch.testing.assert_close(right[:, :6], left[:, 3:])


@pytest.mark.parametrize("options", REACHES, ids=str)
@pytest.mark.parametrize("predictor", ["both", "bce", "mlp"])
def test_causal_evaluation_does_not_look_ahead(predictor: str, options: dict[str, Any]) -> None:
    """Trap: top-k at evaluation. Changing token t must change no output before t."""
    module = routed(decoder_layer(), predictor=predictor, **options).eval()
    hidden = torch.randn(1, 12, 16, dtype=torch.float64)
    before = module(hidden)
    for t in range(12):
        changed = hidden.clone()
        changed[:, t:] = torch.randn(1, 12 - t, 16, dtype=torch.float64) * 3
        torch.testing.assert_close(module(changed)[:, :t], before[:, :t])


def test_without_predictor_evaluation_is_expert_choice_and_says_so() -> None:
    module = routed(CausalMean(16), predictor="none").eval()
    assert not module.causal
    with RoutingTape() as tape:
        module(torch.randn(2, 8, 16, dtype=torch.float64))
    assert tape.records[0].executed == 8
    assert tape.records[0].losses == {}


def test_one_token_at_a_time_does_not_choose_every_token() -> None:
    """Trap: top-k of a sequence of one chooses it always."""
    module = routed(CausalMean(16)).eval()
    hidden = torch.randn(1, 64, 16, dtype=torch.float64)
    executed = 0
    for t in range(64):
        with RoutingTape() as tape:
            module(hidden[:, t : t + 1])
        executed += tape.records[0].executed
    with RoutingTape() as tape:
        module(hidden)
    assert executed == tape.records[0].executed
    assert 0 < executed < 64


def test_predictor_losses_are_the_mean_binary_cross_entropy() -> None:
    module = routed(CausalMean(16))
    hidden = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    with RoutingTape() as tape:
        module(hidden)
    chosen = tape.records[0].chosen
    assert chosen is not None
    for name, logits in (
        ("router_bce", hidden.flatten(0, 1) @ module.router.weight[0]),
        ("predictor_bce", module.predictor(hidden.flatten(0, 1))),
    ):
        p = torch.sigmoid(logits.detach())
        expected = -torch.where(chosen, p.log(), (1 - p).log()).mean()
        torch.testing.assert_close(tape.records[0].losses[name], expected, check_dtype=False)


def test_mlp_predictor_leaves_the_trunk_alone_and_bce_reaches_it() -> None:
    for predictor, reaches in (("mlp", False), ("bce", True)):
        module = routed(CausalMean(16), predictor=predictor)
        hidden = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
        with RoutingTape() as tape:
            module(hidden)
        loss = tape.loss()
        assert isinstance(loss, Tensor)
        loss.backward()
        assert (hidden.grad is not None) == reaches
        assert (module.router.weight.grad is not None) == reaches


def test_every_layer_has_its_own_router() -> None:
    block = CausalMean(16)
    first, second = MixtureOfDepths(block, 16), MixtureOfDepths(block, 16)
    assert first.router is not second.router
    assert isinstance(first.router, LinearRouter)


def test_tanh_norm_starts_with_weight_one() -> None:
    module = MixtureOfDepths(CausalMean(16), 16, weight="tanh_norm", capacity=0.5)
    with RoutingTape() as tape:
        module(torch.randn(2, 8, 16))
    assert tape.records[0].weight_mean == 1


def test_random_choice_ignores_scores_and_keeps_the_count() -> None:
    module = routed(CausalMean(16), choice="random")
    hidden = torch.randn(1, 32, 16, dtype=torch.float64)
    masks = []
    for _ in range(2):
        with RoutingTape() as tape:
            module(hidden)
        masks.append(tape.records[0].chosen)
        assert tape.records[0].executed == 16
    assert not torch.equal(masks[0], masks[1])


def test_fixed_choice_is_even_and_of_positions_alone() -> None:
    module = routed(CausalMean(16), choice="fixed", capacity=0.25)
    masks = []
    for _ in range(2):
        with RoutingTape() as tape:
            module(torch.randn(2, 32, 16, dtype=torch.float64))
        masks.append(tape.records[0].chosen.view(2, 32))
        assert masks[-1].sum(1).tolist() == [8, 8]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0][0], masks[0][1])
    # Multiples of the golden ratio leave gaps of three lengths, two and their sum.
    assert set(masks[0][0].nonzero().squeeze(1).diff().tolist()) == {2, 3, 5}


@pytest.mark.parametrize("choice", ["router", "random", "fixed"])
def test_recomputation_takes_the_same_decisions_and_records_once(choice: str) -> None:
    module = routed(decoder_layer(), choice=choice)
    hidden = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        module.zero_grad()
        with RoutingTape() as tape:
            out = checkpoint(module, hidden) if recompute else module(hidden)
        # A different generator state at recomputation is the trap for random choices.
        torch.manual_seed(2)
        (out.square().sum() + tape.loss()).backward()
        results.append({n: p.grad.clone() for n, p in module.named_parameters()})
        assert len(tape.records) == 1
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name])


def test_recomputation_survives_scores_that_differ_by_rounding() -> None:
    """Trap: a token that moves across the boundary in the second pass corrupts the gradient."""
    calls = []

    class Drifting(LinearRouter):
        def forward(self, hidden_TD: Tensor) -> Tensor:
            calls.append(1)
            logits = super().forward(hidden_TD)
            # The second pass reverses the order, keeping graph and values of the chosen rows.
            return logits if len(calls) == 1 else logits - 2 * logits.detach()

    torch.manual_seed(0)
    module = MixtureOfDepths(CausalMean(16), 16, capacity=0.5, predictor="none").double()
    module.router = Drifting(16, 1, std=1.0).double()
    hidden = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    with RoutingTape() as tape:
        out = checkpoint(module, hidden)
    out.sum().backward()
    assert len(calls) == 2
    assert hidden.grad is not None
    chosen = tape.records[0].chosen
    # A token that passed by has gradient exactly 1 from the residual, and nothing else.
    assert torch.equal(hidden.grad[0][~chosen], torch.ones_like(hidden.grad[0][~chosen]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity=0: must be in \(0, 1\]"),
        ({"capacity": 1.2}, r"capacity=1.2: must be in \(0, 1\]"),
        ({"weight": "softmax"}, "weight='softmax': must be one of raw, sigmoid, tanh_norm"),
        ({"predictor": "mpl"}, "predictor='mpl': must be one of both, bce, mlp, none"),
        ({"granularity": "ffn"}, "granularity='ffn': needs a block with attention_norm"),
        ({"keys": "every"}, "keys='every': must be one of chosen, all"),
        ({"keys": "all"}, r"keys='all': CausalMean does not take queries apart from keys"),
        ({"choice": "topk"}, "choice='topk': must be one of router, random, fixed"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfDepths(CausalMean(16), 16, **options)


def test_a_nan_at_padding_reaches_no_gradient() -> None:
    torch.manual_seed(0)
    module = MixtureOfDepths(nn.Linear(8, 8), 8, capacity=0.5)
    x = torch.randn(2, 8, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    x[~valid] = torch.nan
    with RoutingTape() as tape:
        out = module(x, token_mask=valid)
    (out[valid].square().sum() + tape.loss()).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def test_a_batch_of_padding_alone_passes_and_gives_zero_gradients() -> None:
    config = DecoderConfig(
        dim=16, num_layers=2, num_heads=2, vocab_size=32, mixture_of_depths=MixtureOfDepthsConfig()
    )
    model = Decoder(config)
    ids, nobody = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool)
    with RoutingTape(model) as tape:
        losses = model.token_losses(ids, ids, nobody)
    (losses.sum() + tape.loss()).backward()
    assert losses.numel() == 0
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()
