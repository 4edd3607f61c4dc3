"""The one door to megatron-core, and what lets it run where there is no CUDA.

Nothing else in this repository imports `megatron`. It is optional: runs that only split the batch
never come here.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


def core(name: str) -> ModuleType:
    """The module `megatron.core.<name>`, ready to run on this machine.

    Raises:
        ImportError: megatron-core is not installed.
    """
    with warnings.catch_warnings():
        # It warns of every optional CUDA package that is missing.
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(f"megatron.core.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("megatron"):
                raise
            raise ImportError(
                "tensor, context and expert parallelism: need megatron-core==0.16.1 "
                "(pip install megatron-core)"
            ) from error
        if not torch.cuda.is_available():
            _run_without_cuda()
    return module


def _run_without_cuda() -> None:
    """What megatron-core asks of CUDA, answered for the CPU. Each line has a test."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    # Its collectives allocate their results on `torch.cuda.current_device()`.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # Its RNG tracker forks the generator that dropout and initialisation draw from.
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


@dataclass(frozen=True)
class Groups:
    """The process groups of this rank; every one is real, even those of one rank."""

    data: dist.ProcessGroup
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    batch: dist.ProcessGroup
    tensor_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup


def initialize(*, tensor: int, context: int, expert: int) -> Groups:
    """Make megatron's global `parallel_state` anew and return this rank's groups.

    Rank order, fastest first: tensor, context, data; experts are spread over context x data,
    fastest first, and split over the tensor ranks as everything else is.
    """
    state = core("parallel_state")
    if state.is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        create_gloo_process_groups=False,
    )
    return Groups(
        data=state.get_data_parallel_group(),
        tensor=state.get_tensor_model_parallel_group(),
        context=state.get_context_parallel_group(),
        batch=state.get_data_parallel_group(with_context_parallel=True),
        tensor_context=state.get_tensor_and_context_parallel_group(),
        expert=state.get_expert_model_parallel_group(),
        expert_data=state.get_expert_data_parallel_group(),
    )


def seed(value: int) -> None:
    """Seed megatron's RNG tracker: dropout inside split regions differs between tensor ranks."""
    random = core("tensor_parallel.random")
    if torch.cuda.is_available():
        random.model_parallel_cuda_manual_seed(value)
        return
    state = core("parallel_state")
    rank = state.get_tensor_model_parallel_rank()
    expert = state.get_expert_model_parallel_rank()
    offset = 2718  # megatron's own, so that its seeds are those of a CUDA run
    seeds = {
        "data-parallel-rng": value,
        "model-parallel-rng": value + offset + rank,
        "expert-parallel-rng": value + offset + 1024 + 100 * expert + rank,
    }
    torch.manual_seed(value)
    states = {name: torch.Generator().manual_seed(s).get_state() for name, s in seeds.items()}
    # `add`, which would do this, seeds CUDA.
    random.get_cuda_rng_tracker().set_states(states)


def fork_rng() -> Any:
    """A context in which random numbers differ between tensor ranks, then continue as before."""
    return core("tensor_parallel.random").get_cuda_rng_tracker().fork()


def indexed_dataset(prefix: Path) -> Any:
    """Megatron's reader of `prefix`.bin and .idx, memory-mapped.

    Raises:
        ImportError: megatron-core is not installed.
    """
    return core("datasets.indexed_dataset").IndexedDataset(str(prefix), mmap=True)
