"""MoDE, staged and integrated, against the formulas written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import MixtureOfDepthsAndExperts, RoutingTape
from adaptive.blocks.mixture_of_experts import ExpertsWithIdle, MixtureOfExpertsConfig
from adaptive.models import Decoder, DecoderConfig

DIM = 12


def made(**options: Any) -> MixtureOfDepthsAndExperts:
    torch.manual_seed(0)
    block = MixtureOfDepthsAndExperts(DIM, 7, 3, **{"std": 0.5, **options})
    for name, parameter in block.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter)
    return block.double()


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 8, DIM, dtype=torch.float64)


def expert_output(experts: Any, expert: int, x: Tensor) -> Tensor:
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up)


def test_integrated_idle_experts_compute_nothing_and_keep_the_residual() -> None:
    block = made(idle_experts=2)
    mixture = block.block.experts
    with RoutingTape(block) as tape:
        out = block(tokens()).flatten(0, 1)
    computed = 0
    for t, x in enumerate(tokens().flatten(0, 1)):
        scores = torch.softmax(mixture.router.weight @ x, -1)
        best = scores.topk(2).indices.tolist()
        total = scores[best].sum()
        expected = x.clone()
        for e in best:
            if e < 3:
                expected = expected + scores[e] / total * expert_output(mixture.experts, e, x)
                computed += 1
        torch.testing.assert_close(out[t], expected)
        if min(best) >= 3:
            assert torch.equal(out[t], x)
    record = tape.records[0]
    assert 0 < computed < 32
    assert record.executed == computed
    assert record.dropped == 0
    assert record.load is not None
    assert record.load.shape == (3,)
    assert int(record.load.sum()) == computed


def test_integrated_idle_experts_take_part_in_balancing() -> None:
    block = made(idle_experts=1, top_k=1)
    mixture = block.block.experts
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[3] = 30 * tokens()[0, 0]
    one = tokens()[:1, :1].expand(1, 8, DIM)
    with RoutingTape() as tape:
        assert torch.equal(block(one), one)  # all tokens idle
    assert tape.records[0].losses["load_balancing"].item() == pytest.approx(4.0)
    out = block(one)
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_staged_routes_depth_first_and_then_experts() -> None:
    block = made(variant="staged", capacity=0.5)
    depth, mixture = block.block, block.block.block.experts
    with RoutingTape(block) as tape:
        out = block(tokens())
    for row, hidden in zip(out, tokens(), strict=True):
        r = hidden @ depth.router.weight[0]
        chosen = r.topk(4).indices.tolist()
        for t, x in enumerate(hidden):
            if t not in chosen:
                assert torch.equal(row[t], x)
                continue
            scores = torch.softmax(mixture.router.weight @ x, -1)
            best = scores.topk(2).indices.tolist()
            total = scores[best].sum()
            update = sum(scores[e] / total * expert_output(mixture.experts, e, x) for e in best)
            torch.testing.assert_close(row[t], x + r[t] * update)
    assert [record.kind for record in tape.records] == ["mixture_of_experts", "mixture_of_depths"]
    assert tape.records[0].tokens == 8


def test_balance_of_a_staged_mixture_is_a_mean_over_the_tokens_that_reach_it() -> None:
    """An even load costs 1, not the capacity: half of the tokens never see the router."""
    block = made(variant="staged", capacity=0.5, top_k=1)
    mixture = block.block.block.experts
    with torch.no_grad():
        mixture.router.weight.zero_()  # every expert equally probable, expert 0 takes all
    with RoutingTape() as tape:
        block(tokens())
    assert tape.records[0].losses["load_balancing"].item() == pytest.approx(1.0)


def test_a_decoder_combines_both_routings() -> None:
    from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig

    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            dim=16,
            num_heads=2,
            num_layers=2,
            ffn_dim=24,
            mixture_of_depths=MixtureOfDepthsConfig(capacity=0.5),
            mixture_of_experts=MixtureOfExpertsConfig(num_experts=4, idle_experts=2),
        )
    )
    with RoutingTape(model) as tape:
        out = model(torch.randint(256, (2, 8)))
    (out.sum() + tape.loss()).backward()
    kinds = {record.name: (record.kind, int(record.tokens)) for record in tape.records}
    assert kinds["layers.0.ffn"] == ("mixture_of_depths_and_experts", 16)
    assert kinds["layers.1.block.ffn"] == ("mixture_of_depths_and_experts", 8)
    assert kinds["layers.1"] == ("mixture_of_depths", 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "both"}, "variant='both': must be integrated or staged"),
        ({"variant": "staged", "idle_experts": 1}, "idle_experts=1: only the integrated variant"),
        ({"idle_experts": 0}, "idle_experts=0: must be at least 1"),
        ({"choice": "expert", "capacity_factor": 1.0}, "idle experts are for tokens to choose"),
        ({"top_k": 7}, "top_k=7: must be between 1 and num_experts=6"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_idle_experts_hold_no_weights() -> None:
    mixture = ExpertsWithIdle(DIM, 7, 3, idle_experts=5)
    assert mixture.experts.down_proj.shape == (3, DIM, 7)
    assert mixture.router.weight.shape == (8, DIM)
