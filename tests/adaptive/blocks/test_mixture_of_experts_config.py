"""The configuration of experts in a decoder: which layers, what it costs, what it refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from adaptive import MixtureOfExperts, RoutingTape
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.flops import executed_flops, planned_flops
from adaptive.models import Decoder, DecoderConfig
from parallel.flop_formulas import torch_flop_counter

DIM = 12


def test_a_decoder_has_experts_in_the_layers_that_its_config_names() -> None:
    def routed(schedule: Any) -> list[int]:
        config = MixtureOfExpertsConfig(num_experts=4, schedule=schedule, router="hyperspherical")
        model = Decoder(
            DecoderConfig(dim=16, num_heads=2, num_layers=4, ffn_dim=24, mixture_of_experts=config)
        )
        logits = model(torch.randint(256, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
        assert logits.shape == (2, 5, 256)
        return [i for i, x in enumerate(model.layers) if isinstance(x.ffn, MixtureOfExperts)]

    assert routed("all") == [0, 1, 2, 3]
    assert routed(2) == [1, 3]
    assert routed([0, 3]) == [0, 3]


@pytest.mark.parametrize("router", ["linear", "hyperspherical"])
def test_operations_are_those_that_torch_counts(router: Any) -> None:
    config = MixtureOfExpertsConfig(num_experts=4, router=router, shared_experts=1, top_k=2)
    model = nn.Sequential(config.feed_forward(DIM, ffn_dim=7))
    with torch_flop_counter(display=False) as counted, RoutingTape(model) as tape, torch.no_grad():
        model(torch.randn(20, DIM))
    assert planned_flops(model, 1, 20) == counted.get_total_flops()
    assert float(executed_flops(model, tape.records, 1, 20)) == counted.get_total_flops()


def test_a_decoder_with_experts_is_causal() -> None:
    config = MixtureOfExpertsConfig(num_experts=4)
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(dim=16, num_heads=2, num_layers=2, ffn_dim=24, mixture_of_experts=config)
    )
    ids = torch.randint(256, (2, 9))
    changed = ids.clone()
    changed[:, 6:] = 0
    torch.testing.assert_close(model(ids)[:, :6], model(changed)[:, :6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9: must be between 1 and num_experts=8"),
        ({"router": "tree"}, "router='tree': must be linear or hyperspherical"),
        (
            {"router": "hyperspherical", "projection_dim": 0},
            "projection_dim=0: must be at least 1",
        ),
        ({"schedule": 0}, "schedule=0: must be at least 1"),
        ({"idle_experts": -1}, "idle_experts=-1: must be 0 or more"),
        ({"ffn_dim": 0}, "ffn_dim=0: must be at least 1"),
        ({"z_coefficient": -1.0}, "z_coefficient=-1.0: must be 0 or more"),
    ],
)
def test_bad_configs_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsConfig(**options)


def test_a_layer_that_does_not_exist_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"schedule=.*: layer 7 must be between 0 and 3"):
        DecoderConfig(num_layers=4, mixture_of_experts=MixtureOfExpertsConfig(schedule=[7]))


def test_making_a_config_draws_no_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    MixtureOfExpertsConfig(router="hyperspherical")
    assert torch.equal(torch.rand(1), expected)
