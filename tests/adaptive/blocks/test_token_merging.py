"""TokenMerging in a vision transformer: exact where it does nothing, counted, causal of nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adaptive import RoutingTape, TokenLayout, TokenMerging, TokenMergingConfig, checkpoint
from adaptive.blocks.token_merging import Kind, attention_received
from adaptive.flops import executed_flops, nominal_flops, planned_flops
from adaptive.models import VisionConfig, VisionTransformer
from adaptive.models.vision.layers import VisionLayer

KINDS = get_args(Kind)
SMALL = VisionConfig(
    image_size=12, channels=1, patch_size=2, num_classes=5, dim=32, num_layers=3, num_heads=4
)


def model_of(config: VisionConfig, **merging: object) -> VisionTransformer:
    torch.manual_seed(0)
    made = replace(config, token_merging=TokenMergingConfig(**merging) if merging else None)
    return VisionTransformer(made)


def images(batch: int = 3, seed: int = 0, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, 12, 12, generator=generator).to(**options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_an_amount_of_0_is_the_dense_model_bit_for_bit(kind: Kind, pooling: str) -> None:
    config = replace(SMALL, pooling=pooling)
    dense, merging = model_of(config), model_of(config, kind=kind, amount=0)
    torch.testing.assert_close(merging(images()), dense(images()), rtol=0, atol=0)


def test_duplicated_tokens_merge_to_the_same_outputs() -> None:
    # Merged, they are the tokens themselves, and attention counts each as often as it stood there.
    torch.manual_seed(1)
    layer = VisionLayer(32, 4, ffn_dim=64).double()
    x = torch.randn(6, 32, dtype=torch.float64)
    twice = x.repeat_interleave(2, 0)
    layout = TokenLayout.from_lengths([6, 6])
    plain = layer(twice, layout=layout)
    first = TokenMerging(layer, kind="adjacent", threshold=1 - 1e-9, amount=None)
    merged, grouping = first(twice, layout=layout)
    assert grouping is not None
    assert grouping.sizes.tolist() == [2.0] * 6
    torch.testing.assert_close(merged, plain[0::2], rtol=0, atol=1e-12)
    # And the next layer, over groups with their sizes, is that over all tokens.
    next_layer = TokenMerging(VisionLayer(32, 4, ffn_dim=64).double(), amount=0)
    out, _ = next_layer(merged, layout=grouping.layout, sizes=grouping.sizes.double())
    torch.testing.assert_close(
        out, next_layer.layer(plain, layout=layout)[0::2], rtol=0, atol=1e-12
    )
    without = TokenMerging(next_layer.layer, amount=0, proportional=False)
    sizes = torch.tensor([2.0, 1, 3, 1, 1, 1], dtype=torch.float64)
    one, other = (
        block(merged, layout=grouping.layout, sizes=sizes)[0] for block in (next_layer, without)
    )
    assert (one - other).abs().max() > 1e-3  # the trap: attention without sizes


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_always_sum_to_the_tokens_and_the_class_token_stays(kind: Kind) -> None:
    model = model_of(SMALL, kind=kind, amount=6)
    hidden, grouping = model.features(images())
    assert grouping.groups == 3 * (37 - 18) or kind in ("mctf", "random")
    assert hidden.shape[0] == grouping.groups < 3 * 37
    assert float(grouping.sizes.sum()) == 3 * 37
    first = grouping.cu_seqlens[:-1].long()
    assert (grouping.sizes[first] == 1).all()
    assert (grouping.positions[first] == 0).all()
    assert torch.equal(grouping.group[::37], first)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind: Kind) -> None:
    model = model_of(SMALL, kind=kind, amount=6)
    x = images(2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with RoutingTape(model) as tape:
            out = model(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    # The bias of merged keys is carried by heads 8 wider, which torch counts as products.
    widened = sum(
        2 * 2 * 8 * SMALL.num_heads * int((lengths.double() ** 2).sum())
        for lengths in (record.executed_lengths for record in tape.records[:-1])
    )
    assert int(executed_flops(model, tape.records, 2, 37)) == forward - widened
    backward = int(executed_flops(model, tape.records, 2, 37, backward=True))
    assert backward == counter.get_total_flops() - 3 * widened
    if kind not in ("mctf", "random"):
        assert planned_flops(model, 2, 37) == forward - widened
    assert forward - widened < nominal_flops(model, 2, 37) == planned_flops(model_of(SMALL), 2, 37)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random"])
def test_a_batch_is_each_alone(kind: Kind) -> None:
    model = model_of(SMALL, kind=kind, amount=0.2).double()
    x = images(dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-13)


def test_thresholds_leave_sequences_of_different_lengths() -> None:
    model = model_of(SMALL, kind="bsm", amount=None, threshold=0.8).double()
    x = images(dtype=torch.float64)
    with RoutingTape(model) as tape:
        out = model(x)
    lengths = tape.records[0].executed_lengths
    assert lengths.unique().numel() > 1
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_repeats_the_matching(kind: Kind) -> None:
    model = model_of(SMALL, kind=kind, amount=6)

    class Recomputed(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = layer

    def run(recompute: bool) -> list[Tensor]:
        torch.manual_seed(5)
        x, layout = model._embed(images())
        sizes = None
        for layer in model.layers:
            call = (lambda *a, layer=layer, **k: checkpoint(layer, *a, **k)) if recompute else layer
            x, grouping = call(x, layout=layout, sizes=sizes)
            layout, sizes = grouping.layout, grouping.sizes
        return list(torch.autograd.grad(x.square().sum(), list(model.layers.parameters())))

    for one, other in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_attention_received_is_the_mean_of_the_weights() -> None:
    q, k = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    for lengths in ([9], [4, 5], [3, 3, 3]):
        layout = TokenLayout.from_lengths(lengths)
        received, expected = attention_received(q, k, layout), []
        for rows in torch.arange(9).split(lengths):
            scores = torch.einsum("qhc,khc->hqk", q[rows], k[rows]) / 8**0.5
            expected.append(scores.softmax(-1).mean(1).t())
        torch.testing.assert_close(received, torch.cat(expected), rtol=0, atol=1e-15)


def test_weights_load_whether_layers_merge_or_not() -> None:
    dense, merging = model_of(SMALL), model_of(SMALL, kind="bsm", amount=0)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    merging.load_state_dict(dense.state_dict())
    assert torch.equal(merging(images()), dense(images()))
    back = model_of(SMALL)
    back.load_state_dict(merging.state_dict())
    assert torch.equal(back(images()), dense(images()))


def test_amounts_over_depth() -> None:
    def amounts(**options: object) -> list:
        return TokenMergingConfig(**options).amounts(4)

    assert amounts(amount=8) == [8, 8, 8, 8]
    assert amounts(amount=6, inflection=1.0) == [0, 4, 8, 12]
    assert amounts(amount=6, inflection=-1.0) == [12, 8, 4, 0]
    assert amounts(amount=None, threshold=0.8) == [None] * 4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "tome"}, "kind='tome': must be one of bsm, pitome"),
        ({"amount": None}, "amount and threshold: give at least one of them"),
        ({"amount": -1}, "amount=-1: must be 0 or more tokens"),
        ({"amount": 1.5}, r"amount=1.5: must be a count of tokens, or a share in \[0, 1\)"),
        ({"kind": "pitome", "amount": None, "threshold": 0.5}, "amount=None: must be given"),
        ({"kind": "mctf", "threshold": 0.5}, "threshold=0.5: must be None with kind=mctf"),
        ({"inflection": 2.0}, r"inflection=2.0: must be in \[-1, 1\]"),
        ({"margin": 1.0}, "margin=1.0: must be below 1"),
    ],
)
def test_bad_settings_are_one_line(options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        TokenMergingConfig(**options)
