"""Every line of `_run_without_cuda` is needed and does what it says."""

from __future__ import annotations

import pytest
import torch

from parallel import megatron
from parallel.mesh import Mesh
from tests.ranks import run_ranks

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")


def _gather() -> list[float]:
    mesh = Mesh.create(tensor=2)
    mappings = megatron.core("tensor_parallel.mappings")
    own = torch.full((1, 2), float(mesh.tensor_rank))
    return mappings.gather_from_sequence_parallel_region(own).flatten().tolist()


@needs_no_cuda
def test_collectives_of_megatron_allocate_on_the_cpu() -> None:
    assert run_ranks(_gather, 2) == [[0.0, 0.0, 1.0, 1.0]] * 2


def _draws() -> tuple[list[float], list[float], list[float]]:
    Mesh.create(tensor=2)
    megatron.seed(7)
    with megatron.fork_rng():
        inside = torch.rand(3)
    outside = torch.rand(3)
    with megatron.fork_rng():
        further = torch.rand(3)
    return inside.tolist(), outside.tolist(), further.tolist()


@needs_no_cuda
def test_forked_generator_differs_between_tensor_ranks_and_the_other_does_not() -> None:
    (inside_0, outside_0, further_0), (inside_1, outside_1, further_1) = run_ranks(_draws, 2)
    assert outside_0 == outside_1
    assert inside_0 != inside_1
    # The state that a fork leaves is the state that the next one resumes from.
    assert further_0 != inside_0
    assert further_1 != inside_1
    torch.manual_seed(7)
    assert outside_0 == torch.rand(3).tolist()
