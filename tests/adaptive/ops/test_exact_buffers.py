"""What a cast of the whole model must not round."""

import pytest
import torch
from torch import nn

from adaptive import MixtureOfDepths, Pattention
from adaptive.models.diffusion.layers import AxialRotary
from adaptive.routing.balance import ExpertBias
from adaptive.routing.density import DensityController


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (MixtureOfDepths(nn.Linear(4, 4), 4), "threshold"),
        (Pattention(4, 4, 7), "scale"),
        (ExpertBias(4), "bias"),
        (DensityController(0.5), "price"),
        (AxialRotary(8, (3, 3)), "cos"),
    ],
)
def test_a_cast_of_the_model_rounds_no_such_buffer(module: nn.Module, name: str) -> None:
    buffer = getattr(module, name)
    exact = torch.full_like(buffer, 0.1234567)
    setattr(module, name, exact.clone())
    nn.Sequential(module).bfloat16().half()
    assert torch.equal(getattr(module, name), exact)
    assert getattr(module.float(), name).dtype == exact.dtype
    assert getattr(module.double(), name).dtype == torch.float64
    assert getattr(module.to("meta"), name).is_meta
