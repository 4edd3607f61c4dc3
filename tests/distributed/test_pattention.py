"""Pattention split over tensor ranks: the norm and the choice span all parameter tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive import Pattention
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.growth import grow
from adaptive.models import Decoder
from adaptive.routing.gumbel import GumbelSchedule
from parallel.mesh import Mesh
from parallel.parity import check_on_ranks
from parallel.tensor import enter_tensor_region, leave_tensor_region
from tests.distributed.subjects import PATTENTION, TOKENFORMER, LanguageModel
from tests.ranks import run_ranks

Result = dict[str, Tensor]
IN, OUT, COUNT, TOKENS = 6, 8, 12, 9


def inputs(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(TOKENS, width, generator=generator, dtype=torch.float64),
        torch.randn(TOKENS, OUT, generator=generator, dtype=torch.float64),
    )


def layer(mesh: Mesh, **options: Any) -> Pattention:
    torch.manual_seed(3)
    built = Pattention(IN, OUT, COUNT, mesh=mesh, std=0.5, scale=2.0, **options)
    return built.double()


def run_block(cases: list[dict[str, Any]], tensor: int) -> list[Result]:
    """Each case forward and backward on this rank of a tensor group."""
    mesh = Mesh.create(tensor=tensor)
    results = []
    for options in cases:
        block = layer(mesh, **options)
        x, grad = inputs(IN)
        x.requires_grad_()
        block(x).backward(grad)
        y = block(x).detach()
        results.append({"y": y, "x": x.grad, **{n: p.grad for n, p in block.named_parameters()}})
    return results


CASES = [
    {"activation": activation, "split": split, "save_memory": save_memory, "top_k": top_k}
    for activation in ("l2_norm_gelu", "gelu_l2_norm", "softmax")
    for split in ("tokens", "channels")
    for save_memory, top_k in ((False, None), (True, None), (False, 5))
]


def test_ranks_agree_with_one_rank() -> None:
    alone = run_ranks(run_block, 1, CASES, 1)[0]
    both = run_ranks(run_block, 2, CASES, 2)
    for index, options in enumerate(CASES):
        whole, parts = alone[index], [rank[index] for rank in both]
        dim = 0 if options["split"] == "tokens" else 1
        keys = [part["key_tokens"] for part in parts]
        found = {
            "value_tokens": torch.cat([part["value_tokens"] for part in parts], dim),
            "key_tokens": torch.cat(keys) if dim == 0 else keys[0],
            "y": parts[0]["y"],
            "x": parts[0]["x"],
        }
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, whole[name], msg=lambda m, o=options, n=name: f"{o} {n}: {m}"
            )
        for name in ("y", "x"):
            assert torch.equal(parts[0][name], parts[1][name])
        if dim == 1:
            assert torch.equal(keys[0], keys[1])


def local_norm(tensor: int) -> float:
    """What a norm over this rank's own parameter tokens would make of the outputs."""
    mesh = Mesh.create(tensor=tensor)
    block = layer(mesh)
    x, _ = inputs(IN)
    scores = x @ block.key_tokens.T
    local = F.gelu(2.0 * F.normalize(scores, dim=-1)) @ block.value_tokens
    torch.distributed.all_reduce(local)
    return float((local - block(x)).detach().abs().max())


def test_the_norm_spans_the_parameter_tokens_of_all_ranks() -> None:
    """Trap: a rank that normalises over its own tokens only computes another function."""
    assert run_ranks(local_norm, 2, 2)[0] > 0.1


def run_roles(split: str) -> Result:
    """Projections in and out of a tensor region, as attention uses them."""
    mesh = Mesh.create(tensor=torch.distributed.get_world_size())
    first = layer(mesh, role="input", split=split)
    torch.manual_seed(4)
    second = Pattention(OUT, OUT, COUNT, mesh=mesh, std=0.5, role="output", split=split).double()
    x, grad = inputs(IN)
    x.requires_grad_()
    # Squared in between: each rank's own channels only, as heads are.
    split_T = first(enter_tensor_region(x, mesh)).square()
    y = leave_tensor_region(second(split_T), mesh)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, "width": torch.tensor(split_T.shape[1])}


@pytest.mark.parametrize("split", ["tokens", "channels"])
def test_projections_split_and_join_like_linear_layers(split: str) -> None:
    whole = run_ranks(run_roles, 1, split)[0]
    for part in run_ranks(run_roles, 2, split):
        assert int(part["width"]) == OUT // 2
        for name in ("y", "x"):
            torch.testing.assert_close(part[name], whole[name], msg=lambda m, n=name: f"{n}: {m}")


def grow_on_ranks(split: str) -> tuple[float, dict[str, list[int]], float]:
    mesh = Mesh.create(tensor=2)
    torch.manual_seed(0)
    pattention = replace(PATTENTION, split=split)
    model = Decoder(replace(TOKENFORMER, pattention=pattention), mesh=mesh)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    before = model(ids).detach()
    torch.manual_seed(5)
    grow(model, tokens=48, ffn_tokens=96)
    change = float((model(ids) - before).detach().abs().max())
    parameters = dict(model.layers[0].ffn.named_parameters())
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    marked = all(p.tensor_model_parallel for n, p in parameters.items() if n == "value_tokens")
    return change, shapes, float(model.layers[0].ffn.scale) * marked


@pytest.mark.parametrize("split", ["tokens", "channels"])
def test_a_split_model_grows_without_changing(split: str) -> None:
    for change, shapes, scale in run_ranks(grow_on_ranks, 2, split):
        assert change <= 1e-5
        assert scale == math.sqrt(64)
        tokens = {"key_tokens": [48, 32], "value_tokens": [48, 32]}
        channels = {"key_tokens": [96, 32], "value_tokens": [96, 16]}
        assert shapes == (tokens if split == "tokens" else channels)


def bad_sizes() -> list[str]:
    mesh = Mesh.create(tensor=2)
    lines = []
    for make in (
        lambda: Pattention(4, 4, 5, mesh=mesh),
        lambda: Pattention(4, 5, 4, mesh=mesh, split="channels"),
        lambda: Pattention(4, 4, 4, mesh=mesh).grow(3),
        lambda: grow(Pattention(4, 4, 4, mesh=mesh), tokens=7),
    ):
        with pytest.raises(ValueError, match="must be a multiple of tensor=2") as caught:
            make()
        lines.append(str(caught.value).split(":")[0])
    return lines


def test_sizes_that_the_tensor_degree_does_not_divide_are_named() -> None:
    expected = ["num_tokens=5", "out_features=5", "extra_tokens=3", "tokens=7"]
    assert run_ranks(bad_sizes, 2)[0] == expected


ROUTED = {
    "mixture_of_depths": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.25)},
    "skip_layer": {
        "skip_layer": SkipLayerConfig(schedule=GumbelSchedule(noise=0.0), density_over="model")
    },
    "recompute": {"recompute": True, "pattention": replace(PATTENTION, save_memory=True)},
    "top_k": {"pattention": replace(PATTENTION, top_k=20, ffn_top_k=40)},
    "gelu_l2_norm": {"pattention": replace(PATTENTION, activation="gelu_l2_norm")},
}


def check_routed(families: list[str]) -> list[str]:
    tables = []
    for family in families:
        config = replace(TOKENFORMER, **{"pattention": PATTENTION, **ROUTED[family]})
        degrees = {"tensor": 2, "sequence_parallel": True}
        reports = check_on_ranks(LanguageModel(config), [degrees])
        tables += [f"{family}: {r.table()}" for r in reports if not r.ok]
    return tables


def test_compositions_agree_with_one_rank() -> None:
    assert run_ranks(check_routed, 2, sorted(ROUTED), timeout=120)[0] == []
