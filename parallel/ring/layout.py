"""Who holds which tokens round a ring, and which of them can see each other.

A rank's tokens come in runs that the host knows: halves (of a zigzag order, the early and the late
chunk), cut where a long sequence ends. Of the blocks of pairs between two ranks' runs, those that
cannot see each other are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.rows import all_gather_rows


class Run(NamedTuple):
    """Tokens of a rank that lie together: rows from and to, and what they lie between."""

    start: int
    stop: int
    lowest_position: int
    highest_position: int
    lowest_sequence: int
    highest_sequence: int


SHORT = 128
"""Sequences of fewer tokens share a block and are masked: a block costs a few calls."""


def zigzag_rows(tokens: int, ranks: int, rank: int) -> Tensor:
    """int64: which tokens a rank holds so that causal attention is even: chunk r and its mirror.

    Of 2n equal chunks, rank r holds chunks r and 2n - 1 - r: as many early tokens, which see
    little, as late ones, which see much.
    """
    chunks = torch.arange(tokens).tensor_split(2 * ranks)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


@dataclass(frozen=True, eq=False)
class RingLayout:
    """Who holds which tokens; made once for all layers of a forward.

    Attributes:
        group: the ranks of the ring.
        sizes: tokens of each rank.
        positions, sequences: int64 of each rank's tokens: place in the own sequence, and which.
        causal: a token sees itself and what is before it in its sequence.
        bounds: of every rank's runs of tokens, known to the host.
        ordered: every rank's tokens lie sequence after sequence.
    """

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    positions: list[Tensor]
    sequences: list[Tensor]
    causal: bool
    bounds: list[list[Run]]
    ordered: bool
    _starts: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    _blocks: dict[tuple[int, int], list[tuple[Run, Run]]] = field(default_factory=dict, repr=False)

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
        on_host: Tensor | None = None,
    ) -> RingLayout:
        """From what every rank knows of all tokens, which lie over the ranks in this order.
        Synchronises with the host once, unless positions and sequences are there, [2, T]."""
        # Kernels read both with a stride of one.
        positions_T, sequences_T = positions_T.contiguous(), sequences_T.contiguous()
        positions, sequences = positions_T.split(list(sizes)), sequences_T.split(list(sizes))
        if on_host is None:
            on_host = torch.stack([positions_T, sequences_T]).cpu()
        bounds, ordered = runs(on_host, sizes)
        return RingLayout(group, sizes, list(positions), list(sequences), causal, bounds, ordered)

    @property
    def count(self) -> int:
        """How many sequences there are; later ones without any token do not count."""
        return 1 + max((run.highest_sequence for own in self.bounds for run in own), default=-1)

    def starts(self, rank: int, count: int) -> Tensor:
        """int32 [count + 1]: where each sequence begins among a rank's tokens, if `ordered`."""
        if (rank, count) not in self._starts:
            sequences = self.sequences[rank]
            each = torch.arange(count + 1, device=sequences.device)
            self._starts[rank, count] = torch.searchsorted(sequences, each, out_int32=True)
        return self._starts[rank, count]

    def pairs(self, queries: int, keys: int) -> int:
        """Query-key pairs that are computed between two ranks' tokens."""
        seen = Pair(self, self, queries, keys).runs()
        return sum((q.stop - q.start) * (k.stop - k.start) for q, k in seen)


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
        return bool(self.runs())

    def runs(self) -> list[tuple[Run, Run]]:
        """Runs of queries and of keys that can see each other."""
        layout, place = self.query_layout, (self.queries, self.keys)
        if layout is self.key_layout and place in layout._blocks:
            return layout._blocks[place]
        found = [
            (q, k)
            for q in layout.bounds[self.queries]
            for k in self.key_layout.bounds[self.keys]
            if not unseen(q, k, layout.causal)
        ]
        if layout is self.key_layout:
            layout._blocks[place] = found
        return found

    def starts(self) -> tuple[Tensor, Tensor]:
        """int32 [sequences + 1] each: where sequences begin among the queries and the keys."""
        count = max(self.query_layout.count, self.key_layout.count)
        return self.query_layout.starts(self.queries, count), self.key_layout.starts(
            self.keys, count
        )

    def blocks(self, most_rows: int) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(rows, columns, bool [q, k] or None) of the runs that can see each other."""
        causal = self.query_layout.causal
        for q, k in self.runs():
            columns = slice(k.start, k.stop)
            masks = partly_seen(q, k, causal)
            for start in range(q.start, q.stop, most_rows):
                rows = slice(start, min(start + most_rows, q.stop))
                yield rows, columns, self._seen(rows, columns) if masks else None

    def _seen(self, rows: slice, columns: slice) -> Tensor:
        q_sequence = self.query_layout.sequences[self.queries][rows, None]
        seen = q_sequence == self.key_layout.sequences[self.keys][None, columns]
        if self.query_layout.causal:
            q_position = self.query_layout.positions[self.queries][rows, None]
            seen = seen & (self.key_layout.positions[self.keys][None, columns] <= q_position)
        return seen


def unseen(q: Any, k: Any, causal: bool) -> Any:
    """Whether no query of a run sees a key of another: bool, or of Runs of tensors bool tensors."""
    apart = (q.lowest_sequence > k.highest_sequence) | (k.lowest_sequence > q.highest_sequence)
    return apart | (causal & _one_sequence(q, k) & (q.highest_position < k.lowest_position))


def partly_seen(q: Any, k: Any, causal: bool) -> Any:
    """Whether some of the pairs of two runs are hidden; as `unseen`."""
    one = _one_sequence(q, k)
    return (one ^ True) | (causal & (q.lowest_position < k.highest_position))


def _one_sequence(q: Any, k: Any) -> Any:
    each = (q.lowest_sequence == q.highest_sequence) & (k.lowest_sequence == k.highest_sequence)
    return each & (q.lowest_sequence == k.lowest_sequence)


def runs(on_host: Tensor, sizes: tuple[int, ...]) -> tuple[list[list[Run]], bool]:
    """Every rank's runs of tokens; and whether all ranks' tokens lie sequence after sequence.

    Args:
        on_host: int64 [2, T], positions and sequences of all tokens in the order of the ranks.
        sizes: tokens of each rank.
    """
    bounds: list[list[Run]] = []
    ordered = True
    for own in on_host.split(list(sizes), dim=1):
        positions, sequences = own
        steps = sequences.diff()
        in_order = bool((steps >= 0).all())
        ordered &= in_order
        starts = (steps.nonzero().squeeze(1) + 1).tolist() if in_order else []
        found: list[Run] = []
        for first, last in _cut(starts, positions.shape[0]):
            rows = slice(first, last)
            low, high = positions[rows].aminmax()
            least, most = sequences[rows].aminmax()
            found.append(Run(first, last, int(low), int(high), int(least), int(most)))
        bounds.append(found)
    return bounds, ordered


def _cut(starts: list[int], tokens: int) -> list[tuple[int, int]]:
    """Halves of a rank's tokens, cut at the ends of long sequences, and these into halves."""
    middle = (tokens + 1) // 2
    least = max(SHORT, tokens // 32)
    ends = {0, *starts, tokens}
    points = sorted(ends | {middle})
    found: list[tuple[int, int]] = []
    opened: int | None = None  # of short sequences that share a run
    for first, last in itertools.pairwise(points):
        if last - first >= least:
            if opened is not None:
                found.append((opened, first))
                opened = None
            half = (first + last + 1) // 2
            whole = first in ends and last in ends
            found += [(first, half), (half, last)] if whole else [(first, last)]
            continue
        opened = first if opened is None else opened
        if last in (middle, tokens) or last - opened >= least:
            found.append((opened, last))
            opened = None
    return found
