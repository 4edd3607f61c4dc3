"""Dense layers distilled into Pattention: exact where theory says so, reported everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptive.blocks.pattention import Pattention, PattentionConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.convert.distillation import (
    DistillationConfig,
    distill,
    fit,
    relative_error,
    students_of_linear,
)

QUICK = DistillationConfig(max_tokens=1024, steps=0)


class Normed(nn.Module):
    """A linear layer behind a norm, with weights that differ by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 16))
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(F.rms_norm(x, (16,), self.weight))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_twice_the_width_reproduces_a_linear_layer_on_normed_inputs():
    """gelu(z) - gelu(-z) = z, and inputs of one length, once the norm's weights are undone."""
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        model.linear.bias.zero_()
    x = draw(600, 16)
    expected = model(x)
    reports = list(distill(model, [lambda: model(x)], students_of_linear(model), config=QUICK))
    assert [(r.name, r.kind, r.tokens) for r in reports] == [("linear", "Linear", 32)]
    assert reports[0].parameters_before == 170
    assert reports[0].parameters_after == 32 * 26
    # The weights of the norm are estimated from the data, with a ridge of 1e-4.
    assert reports[0].error < 0.01
    assert isinstance(model.linear, Pattention)
    assert relative_error(model, x, expected) < 0.01


def test_training_improves_what_the_closed_form_leaves():
    teacher = nn.Sequential(nn.Linear(12, 30), nn.SiLU(), nn.Linear(30, 8))
    x = F.rms_norm(draw(3000, 12), (12,))
    y = teacher(x).detach()
    student = Pattention(12, 8, 40)
    config = DistillationConfig(max_tokens=3000, steps=200)
    initial, error = fit(student, x, y, config=config)
    assert error < 0.8 * initial
    # Measured on tokens that it did not learn from.
    assert relative_error(student, x[:600], y[:600]) == pytest.approx(error)


def test_training_that_makes_it_worse_is_undone():
    x = F.rms_norm(draw(400, 12), (12,))
    y = x @ draw(12, 8, seed=1)
    student = Pattention(12, 8, 24)
    config = DistillationConfig(max_tokens=400, steps=5, learning_rate=100.0)
    initial, error = fit(student, x, y, config=config)
    assert error <= initial
    assert relative_error(student, x[:80], y[:80]) == pytest.approx(error)


def test_fewer_tokens_keep_the_directions_that_matter():
    """A map of rank 2 needs two pairs, wherever its directions point."""
    x = F.rms_norm(draw(2000, 16), (16,))
    low_rank = draw(16, 2, seed=1) @ draw(2, 8, seed=2)
    errors = {}
    for name, tokens in (("rank", 12), ("one pair", 2)):
        student = Pattention(16, 8, tokens)
        errors[name], _ = fit(student, x, x @ low_rank, config=QUICK)
    random = Pattention(16, 8, 12)
    nn.init.normal_(random.key_tokens)
    assert errors["rank"] < errors["one pair"]
    assert errors["rank"] < 0.6


def test_a_decoder_becomes_a_tokenformer():
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, init_std=0.1)
    dense = Decoder(config).eval()
    ids = torch.randint(0, 50, (16, 32))
    expected = dense(ids).detach()
    target = Decoder(replace(config, pattention=PattentionConfig(64, 128))).eval()
    students = {n: m for n, m in target.named_modules() if isinstance(m, Pattention)}
    quick = DistillationConfig(max_tokens=512, steps=30, layers_at_once=3)
    reports = list(distill(dense, [lambda: dense(ids)], students, config=quick))
    assert len(reports) == 2 * 5
    assert {r.kind for r in reports} == {"Linear", "SwiGLU"}
    assert all(r.error <= r.initial_error < 1 for r in reports)
    assert [r.name for r in reports] == list(students)
    # Far nearer than logits of another model would be; errors of layers add up.
    assert float((dense(ids) - expected).detach().norm() / expected.norm()) < 0.5
    dense.token_losses(ids, ids.roll(-1, 1)).mean().backward()
    assert all(s.key_tokens.grad is not None for s in students.values())


def test_bad_layers_are_named():
    model = Normed()
    x = draw(8, 16)

    def run(students, forwards=None):
        list(distill(model, forwards or [lambda: model(x)], students, config=QUICK))

    with pytest.raises(ValueError, match="other: is no layer of the model"):
        run({"other": Pattention(16, 10, 4)})
    alone = nn.Linear(16, 10)
    with pytest.raises(ValueError, match="the model itself: is no layer of the model"):
        list(distill(alone, [lambda: alone(x)], students_of_linear(alone), config=QUICK))
    with pytest.raises(ValueError, match="linear: maps 16 to 10 features, its successor 16 to 9"):
        run({"linear": Pattention(16, 9, 4)})
    with pytest.raises(ValueError, match="linear: saw no token"):
        run({"linear": Pattention(16, 10, 4)}, [lambda: None])
    with pytest.raises(ValueError, match="3 tokens: must be at least 5"):
        run({"linear": Pattention(16, 10, 4)}, [lambda: model(x[:3])])
    assert isinstance(model.linear, nn.Linear)
    with pytest.raises(ValueError, match="max_tokens=0: must be at least 1"):
        DistillationConfig(max_tokens=0)
