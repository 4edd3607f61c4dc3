"""adaptive.growth: the function, the optimizer and bad input."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from adaptive import Pattention
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.pattention import PattentionConfig, PattentionFeedForward
from adaptive.growth import grow, grown_moments
from adaptive.models import Decoder, DecoderConfig

TINY = DecoderConfig(
    vocab_size=37,
    dim=32,
    num_layers=2,
    num_heads=4,
    rotary_fraction=0.25,
    norm="parameter_free",
    pattention=PattentionConfig(tokens=24, ffn_tokens=40, output_tokens=28),
)


def decoder(**changes):
    torch.manual_seed(0)
    return Decoder(replace(TINY, **changes))


def step(model, optimizer, seed):
    ids = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model.token_losses(ids, ids.roll(-1, 1)).mean().backward()
    optimizer.step()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    "changes", [{}, {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5)}]
)
def test_outputs_stay_the_same_after_training_and_growing_twice(changes):
    model = decoder(**changes)
    optimizer = adamw(model)
    step(model, optimizer, 1)
    ids = torch.randint(0, 37, (2, 12))
    before = model(ids)
    first = grow(model, tokens=32, ffn_tokens=64)
    second = grow(model, tokens=48, ffn_tokens=64)
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)
    assert (28, 32) in first.layers.values()
    assert set(second.layers.values()) == {(32, 48)}
    assert float(model.get_submodule(next(iter(first.layers))).scale) == math.sqrt(24)
    # 2 L D (3 x tokens + output + ffn) more, in two goes.
    added = 2 * 2 * 32 * (3 * 24 + 20 + 24)
    assert second.parameters_after - first.parameters_before == added
    assert second.parameters_after == sum(p.numel() for p in model.parameters())


def test_configuration_follows_and_rebuilds_the_grown_model():
    model = decoder()
    grow(model, tokens=32, ffn_tokens=64)
    assert model.config.pattention == PattentionConfig(tokens=32, ffn_tokens=64)
    rebuilt = Decoder(model.config)
    rebuilt.load_state_dict(model.state_dict())
    ids = torch.randint(0, 37, (2, 12))
    assert torch.equal(rebuilt(ids), model(ids))


def test_only_the_named_kind_grows():
    model = decoder()
    growth = grow(model, ffn_tokens=64)
    assert set(growth.layers) == {"layers.0.ffn", "layers.1.ffn"}
    assert model.config.pattention == replace(TINY.pattention, ffn_tokens=64)


@pytest.mark.parametrize("twice", [False, True])
def test_a_step_with_new_tokens_frozen_equals_never_growing(twice):
    """Trap: released loaders drop the optimizer's state."""
    never, grown = decoder(), decoder()
    never_optimizer, grown_optimizer = adamw(never), adamw(grown)
    for seed in range(3):
        step(never, never_optimizer, seed)
        step(grown, grown_optimizer, seed)
    if twice:
        grow(grown, tokens=32, optimizer=grown_optimizer)
    growth = grow(grown, tokens=56, ffn_tokens=80, optimizer=grown_optimizer)
    for name, parameter in grown.named_parameters():
        old = never.get_parameter(name)
        if parameter.shape != old.shape:
            rows = old.shape[0]
            assert twice or growth.old_rows[name] == rows
            parameter.register_hook(
                lambda grad, rows=rows: grad.clone().index_fill_(
                    0, torch.arange(rows, grad.shape[0]), 0
                )
            )
    step(never, never_optimizer, 3)
    step(grown, grown_optimizer, 3)
    for name, old in never.named_parameters():
        new = grown.get_parameter(name)
        torch.testing.assert_close(new[: old.shape[0]], old, atol=1e-6, rtol=0)
        for key in ("exp_avg", "exp_avg_sq"):
            kept = grown_optimizer.state[new][key][: old.shape[0]]
            torch.testing.assert_close(kept, never_optimizer.state[old][key], atol=1e-6, rtol=0)
            assert not grown_optimizer.state[new][key][old.shape[0] :].any()
        assert grown_optimizer.state[new]["step"] == never_optimizer.state[old]["step"] == 4


def test_the_optimizer_trains_the_new_parameters_and_forgets_the_old_ones():
    model = decoder()
    optimizer = adamw(model)
    step(model, optimizer, 0)
    grow(model, tokens=56, ffn_tokens=80, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}
    new = model.layers[0].ffn.key_tokens[40:].clone()
    step(model, optimizer, 1)
    assert (model.layers[0].ffn.key_tokens[40:] != new).any()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_moments_of_a_checkpoint_get_rows_of_zeros():
    moments = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    grown = grown_moments(moments, {"a": torch.empty(5, 3), "b": torch.empty(4)})
    assert torch.equal(grown["a"], torch.tensor([1.0, 1, 0, 0, 0])[:, None].expand(5, 3))
    assert torch.equal(grown["b"], moments["b"])
    for shape in ((1, 3), (2, 4)):
        with pytest.raises(ValueError, match=r"a of shape \[2, 3\]: cannot grow into"):
            grown_moments({"a": torch.ones(2, 3)}, {"a": torch.empty(shape)})


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"tokens": 23}, "tokens=23: must be at least 24, what layers.0.attention.query has"),
        ({"ffn_tokens": 8}, "ffn_tokens=8: must be at least 40"),
        ({"tokens": 26}, "output_tokens=26: must be at least 28"),
        ({"tokens": 24, "output_tokens": 28}, "must add parameter tokens to some layer"),
        ({}, "sizes: must add parameter tokens"),
    ],
)
def test_bad_sizes_are_named_and_change_nothing(sizes, line):
    model = decoder()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=line):
        grow(model, **sizes)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


def test_models_and_optimizers_that_cannot_grow_are_named():
    with pytest.raises(ValueError, match="Linear: has no Pattention that could grow"):
        grow(nn.Linear(2, 2), tokens=4)
    with pytest.raises(ValueError, match="activation='softmax': cannot grow"):
        grow(
            nn.Sequential(Pattention(2, 2, 2), Pattention(2, 2, 2, activation="softmax")), tokens=4
        )
    model = PattentionFeedForward(4, 4, 4)
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"does not hold .*key_tokens itself \(a sharded"):
        grow(model, ffn_tokens=8, optimizer=other)
    assert model.num_tokens == 4


def test_an_optimizer_whose_state_cannot_grow_is_refused_before_anything_changes() -> None:
    layer = Pattention(6, 5, 8)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"Adafactor keeps row_var \[8, 1\]"):
        grow(layer, tokens=12, optimizer=optimizer)
    assert layer.num_tokens == 8
