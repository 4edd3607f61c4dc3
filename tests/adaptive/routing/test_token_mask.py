"""Masks of valid tokens: what they may be, the same for every block and model."""

from typing import Any

import pytest
import torch
from torch import nn

from adaptive import (
    MixtureOfDepths,
    MixtureOfExperts,
    SizedFeedForward,
    SkipLayer,
    SparseDenseFusion,
    TokenLayout,
)
from adaptive.models import Decoder, DecoderConfig

BLOCKS = {
    "mixture_of_depths": lambda: MixtureOfDepths(nn.Linear(8, 8), 8, capacity=0.5),
    "skip_layer": lambda: SkipLayer(nn.Linear(8, 8), 8, keys="executing"),
    "mixture_of_experts": lambda: MixtureOfExperts(8, 16, 4),
    "sized_feed_forward": lambda: SizedFeedForward(8, 16),
    "sparse_dense_fusion": lambda: SparseDenseFusion([], [nn.Linear(8, 8)], [], 8),
    "decoder": lambda: Decoder(DecoderConfig(vocab_size=16, dim=8, num_layers=1, num_heads=2)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_floating_mask_is_refused_and_integers_are_bool(name: str) -> None:
    """An additive mask, 0 and -inf, would be read as its opposite."""
    torch.manual_seed(0)
    module: Any = BLOCKS[name]().eval()
    inputs = torch.arange(12).view(2, 6) if name == "decoder" else torch.randn(2, 6, 8)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4:] = False
    additive = torch.zeros(2, 6).masked_fill(~valid, -torch.inf)
    with pytest.raises(ValueError, match="token_mask of dtype float32: must be bool, False at pad"):
        module(inputs, token_mask=additive)
    expected = module(inputs, token_mask=valid)
    torch.testing.assert_close(module(inputs, token_mask=valid.long()), expected, rtol=0, atol=0)


def test_a_mask_of_packed_tokens_may_be_of_integers_too() -> None:
    torch.manual_seed(0)
    module = BLOCKS["mixture_of_depths"]()
    hidden, layout = torch.randn(9, 8), TokenLayout.from_lengths([5, 4])
    valid = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1])
    expected = module(hidden, layout=layout, token_mask=valid.bool())
    assert torch.equal(module(hidden, layout=layout, token_mask=valid), expected)
