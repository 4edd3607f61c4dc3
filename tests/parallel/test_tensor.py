"""Split layers where there is nothing to compute with: meta devices and fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig, DiffusionConfig, DiffusionTransformer

CONFIG = DecoderConfig(
    vocab_size=16, dim=16, num_layers=2, num_heads=2, mixture_of_depths=MixtureOfDepthsConfig(0.5)
)


@pytest.mark.parametrize(
    "make", [lambda: Decoder(CONFIG), lambda: DiffusionTransformer(DiffusionConfig())]
)
def test_a_model_is_built_and_trained_of_fake_tensors(make) -> None:
    with FakeTensorMode(), torch.device("cpu"):
        model = make()
        assert all(isinstance(p, FakeTensor) for p in model.parameters())
        if isinstance(model, Decoder):
            logits = model(torch.zeros(2, 8, dtype=torch.long))
            assert logits.shape == (2, 8, 16)
            logits.sum().backward()
            assert all(p.grad is not None for p in model.output.parameters())


def test_a_model_is_built_on_the_default_device() -> None:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    assert {p.device.type for p in model.parameters()} == {"meta"}
