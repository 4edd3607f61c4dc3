"""Where a step's time goes: regions sum to the step, backwards belong to their forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from adaptive import RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.observe import regions
from adaptive.observe.regions import Costs, costs_by_region, named_regions, region
from adaptive.ops.backend import choose

TINY = DecoderConfig(dim=32, num_layers=2, num_heads=4, ffn_dim=64).with_method(
    MixtureOfDepthsConfig(capacity=0.25)
)


def profiled(model: Decoder, *, steps: int = 2) -> Costs:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with named_regions(model), torch.profiler.profile(schedule=schedule, profile_memory=True) as p:
        for _ in range(1 + steps):
            with region("data"):
                ids_BS = torch.randint(0, 256, (2, 32))
            with region("forward"), RoutingTape(model) as tape:
                loss = model.token_losses(ids_BS, ids_BS).mean()
            with region("backward"):
                (loss + tape.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            p.step()
    return costs_by_region(p)


@pytest.mark.parametrize("recompute", [False, True])
def test_regions_sum_to_the_steps_and_have_their_backwards(recompute: bool) -> None:
    torch.manual_seed(0)
    costs = profiled(Decoder(replace(TINY, recompute=recompute)))
    assert costs.steps == 2
    seconds = sum(cost.seconds for cost in costs.paths.values())
    assert seconds == pytest.approx(costs.seconds, rel=1e-6)
    rows = costs.by_name()
    for name in ("router", "pack", "combine", "attention", "ffn", "rms_norm", "varlen_attention"):
        forward, backward = rows[name]
        assert forward.calls > 0, name
        assert backward.seconds > 0, name
        assert forward.seconds > 0, name
    for name in ("data", "optimizer", "gradients", "mixture_of_depths", "block", "layers"):
        assert name in rows, name
    assert rows["data"][1].seconds == rows["optimizer"][1].seconds == 0
    assert [cost.calls for cost in rows["mixture_of_depths"]] == [2, 2 * recompute]
    assert ("backward", "mixture_of_depths.1", "router") in {path for path, _ in costs.paths}
    # What a forward keeps for its backward, the backward frees; recomputed, it keeps less.
    if not recompute:
        assert rows["ffn"][0].kept > 0
    assert costs.peak > 0


def test_what_needs_no_gradient_has_no_backward() -> None:
    torch.manual_seed(0)
    model = Decoder(TINY)
    model.embedding.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    paths = {path[1] for path, backward in profiled(model).paths if backward and len(path) > 1}
    assert "mixture_of_depths.1" in paths
    assert "layers.0" not in paths


def test_regions_change_nothing_and_are_gone_afterwards() -> None:
    torch.manual_seed(0)
    model, ids_BS = Decoder(TINY), torch.randint(0, 256, (2, 32))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS).mean()
        (loss + tape.loss()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    before = gradients()
    function = choose("pack", torch.zeros(1)).function
    with named_regions(model):
        assert choose("pack", torch.zeros(1)).function is not function
        meanwhile = gradients()
    assert choose("pack", torch.zeros(1)).function is function
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for expected, found in zip(before, meanwhile, strict=True):
        assert torch.equal(expected, found)


def test_every_moment_belongs_to_the_innermost_region() -> None:
    """By hand: nanoseconds of a forward, its backward in another order, a collective inside."""

    def span(start: int, end: int, name: str | None, node: Any = None) -> regions._Span:
        return regions._Span(start, end, name, node)

    backward = "autograd::engine::evaluate_function: "
    spans = [
        span(10, 40, "forward"),
        span(12, 20, "a"),
        span(13, 14, None, (1, 7)),
        span(15, 18, None, (1, 7)),  # the maker of node 7, though "b" asks for that number too
        span(20, 30, "b"),
        span(22, 23, None, (1, 8)),
        span(50, 90, "backward"),
        span(52, 60, backward + "B", (1, 8)),
        span(60, 80, backward + "A", (1, 7)),
        span(65, 70, "communication"),
        span(80, 84, backward + "torch::autograd::AccumulateGrad", (1, -1)),
    ]
    memory = [(16, 100), (55, -40)]
    found = regions._accounted(spans, memory, (0, 100), 1).paths
    nanoseconds = {path: round(1e9 * cost.seconds) for path, cost in found.items()}
    assert nanoseconds == {
        ((), False): 10 + 10 + 10,
        (("forward",), False): 2 + 10,
        (("forward", "a"), False): 8,
        (("forward", "b"), False): 10,
        (("backward",), False): 2 + 6,
        (("backward", "b"), True): 8,
        (("backward", "a"), True): 15,
        (("backward", "a", "communication"), True): 5,
        (("backward", "gradients"), True): 4,
    }
    assert found[("forward", "a"), False].kept == 100
    assert found[("backward", "b"), True].kept == -40


def test_without_a_profiler_a_region_is_nothing() -> None:
    assert region("data") is region("forward")
    with torch.profiler.profile(), region("data") as opened:
        assert opened is not None
    with torch.profiler.profile() as profiler:
        nn.Linear(2, 2)(torch.ones(1, 2))
    with pytest.raises(ValueError, match="has no step"):
        costs_by_region(profiler)
