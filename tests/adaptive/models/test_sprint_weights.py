"""The official naming tells a model's function, or is not written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive.models import DiffusionConfig, DiffusionTransformer
from adaptive.models.weights.sprint import from_sprint_state_dict, sprint_state_dict
from parallel.mesh import Mesh


def model_of(**changes: Any) -> DiffusionTransformer:
    """A tiny model whose blocks do something: adaLN-Zero starts as the identity."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "channels": 3, "dim": 16, "num_heads": 2, "num_classes": 4}
    config = DiffusionConfig(**{**sizes, "middle_depth": 2, **changes})
    model = DiffusionTransformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_token": "learnt", "ffn": "swiglu", "ffn_dim": 24},
        {"qk_norm": False, "encoder_depth": 1},
        # 3x3 tokens have no 2x2 cells: the model was trained on all of them.
        {"image_size": 6, "keep": 1.0},
    ],
)
def test_a_model_comes_back_as_the_same_function(changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    size = model.config.image_size
    again = from_sprint_state_dict(
        sprint_state_dict(model), num_heads=2, image_size=size, patch_size=2
    ).eval()
    inputs = (torch.randn(2, 3, size, size), torch.rand(2), torch.tensor([0, 3]))
    torch.testing.assert_close(again(*inputs), model(*inputs), atol=0, rtol=0)
    guided, wanted = (m.guided(*inputs, scale=2.0) for m in (again, model))
    torch.testing.assert_close(guided, wanted, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"paths": "sparse"}, "paths=sparse: must be both"),
        ({"paths": "dense", "middle_depth": 0}, "paths=dense: must be both"),
        ({"rope_base": 100.0}, "rope_base=100.0: must be 10000.0"),
    ],
)
def test_what_the_names_cannot_tell_is_not_written(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        sprint_state_dict(model_of(**changes))


def test_a_part_of_a_model_is_not_written() -> None:
    config = DiffusionConfig(image_size=8, dim=16, num_heads=2)
    model = DiffusionTransformer(config, mesh=Mesh(tensor=2))
    with pytest.raises(ValueError, match="this rank holds a part of the weights"):
        sprint_state_dict(model)
