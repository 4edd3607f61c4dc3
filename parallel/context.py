"""Context parallelism by Ulysses: long sequences lie over ranks, attention sees them whole.

Outside attention a rank holds some tokens and all heads; inside, all tokens and some heads. One
all-to-all goes in with queries, keys and values, one comes back with the results. This is the
scheme of DeepSpeed's `DistributedAttention`, for rows that may lie unevenly: routed layers choose
tokens wherever they are. Before such a layer computes, its rows are evened out over the ranks.

Shape legend: T tokens of whole sequences, t those of this rank, H heads, n context ranks, h head
width, D width.

Source: DeepSpeed Ulysses, arXiv 2309.14509, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.rows import even_shards, exchange_rows, gather_rows


def tokens_to_heads(
    parts: list[Tensor], mesh: Mesh, *, shard_sizes: tuple[int, ...] | None
) -> list[Tensor]:
    """Every token, for this rank's share of the heads: [t, H, h] -> [T, H / n, h] each.

    Args:
        parts: tensors of the same tokens (queries, keys, values); their heads may differ in number.
        mesh: the mesh; without context parallelism nothing happens.
        shard_sizes: tokens of each shard.

    Raises:
        ValueError: if the context degree does not divide the heads of a tensor.
    """
    ranks = mesh.context
    if mesh.context_group is None:
        return parts
    own, width = parts[0].shape[0], parts[0].shape[-1]
    sizes = (own,) * ranks if shard_sizes is None else mesh.context_sizes(shard_sizes)
    for part in parts:
        check_heads(part.shape[1], mesh)
    # To each rank its heads of everything, in one message.
    split = torch.cat([part.unflatten(1, (ranks, -1)) for part in parts], dim=2)
    rows = split.transpose(0, 1).flatten(0, 1)
    everyone = exchange_rows(rows, mesh.context_group, (own,) * ranks, sizes)
    counts = [part.shape[1] // ranks for part in parts]
    # A selection may hold no token at all: nothing of a shape can be inferred from it.
    shares = zip(everyone.split(counts, dim=1), counts, strict=True)
    return [out.reshape(sum(sizes), count, width) for out, count in shares]


def repeat_heads(x_TGh: Tensor, mesh: Mesh) -> Tensor:
    """Key-value heads repeated until the context degree divides them: [T, G, h] -> [T, G', h]."""
    times = mesh.context // math.gcd(x_TGh.shape[1], mesh.context)
    return x_TGh if times == 1 else x_TGh.repeat_interleave(times, dim=1)


def heads_to_tokens(x_THh: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None) -> Tensor:
    """Back to this rank's tokens with all heads: [T, H / n, h] -> [t, H, h]."""
    if mesh.context_group is None:
        return x_THh
    ranks = mesh.context
    even = even_shards(x_THh.shape[0], ranks)
    sizes = even if shard_sizes is None else mesh.context_sizes(shard_sizes)
    own = sizes[mesh.context_rank]
    rows = exchange_rows(x_THh, mesh.context_group, sizes, (own,) * ranks)
    return rows.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)


def move_rows(
    x_tD: Tensor, mesh: Mesh, *, before: tuple[int, ...], after: tuple[int, ...]
) -> Tensor:
    """The same rows in the same order, spread over the shards in another way.

    Args:
        x_tD: [before[rank], …].
        mesh: the mesh.
        before, after: rows of each shard; equal sums.
    """
    if mesh.shard_group is None or before == after:
        return x_tD
    rank = mesh.shard_rank
    sent = _overlaps(before, after, rank)
    received = _overlaps(after, before, rank)
    return exchange_rows(x_tD, mesh.shard_group, sent, received)


def own_context_rows(x_T: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None) -> Tensor:
    """This context rank's rows of what every context rank has whole."""
    if mesh.context == 1:
        return x_T
    even = even_shards(x_T.shape[0], mesh.context)
    sizes = even if shard_sizes is None else mesh.context_sizes(shard_sizes)
    return x_T.split(list(sizes))[mesh.context_rank]


def gather_context_rows(x_tV: Tensor, mesh: Mesh, *, shard_sizes: tuple[int, ...] | None) -> Tensor:
    """Every context rank's rows; each rank then computes the same loss of all of them.

    Backward sums what the ranks' losses give to own rows, which the average over replicas undoes.
    """
    if mesh.context_group is None:
        return x_tV
    even = (x_tV.shape[0],) * mesh.context
    sizes = even if shard_sizes is None else mesh.context_sizes(shard_sizes)
    return gather_rows(x_tV, mesh.context_group, sizes)


def _overlaps(mine: tuple[int, ...], theirs: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """How many of rank's rows in one spread are each rank's in the other."""
    first, last = sum(mine[:rank]), sum(mine[: rank + 1])
    shared, start = [], 0
    for size in theirs:
        shared.append(max(0, min(last, start + size) - max(first, start)))
        start += size
    return tuple(shared)


def check_heads(heads: int, mesh: Mesh) -> None:
    """Raise ValueError, naming valid context degrees, unless the context degree divides, or
    attention goes round a ring."""
    if heads % mesh.context and not mesh.ring:
        fits = [str(n) for n in range(1, heads + 1) if heads % n == 0 and mesh.world % n == 0]
        raise ValueError(
            f"context={mesh.context}: must divide the {heads} heads of a tensor rank; "
            f"may be {', '.join(fits)}, or any with context_attention=ring"
        )
