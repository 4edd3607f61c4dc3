"""FLOPs of every method's model against what torch counts while it runs."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import Pattention, RoutingTape
from adaptive.blocks.adaptive_computation import AdaptiveComputationConfig
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.flops import executed_flops, planned_flops
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.generate import Sampling, generate
from parallel.flop_formulas import torch_flop_counter

DENSE = DecoderConfig(vocab_size=61, dim=64, num_layers=4, num_heads=4, max_seq_len=64)
METHODS = {
    "mixture_of_depths": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25)},
    "keys_of_all_tokens": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25, keys="all")},
    "depths_ffn": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25, granularity="ffn")},
    "mixture_of_experts": {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4)},
    "depths_and_experts": {
        "mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25),
        "mixture_of_experts": MixtureOfExpertsConfig(num_experts=4),
    },
    "pattention": {"norm": "parameter_free", "pattention": PattentionConfig()},
    "skip_layer": {"skip_layer": SkipLayerConfig()},
    "skip_attention": {"skip_layer": SkipLayerConfig(granularity="attention")},
    "skip_ffn": {"skip_layer": SkipLayerConfig(granularity="ffn")},
    "sized_feed_forward": {"sized_feed_forward": SizedFeedForwardConfig()},
    "adaptive_computation": {"adaptive_computation": AdaptiveComputationConfig()},
}
BATCH, LENGTH = 2, 64


@pytest.fixture(params=sorted(METHODS))
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return Decoder(dataclasses.replace(DENSE, **METHODS[request.param]))


@pytest.mark.parametrize("backward", [False, True])
def test_executed_operations_are_those_that_ran(model: Decoder, backward: bool) -> None:
    ids_BS = torch.randint(0, 61, (BATCH, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as mode:
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS).mean()
        if backward:
            (loss + tape.loss()).backward()
    # Our kernels compute attention's scores again, as flash attention does; math attention not.
    again = backward and os.environ.get("ADAPTIVE_BACKEND") == "triton"
    for module in model.modules():
        if again and isinstance(module, Pattention):
            module.save_memory = True
    executed = executed_flops(
        model, tape.records, BATCH, LENGTH, backward=backward, recompute=again
    )
    assert float(executed) == pytest.approx(mode.get_total_flops(), rel=0.01)


def test_planned_operations_are_of_the_order_of_the_executed(model: Decoder) -> None:
    """Untrained routers that decide for themselves need not keep to the plan: within a half."""
    ids_BS = torch.randint(0, 61, (BATCH, LENGTH))
    with RoutingTape(model) as tape:
        model(ids_BS)
    executed = float(executed_flops(model, tape.records, BATCH, LENGTH))
    assert planned_flops(model, BATCH, LENGTH) == pytest.approx(executed, rel=0.5)
    assert planned_flops(model.config, BATCH, LENGTH) == planned_flops(model, BATCH, LENGTH)


def test_operations_of_generation_are_those_that_ran(model: Decoder) -> None:
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), torch_flop_counter(display=False) as mode:
        *_, made = generate(
            model, [[1, 2, 3, 4, 5], [6]], max_new_tokens=8, sampling=Sampling(temperature=0)
        )
    assert made.executed_flops(model) == pytest.approx(mode.get_total_flops(), rel=0.01)


def test_sharded_weights_change_nothing(model: Decoder) -> None:
    """Under ZeRO 3 weights are empty between forwards: sizes come from elsewhere."""
    before = planned_flops(model, BATCH, LENGTH, backward=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert planned_flops(model, BATCH, LENGTH, backward=True) == before


def test_a_configuration_needs_no_memory(model: Decoder) -> None:
    """A model of any size can be planned on a laptop."""
    with torch.device("meta"):
        planned = Decoder(model.config)
    assert [name for name, p in planned.named_parameters() if not p.is_meta] == []
