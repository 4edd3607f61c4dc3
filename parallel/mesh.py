"""Mesh: sizes, ranks and groups of the axes that a model is split over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch.distributed as dist

ContextAttention = Literal["ulysses", "ring"]


@dataclass(frozen=True)
class Mesh:
    """How the ranks of a run share one model and one batch.

    Axes: `tensor` splits weights; `context` splits long sequences; `expert` splits experts;
    `data` splits the batch, and is what tensor and context leave of the world. Experts are
    spread over the data and context ranks. With `sequence_parallel`, tokens are also split
    between tensor ranks outside the split products.

    A group is None when its axis has size 1, and a collective over it is then the identity.

    Attributes:
        context_attention: how attention sees sequences that lie over context ranks: "ulysses"
            (all tokens and some heads, `parallel.context`) or "ring" (own tokens and all heads,
            `parallel.ring.attention`).
        shard_group: ranks over which the tokens of one pack lie, in rank order: context ranks, and
            under sequence parallelism the tensor ranks of each; None where each rank holds whole
            sequences.
        expert_data_group: ranks that hold the same experts (and the same slice of them).
        batch_group: data x context ranks: those that hold the same slice of the dense weights,
            and whose gradients are averaged.
        token_group: ranks whose tokens differ from this rank's: `batch_group`, or every rank
            under sequence parallelism. Sums over the tokens of the global batch span it.
        mpu: what DeepSpeed takes as `mpu=`; None where it needs none.
    """

    data: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    context_attention: ContextAttention = "ulysses"
    data_rank: int = 0
    tensor_rank: int = 0
    context_rank: int = 0
    expert_rank: int = 0
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    context_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None
    expert_data_group: dist.ProcessGroup | None = None
    batch_group: dist.ProcessGroup | None = None
    shard_group: dist.ProcessGroup | None = None
    token_group: dist.ProcessGroup | None = None
    mpu: ModelParallelUnit | None = None

    @staticmethod
    def single() -> Mesh:
        """One rank, no process group."""
        return Mesh()

    @staticmethod
    def create(
        tensor: int = 1,
        context: int = 1,
        expert: int = 1,
        sequence_parallel: bool = False,
        *,
        context_attention: ContextAttention = "ulysses",
        data: int | None = None,
    ) -> Mesh:
        """Split the world, whose process group must exist. A collective: every rank calls it.

        Consecutive ranks share a tensor group, then a context group, then a data group. Splitting
        anything but the batch needs megatron-core, whose `parallel_state` this initialises; the
        latest mesh is the one that megatron's own layers see.

        Args:
            tensor, context, expert: ranks of each axis.
            sequence_parallel: Megatron's; without an effect when `tensor` is 1.
            context_attention: "ulysses" or "ring"; without an effect when `context` is 1.
            data: asserted when given, since the world decides it.

        Raises:
            ValueError: if the degrees do not fit the world; names those that do.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        data = data_degree(world, tensor=tensor, context=context, expert=expert, data=data)
        check_context_attention(context_attention)
        everyone = dist.group.WORLD if world > 1 else None
        if tensor == context == expert == 1:
            return Mesh(
                data=data,
                data_rank=rank,
                data_group=everyone,
                expert_data_group=everyone,
                batch_group=everyone,
                token_group=everyone,
            )
        from parallel import megatron

        groups = megatron.initialize(tensor=tensor, context=context, expert=expert)
        sequence_parallel = sequence_parallel and tensor > 1
        batch = _none_if_single(groups.batch)
        shards = groups.tensor_context if sequence_parallel else groups.context
        return Mesh(
            data=data,
            tensor=tensor,
            context=context,
            expert=expert,
            sequence_parallel=sequence_parallel,
            context_attention=context_attention,
            data_rank=dist.get_rank(groups.data),
            tensor_rank=dist.get_rank(groups.tensor),
            context_rank=dist.get_rank(groups.context),
            expert_rank=dist.get_rank(groups.expert),
            data_group=_none_if_single(groups.data),
            tensor_group=_none_if_single(groups.tensor),
            context_group=_none_if_single(groups.context),
            expert_group=_none_if_single(groups.expert),
            expert_data_group=_none_if_single(groups.expert_data),
            batch_group=batch,
            shard_group=_none_if_single(shards),
            token_group=everyone if sequence_parallel else batch,
            mpu=None if tensor == 1 else ModelParallelUnit(groups.tensor, groups.batch),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        """Itself: models that hold a mesh are copied, process groups cannot be."""
        return self

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.data * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks over which an engine averages the gradients of dense weights: data x context."""
        return self.data * self.context

    @property
    def shards(self) -> int:
        """Size of `shard_group`."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    @property
    def shard_rank(self) -> int:
        if self.sequence_parallel:
            return self.context_rank * self.tensor + self.tensor_rank
        return self.context_rank

    def tensor_sizes(self, shard_sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Of the rows of every shard, those of this rank's tensor group, rank by rank."""
        first = self.context_rank * self.tensor
        return shard_sizes[first : first + self.tensor]

    def context_sizes(self, shard_sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Of the rows of every shard, those of each context rank, its tensor ranks together."""
        each = self.shards // self.context
        starts = range(0, len(shard_sizes), each)
        return tuple(sum(shard_sizes[start : start + each]) for start in starts)

    def without_context(self) -> Mesh:
        """As it looks within one context rank: `shard_group` is then the tensor ranks alone."""
        if self.context == 1:
            return self
        shards = self.tensor_group if self.sequence_parallel else None
        return replace(self, context=1, context_rank=0, context_group=None, shard_group=shards)

    @property
    def ring(self) -> bool:
        """Whether attention over context ranks goes round a ring."""
        return self.context > 1 and self.context_attention == "ring"

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts: data x context / expert."""
        return self.replicas // self.expert


class ModelParallelUnit:
    """The mesh as DeepSpeed's `mpu`: weights are split over `tensor`, replicated over `batch`.

    To DeepSpeed, every rank that holds the same slice of the dense weights is a data-parallel
    rank, context ranks included: their gradients are averaged and ZeRO shards over them.
    """

    def __init__(self, tensor: dist.ProcessGroup, batch: dist.ProcessGroup) -> None:
        self._tensor, self._batch = tensor, batch

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._tensor, 0)

    # DeepSpeed asks for "model parallel" where there are no pipeline stages.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._batch

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._batch)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._batch)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._batch)

    def get_data_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self._batch, 0)

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def check_context_attention(name: str) -> None:
    """Raise ValueError unless it is a way of context parallelism."""
    if name not in get_args(ContextAttention):
        raise ValueError(f"context_attention={name!r}: must be ulysses or ring")


def data_degree(
    world: int, *, tensor: int = 1, context: int = 1, expert: int = 1, data: int | None = None
) -> int:
    """The data degree that the other axes leave of `world` ranks.

    Raises:
        ValueError: if the degrees do not fit; names those that do.
    """
    for name, degree in (("tensor", tensor), ("context", context), ("expert", expert)):
        if degree < 1:
            raise ValueError(f"{name}={degree}: must be at least 1")
    if world % tensor:
        raise ValueError(
            f"tensor={tensor}: must divide the {world} ranks; may be {_divisors(world)}"
        )
    if world // tensor % context:
        raise ValueError(
            f"context={context}: must divide world / tensor = {world // tensor} ranks; "
            f"may be {_divisors(world // tensor)}"
        )
    rest = world // (tensor * context)
    if data is not None and data != rest:
        raise ValueError(
            f"data={data}: must be {rest}, as data x tensor x context is {world} ranks"
        )
    if rest * context % expert:
        raise ValueError(
            f"expert={expert}: must divide data x context = {rest * context} ranks; "
            f"may be {_divisors(rest * context)}"
        )
    return rest


def _divisors(number: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(str(d) for d in sorted({*small, *(number // d for d in small)}))


def _none_if_single(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return None if dist.get_world_size(group) == 1 else group
