"""Random numbers for tokens that several ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


def draw_own_rows(
    draw: Callable[[int], Tensor],
    rows: int,
    mesh: Mesh | None = None,
    shard_sizes: tuple[int, ...] | None = None,
) -> Tensor:
    """This rank's rows of `draw(T)`, T being the tokens of all ranks that share the sequences.

    Ranks that share sequences are seeded alike, by the rows of the batch: if each drew for its own
    tokens, token i of every shard would get the same number. So each draws for all and takes its
    own, which is what one rank would have drawn for them. Ranks of a tensor group get the same
    draw, whatever their generators: a token that executes on one of them and skips on another
    would hang the group or corrupt it. A collective over the tensor group.

    Args:
        draw: number of tokens to a tensor with that many rows, by torch's default generator.
        rows: tokens of this rank.
        mesh: how the ranks share the model; one rank by default.
        shard_sizes: tokens of each shard; None: all have `rows`.
    """
    if mesh is None:
        return _of_batch(draw, rows)
    sizes = (rows,) * mesh.shards if shard_sizes is None else shard_sizes
    drawn = _of_batch(draw, sum(sizes))
    if mesh.tensor_group is not None:
        dist.broadcast(drawn, group=mesh.tensor_group, group_src=0)
    first = sum(sizes[: mesh.shard_rank])
    return drawn[first : first + rows]


_part: ContextVar[tuple[int, int, int] | None] = ContextVar("part", default=None)


@contextmanager
def drawing_part(first: int, rows: int, of: int) -> Iterator[None]:
    """Inside, what is drawn is what the whole batch would have drawn for these sequences.

    So a batch is the same however it is split over ranks and micro-batches, if the generator is
    seeded alike for each part. Sequences must be of one length.

    Args:
        first, rows: sequences of the part.
        of: sequences of the whole batch.
    """
    token = _part.set((first, rows, of))
    try:
        yield
    finally:
        _part.reset(token)


def first_of_batch(tokens: int) -> int | None:
    """Number of the first of these tokens in the whole batch; None outside a `drawing_part`."""
    part = _part.get()
    return None if part is None else tokens * part[0] // part[1]


def _of_batch(draw: Callable[[int], Tensor], tokens: int) -> Tensor:
    """`draw(tokens)`, or these tokens of what is drawn for the whole batch."""
    # torch.compile cannot trace a ContextVar; a parity check, which sets it, does not compile.
    part = None if torch.compiler.is_compiling() else _part.get()
    if part is None:
        return draw(tokens)
    first, rows, of = part
    before = tokens * first // rows
    return draw(tokens * of // rows)[before : before + tokens]
