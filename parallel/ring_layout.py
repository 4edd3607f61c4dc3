"""Who holds which tokens round a ring, and which of them can see each other.

A rank's tokens come in two halves (of a zigzag order, the early and the late chunk), so that of
four blocks of pairs those that cannot see each other are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sequence import all_gather_rows

Bounds = tuple[int, int, int, int, int, int]
"""Of half a rank's tokens: rows from and to, lowest and highest position and sequence."""


def zigzag_rows(tokens: int, ranks: int, rank: int) -> Tensor:
    """int64: which tokens a rank holds so that causal attention is even: chunk r and its mirror.

    Of 2n equal chunks, rank r holds chunks r and 2n - 1 - r: as many early tokens, which see
    little, as late ones, which see much.
    """
    chunks = torch.arange(tokens).tensor_split(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


@dataclass(frozen=True)
class RingLayout:
    """Who holds which tokens; made once for all layers of a forward.

    Attributes:
        group: the ranks of the ring.
        sizes: tokens of each rank.
        positions, sequences: int64 of each rank's tokens: place in the own sequence, and which.
        causal: a token sees itself and what is before it in its sequence.
        bounds: for every rank, of each half of its tokens, known to the host, to skip pairs that
            cannot see each other.
        ordered: every rank's tokens lie sequence after sequence.
    """

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    positions: list[Tensor]
    sequences: list[Tensor]
    causal: bool
    bounds: list[list[Bounds]]
    ordered: bool
    _starts: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def create(
        positions_t: Tensor, sequences_t: Tensor, group: dist.ProcessGroup, *, causal: bool = True
    ) -> RingLayout:
        """From what each rank knows of its own tokens. A collective over the group; synchronises
        with the host twice."""
        ranks = dist.get_world_size(group)
        count = positions_t.new_full((1,), positions_t.shape[0], dtype=torch.int64)
        sizes = tuple(all_gather_rows(count, group, (1,) * ranks).tolist())
        both = all_gather_rows(torch.stack([positions_t, sequences_t], 1), group, sizes)
        return RingLayout.of(both[:, 0], both[:, 1], sizes, group, causal=causal)

    @staticmethod
    def of(
        positions_T: Tensor,
        sequences_T: Tensor,
        sizes: tuple[int, ...],
        group: dist.ProcessGroup,
        *,
        causal: bool = True,
    ) -> RingLayout:
        """From what every rank knows of all tokens, which lie over the ranks in this order.
        Synchronises with the host once."""
        # Kernels read both with a stride of one.
        positions_T, sequences_T = positions_T.contiguous(), sequences_T.contiguous()
        positions, sequences = positions_T.split(list(sizes)), sequences_T.split(list(sizes))
        bounds, ordered = _bounds(positions_T, sequences_T, sizes)
        return RingLayout(group, sizes, list(positions), list(sequences), causal, bounds, ordered)

    @property
    def count(self) -> int:
        """How many sequences there are; later ones without any token do not count."""
        return 1 + max((half[5] for own in self.bounds for half in own), default=-1)

    def starts(self, rank: int, count: int) -> Tensor:
        """int32 [count + 1]: where each sequence begins among a rank's tokens, if `ordered`."""
        if (rank, count) not in self._starts:
            sequences = self.sequences[rank]
            each = torch.arange(count + 1, device=sequences.device)
            self._starts[rank, count] = torch.searchsorted(sequences, each, out_int32=True)
        return self._starts[rank, count]

    def pairs(self, queries: int, keys: int) -> int:
        """Query-key pairs that are computed between two ranks' tokens."""
        return sum(
            (q[1] - q[0]) * (k[1] - k[0])
            for q in self.bounds[queries]
            for k in self.bounds[keys]
            if _may_see(q, k, self.causal)
        )


@dataclass(frozen=True)
class Pair:
    """The tokens of two ranks: rank `queries` of one layout, rank `keys` of the other."""

    query_layout: RingLayout
    key_layout: RingLayout
    queries: int
    keys: int

    @property
    def ordered(self) -> bool:
        return self.query_layout.ordered and self.key_layout.ordered

    @property
    def sees(self) -> bool:
        """Whether any of the queries may see any of the keys."""
        return any(
            _may_see(q, k, self.query_layout.causal)
            for q in self.query_layout.bounds[self.queries]
            for k in self.key_layout.bounds[self.keys]
        )

    def starts(self) -> tuple[Tensor, Tensor]:
        """int32 [sequences + 1] each: where sequences begin among the queries and the keys."""
        count = max(self.query_layout.count, self.key_layout.count)
        return self.query_layout.starts(self.queries, count), self.key_layout.starts(
            self.keys, count
        )

    def blocks(self, most_rows: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(rows, columns, bool [q, k] or None) of the halves that can see each other."""
        causal = self.query_layout.causal
        for q in self.query_layout.bounds[self.queries]:
            for k in self.key_layout.bounds[self.keys]:
                if not _may_see(q, k, causal):
                    continue
                columns = slice(k[0], k[1])
                one_sequence = q[4] == q[5] == k[4] == k[5]
                masks = not one_sequence or (causal and q[2] < k[3])
                for start in range(q[0], q[1], most_rows):
                    rows = slice(start, min(start + most_rows, q[1]))
                    yield rows, columns, self._seen(rows, columns) if masks else None

    def _seen(self, rows: slice, columns: slice) -> Tensor:
        q_sequence = self.query_layout.sequences[self.queries][rows, None]
        seen = q_sequence == self.key_layout.sequences[self.keys][None, columns]
        if self.query_layout.causal:
            q_position = self.query_layout.positions[self.queries][rows, None]
            seen = seen & (self.key_layout.positions[self.keys][None, columns] <= q_position)
        return seen


def _may_see(q: Bounds, k: Bounds, causal: bool) -> bool:
    if q[4] > k[5] or k[4] > q[5]:
        return False
    one_sequence = q[4] == q[5] == k[4] == k[5]
    return not (causal and one_sequence and q[3] < k[2])


def _bounds(
    positions_T: Tensor, sequences_T: Tensor, sizes: tuple[int, ...]
) -> tuple[list[list[Bounds]], bool]:
    """Of the two halves of each rank's tokens, without those that are empty; and whether every
    rank's sequences ascend."""
    halves: list[list[tuple[int, int]]] = []
    extremes: list[Tensor] = []
    start = 0
    for size in sizes:
        middle = (size + 1) // 2
        halves.append([(a, b) for a, b in ((0, middle), (middle, size)) if a < b])
        for first, last in halves[-1]:
            rows = slice(start + first, start + last)
            for values in (positions_T[rows], sequences_T[rows]):
                extremes += values.aminmax()
        if size:
            own = sequences_T[start : start + size]
            extremes.append((own.diff() >= 0).all().to(own.dtype))
        start += size
    known = iter(torch.stack(extremes).tolist() if extremes else [])
    bounds: list[list[Bounds]] = []
    ordered = True
    for own_halves in halves:
        bounds.append([(a, b, *(next(known) for _ in range(4))) for a, b in own_halves])
        ordered &= not own_halves or bool(next(known))
    return bounds, ordered
