"""Traffic: counts what collectives send, as they are issued, forward and backward.

    with Traffic() as traffic:
        model(x).sum().backward()
    traffic.sent, traffic.by_operation()

It sees every collective that goes through torch.distributed, whoever issues it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Transfer:
    """One collective.

    Attributes:
        operation: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "broadcast".
        ranks: of its group.
        elements: of the tensor that this rank gives.
        sent: bytes that this rank sends, by the algorithm that sends least: a ring for
            reductions and gathers.
    """

    operation: str
    ranks: int
    elements: int
    sent: int


class Traffic(TorchDispatchMode):
    """Records a Transfer for every collective that this thread issues inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[Transfer] = []

    @property
    def sent(self) -> int:
        """Bytes that this rank sent."""
        return sum(t.sent for t in self.transfers)

    def by_operation(self) -> dict[str, int]:
        """Bytes sent by each kind of collective."""
        sent: Counter[str] = Counter()
        for transfer in self.transfers:
            sent[transfer.operation] += transfer.sent
        return dict(sent)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            transfer = _transfer(func._schema.name.partition("::")[2], args)
            if transfer is not None:
                self.transfers.append(transfer)
        return func(*args, **(kwargs or {}))


def _transfer(name: str, args: tuple[Any, ...]) -> Transfer | None:
    group = next((g for g in map(_group, args) if g is not None), None)
    ranks = 1 if group is None else group.size()
    given = args[1] if name in _GIVEN_SECOND else args[0]
    size, elements = _bytes(given), _elements(given)
    if name == "allreduce_":
        return Transfer("all_reduce", ranks, elements, 2 * size * (ranks - 1) // ranks)
    if name in ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"):
        return Transfer("reduce_scatter", ranks, elements, size * (ranks - 1) // ranks)
    if name in ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"):
        return Transfer("all_gather", ranks, elements, size * (ranks - 1))
    if name == "alltoall_base_":
        splits = args[4]
        kept = size // ranks
        if splits and group is not None:
            kept = size * splits[group.rank()] // max(sum(splits), 1)
        return Transfer("all_to_all", ranks, elements, size - kept)
    if name == "send":
        return Transfer("send", ranks, elements, size)
    if name == "broadcast_":
        return Transfer("broadcast", ranks, elements, size)
    return None


_GIVEN_SECOND = (
    "_reduce_scatter_base_",
    "reduce_scatter_",
    "reduce_scatter_tensor_coalesced_",
    "_allgather_base_",
    "allgather_",
    "allgather_into_tensor_coalesced_",
    "alltoall_base_",
)


def _group(argument: Any) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []


def _bytes(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(argument))


def _elements(argument: Any) -> int:
    return sum(t.numel() for t in _tensors(argument))
