"""Learned budgets: what training masks is what evaluation drops, and the price is the ledger's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive import LearnedBudget, RoutingTape, TokenLayout
from adaptive.blocks.learned_budget import LearnedBudgetConfig
from adaptive.flops import executed_flops, nominal_flops
from adaptive.models import VisionConfig, VisionTransformer
from adaptive.ops.masked_attention import masked_attention
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.budgets import expected_counts, survival

SMALL = VisionConfig(
    image_size=12, channels=1, patch_size=2, num_classes=5, dim=32, num_layers=3, num_heads=4
)
KINDS = ("ltmp", "diffrate")


def make(
    kind: str = "ltmp", *, config: VisionConfig = SMALL, **options: object
) -> VisionTransformer:
    """A float64 model that drops and merges in every layer, of thresholds and counts in between."""
    torch.manual_seed(0)
    method = LearnedBudgetConfig(kind=kind, **options)  # type: ignore[arg-type]
    model = VisionTransformer(replace(config, learned_budget=method)).double()
    for index, layer in enumerate(model.layers):
        if kind == "ltmp":
            layer.limits.data.copy_(torch.tensor([0.75, 0.024 + 0.004 * index]))
        else:
            counts = torch.tensor([[28 - 7 * index], [33 - 7 * index]])
            distance = (torch.arange(1, config.tokens + 1) - counts).abs()
            layer.limits.data.copy_(-3.0 * distance)
    return model


def images(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 12, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_training_computes_what_evaluation_does(kind: str, pooling: str) -> None:
    # Traps: LTMP averages attention over dropped queries too; DiffRate clamps sizes in training.
    model = make(kind, config=replace(SMALL, pooling=pooling))
    with RoutingTape(model) as trained:
        masked = model.train()(images())
    with RoutingTape(model) as evaluated:
        hard = model.eval()(images())
    torch.testing.assert_close(masked, hard, rtol=0, atol=1e-12)
    for soft, record in zip(trained.records, evaluated.records, strict=True):
        kept = float(record.executed) / (3 * model.config.tokens)
        assert float(soft.statistics["kept"]) == pytest.approx(kept)
        assert int(soft.executed) == 3 * model.config.tokens  # what training computes
    left = [int(record.executed) for record in evaluated.records]
    assert 3 * model.config.tokens > left[0] > left[1] > left[2] >= 3
    if kind == "ltmp":
        assert evaluated.records[0].executed_lengths.unique().numel() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_everything_is_the_dense_model_bit_for_bit(kind: str) -> None:
    model = make(kind).eval()
    for layer in model.layers:
        everything = torch.tensor([1.0, -1.0])
        if kind == "diffrate":
            everything = torch.zeros(2, 37).index_fill(1, torch.tensor([36]), 30.0)
        layer.limits.data.copy_(everything)
    dense = VisionTransformer(SMALL).double()
    weights = model.state_dict().items()
    dense.load_state_dict({n: w for n, w in weights if "layers." not in n or ".layer." in n})
    torch.testing.assert_close(model(images()), dense(images()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_each_alone_and_the_class_token_stays(kind: str) -> None:
    model = make(kind).eval()
    x = images()
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-13)
    _, grouping = model.features(x)
    firsts = grouping.cu_seqlens[:-1].long()
    assert (grouping.positions[firsts] == 0).all()
    assert (grouping.sizes[firsts] == 1).all()
    # What is left stands for as many tokens as are in a group: dropped ones are in none.
    assert float(grouping.sizes.sum()) == int((grouping.group >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_no_sequence_is_emptied(kind: str) -> None:
    model = make(kind, config=replace(SMALL, pooling="mean"))
    for layer in model.layers:
        nothing = torch.tensor([-1.0, 9.0])
        if kind == "diffrate":
            nothing = torch.zeros(2, 36).index_fill(1, torch.tensor([0]), 30.0)
        layer.limits.data.copy_(nothing)
    assert model.train()(images()).isfinite().all()
    _, grouping = model.eval().features(images())
    assert grouping.cu_seqlens.diff().tolist() == [1, 1, 1]
    torch.testing.assert_close(model.train()(images()), model.eval()(images()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_operations_are_those_that_torch_counts(kind: str, training: bool) -> None:
    model = make(kind).train(training)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        RoutingTape(model) as tape,
    ):
        model(images())
    lengths = [record.executed_lengths for record in tape.records[:-1]]
    # The bias of merged keys travels in heads 8 wider, which torch counts as products.
    widened = sum(2 * 2 * 8 * 4 * int((n.double() ** 2).sum()) for n in lengths)
    found = counter.get_total_flops() - (0 if training else widened)
    assert int(executed_flops(model, tape.records, 3, 37)) == found


@pytest.mark.parametrize("kind", KINDS)
def test_the_price_is_of_the_operations_that_evaluation_executes(kind: str) -> None:
    # Trap: LTMP squares a mean of the batch; attention costs the mean of squares.
    model = make(kind)
    with RoutingTape(model) as tape:
        model.train()(images())
    told = sum(float(record.statistics["share_of_operations"]) for record in tape.records) / 3
    with RoutingTape(model) as evaluated:
        model.eval()(images())
    embedding = 2 * 3 * (4 * 32 * 36 + 32 * 5)  # patches and head, in no layer
    executed = int(executed_flops(model, evaluated.records, 3, 37)) - embedding
    assert told == pytest.approx(executed / (nominal_flops(model, 3, 37) - embedding), rel=1e-6)
    error = told - 0.65
    assert tape.loss().item() == pytest.approx(10 * error**2, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_limit_has_a_gradient_from_task_and_price(kind: str) -> None:
    model = make(kind).train()
    with RoutingTape(model) as tape:
        task = model(images()).square().sum()
    for loss in (task, tape.loss()):
        for layer, grad in zip(
            model.layers,
            torch.autograd.grad(loss, [x.limits for x in model.layers], retain_graph=True),
            strict=True,
        ):
            # What the last layer leaves has no later layer to be a key of; its mean is by size.
            if loss is not task or layer is not model.layers[-1]:
                assert (
                    grad.flatten(1).abs().sum(-1) if kind == "diffrate" else grad
                ).abs().min() > 0


def test_a_masked_keys_gradient_is_that_of_counting_it() -> None:
    # Against the closed form: d out_q / d m_j = e^(a_qj) (v_j - out_q) / Z_q, where m_j = 0 too.
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 1, 4, dtype=torch.float64)
    mask = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    layout = TokenLayout.dense(1, 5)
    out = masked_attention(q, k, v, layout=layout, key_mask=mask)
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weight).sum(), mask)
    exponential = (q[:, 0] @ k[:, 0].t() / 2).exp()
    z = exponential @ mask.detach()
    plain = (exponential * mask.detach() / z[:, None]) @ v[:, 0]
    torch.testing.assert_close(out[:, 0], plain.detach())
    difference = v[None, :, 0] - plain[:, None]  # [queries, keys, h]
    expected = (exponential / z[:, None] * (difference * weight[:, :1]).sum(-1)).sum(0)
    torch.testing.assert_close(found, expected.detach())
    ones = torch.ones_like(mask)
    whole = masked_attention(q, k, v, layout=layout, key_mask=ones, key_bias=mask.detach())
    other = varlen_attention(q, k, v, queries=layout, causal=False, key_bias=mask.detach())
    torch.testing.assert_close(whole, other)


def test_a_sum_of_survival_is_the_expected_count() -> None:
    logits = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    chances = survival(logits)
    counts = (logits.softmax(-1) * torch.arange(1, 10)).sum(-1)
    torch.testing.assert_close(chances.sum(-1), counts)
    torch.testing.assert_close(chances[:, 0], torch.ones(2, dtype=torch.float64))
    assert expected_counts(chances).tolist() == counts.ceil().long().tolist()


def test_only_the_count_that_binds_is_pulled() -> None:
    # Trap: DiffRate's minimum sends the whole gradient to both counts.
    model = make("diffrate").train()
    first = model.layers[0]
    for row, count in enumerate((30, 12)):  # dropping leaves 12; merging would leave 30
        first.limits.data[row] = -3.0 * (torch.arange(1, 38) - count).abs()
    everyone = torch.ones(1, 37, dtype=torch.bool)
    metric, received = torch.randn(1, 37, 8).double(), torch.rand(1, 37).double()
    left = first._taken(first._match(metric, received, everyone), everyone)
    (grad,) = torch.autograd.grad((left.stays * left.keeps).sum(), first.limits)
    merging, dropping = grad.abs().sum(-1).tolist()
    assert dropping > 0.01 > 1e-6 > merging


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "tome"}, "kind='tome': must be one of ltmp, diffrate"),
        ({"target": 0.0}, "target=0.0: must be above 0 and at most 1"),
        ({"coefficient": -1.0}, "coefficient=-1.0: must be 0 or more"),
    ],
)
def test_bad_settings_are_one_line(options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        LearnedBudgetConfig(**options)
    assert LearnedBudget.kind == "learned_budget"
