"""The names and signatures that users rely on: docs/architecture.md, "Public names"."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adaptive
from adaptive import (
    HypersphericalRouter,
    LinearRouter,
    MixtureOfDepths,
    MixtureOfExperts,
    Pattention,
    RoutingTape,
    SkipLayer,
    SparseDenseFusion,
)
from adaptive.flops import executed_flops, planned_flops
from adaptive.growth import grow
from adaptive.models import DiffusionTransformer
from adaptive.models.weights.sprint import from_sprint_state_dict
from adaptive.models.weights.tokenformer import from_tokenformer_state_dict
from parallel.mesh import Mesh
from parallel.parity import check_parity

SIGNATURES: list[tuple[Callable[..., Any], list[str], dict[str, Any]]] = [
    (LinearRouter, ["dim", "num_outputs"], {}),
    (
        HypersphericalRouter,
        ["dim", "num_experts"],
        {"projection_dim": None, "temperature": 0.3, "gate": "softmax"},
    ),
    (
        MixtureOfDepths,
        ["block", "dim"],
        {"capacity": 0.125, "weight": "raw", "predictor": "both", "mesh": None},
    ),
    (
        MixtureOfExperts,
        ["dim", "ffn_dim", "num_experts"],
        {
            "top_k": 2,
            "router": None,
            "capacity_factor": None,
            "activation": "swiglu",
            "mesh": None,
        },
    ),
    (
        SkipLayer,
        ["block", "dim"],
        {"density": 0.5, "keys": "all", "granularity": "block", "mesh": None},
    ),
    (
        Pattention,
        ["in_features", "out_features", "num_tokens"],
        {"activation": "l2_norm_gelu", "scale": None, "mesh": None},
    ),
    (SparseDenseFusion, ["encoder", "middle", "decoder", "dim"], {"path_drop": 0.1}),
    (MixtureOfExperts.from_mixtral_state_dict, ["weights"], {}),
    (from_tokenformer_state_dict, ["weights"], {}),
    (from_sprint_state_dict, ["weights"], {}),
    (
        Mesh.create,
        [],
        {"tensor": 1, "context": 1, "expert": 1, "sequence_parallel": False},
    ),
]


@pytest.mark.parametrize(
    ("function", "positional", "keywords"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", "")
)
def test_signatures_are_as_documented(
    function: Callable[..., Any], positional: list[str], keywords: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    by_place = [
        name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert by_place[: len(positional)] == positional
    for name, default in keywords.items():
        assert parameters[name].default == default, name


def test_every_public_name_exists_and_is_documented() -> None:
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    (listed,) = re.findall(r"from adaptive import \((.*?)\)", page.read_text(), re.DOTALL)
    assert sorted(re.findall(r"\w+", listed)) == adaptive.__all__
    for name in adaptive.__all__:
        assert inspect.getdoc(getattr(adaptive, name)), name
    for function in (executed_flops, planned_flops, grow, check_parity, RoutingTape):
        assert inspect.getdoc(function), function
    for name in ("grow", "key_tokens", "value_tokens"):
        assert hasattr(Pattention(4, 4, 2), name)
    assert callable(DiffusionTransformer.guided)


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'MixtureOfWidths'"):
        _ = adaptive.MixtureOfWidths
