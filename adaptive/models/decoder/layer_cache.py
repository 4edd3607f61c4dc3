"""The keys and values that one layer holds of earlier tokens.

Shape legend: B sequences, C places of a row, T packed tokens, A sequences that ask, G key-value
heads, h head width, n keys held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptive.models.decoder.tokens import Tokens
from adaptive.routing.layout import TokenLayout

_SMALLEST = 16
"""Places that a row has from the beginning; rows double when they are full."""


class Fresh(NamedTuple):
    """The nodes of a tree: their names and positions for each sequence, and their first place."""

    names: list[list[int]]
    positions: list[list[int]]
    starts: list[int]


class LayerCache:
    """Keys and values of one layer, `[B, C, 2G, h]`, filled from the left, and their number.

    `extend` serves modules, which compute on packed tensors; `append` and `attend` serve
    `Inference`, which knows on the host how many there are. Both may be mixed.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.places = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        self.stored: Tensor | None = None
        self.heads = 0
        # Tokens held for each sequence, as the device or as the host knows them, or both.
        self._lengths: Tensor | None = None
        self._held: list[int] | None = [0] * batch_size
        # What the host knows of lengths on the device without asking.
        self._tokens = 0
        self._longest_at_most = 0
        # Whether some place holds another position than its own number.
        self.moved = False
        # Of the last `append`: whether no sequence brought several; its nodes if it was a tree.
        self.one_each = False
        self.fresh: Fresh | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens held for each sequence. Replaced, never changed in place."""
        if self._lengths is None:
            self._lengths = on_device_of(self.places, self._held)
        return self._lengths

    @property
    def held(self) -> list[int]:
        """The same on the host. Synchronises with it behind `extend`."""
        if self._held is None:
            self._held = self.lengths.tolist()
        return self._held

    @property
    def bytes(self) -> int:
        """Memory that keys and values take."""
        return 0 if self.stored is None else self.stored.numel() * self.stored.element_size()

    def extend(
        self, k_TGh: Tensor, v_TGh: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, TokenLayout]:
        """Store the keys and values of new tokens; return those of all tokens so far, packed.

        Args:
            k_TGh, v_TGh: of the new tokens, sequence after sequence.
            layout: theirs, with positions in the whole sequence. Sequences may have no new token.

        Returns:
            Keys and values [all tokens, G, h], and their layout.
        """
        if self._held is not None:
            self._tokens, self._longest_at_most = sum(self._held), max(self._held)
        self._reserve_at_most(k_TGh, layout.max_seqlen)
        assert self.stored is not None
        rows_T = layout.sequence_ids
        starts_B = layout.cu_seqlens.long()
        offset_T = torch.arange(layout.tokens, device=rows_T.device) - starts_B[rows_T]
        place_T = self.lengths[rows_T] + offset_T
        self.stored[rows_T, place_T] = torch.cat((k_TGh, v_TGh), 1).detach()
        self.places[rows_T, place_T] = layout.positions
        self._lengths, self._held = self.lengths + starts_B.diff(), None
        self._tokens += layout.tokens
        self._longest_at_most += layout.max_seqlen
        self.moved, self.fresh = True, None
        return self._packed()

    def append(self, kv_TGh: Tensor, tokens: Tokens) -> None:
        """Store the keys and values of new tokens.

        Args:
            kv_TGh: [T, 2G, h], keys and then values, at their positions.
            tokens: which they are.
        """
        held = self.held
        self._reserve(kv_TGh, max(held) + max(tokens.lengths))
        assert self.stored is not None
        if tokens.single and held.count(held[0]) == len(held):
            place = held[0]
            self.stored.select(1, place).copy_(kv_TGh)
            natural = all(position == place for position in tokens.positions)
            if self.moved or not natural:
                self.places.select(1, place).copy_(tokens.positions_T)
            new = [place + 1] * len(held)
        elif len(held) == 1:
            place, count = held[0], tokens.count
            self.stored[0].narrow(0, place, count).copy_(kv_TGh)
            natural = list(tokens.positions) == list(range(place, place + count))
            if self.moved or not natural:
                self.places[0].narrow(0, place, count).copy_(tokens.positions_T)
            new = [place + count]
        else:
            rows_T, places_T, natural = _places(tokens, held)
            self.stored[rows_T, places_T] = kv_TGh
            if self.moved or not natural:
                self.places[rows_T, places_T] = tokens.positions_T
            new = [n + more for n, more in zip(held, tokens.lengths, strict=True)]
        self.fresh = None
        if tokens.tree is not None:
            self.fresh = Fresh(
                by_sequence(tokens.names(), tokens.lengths),
                by_sequence(tokens.positions, tokens.lengths),
                held,
            )
        elif not natural:
            self.moved = True
        self._held, self._lengths, self.one_each = new, None, tokens.single

    def keys_and_values(self, longest: int, rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """[A, G, n, h] each."""
        assert self.stored is not None
        stored = self.stored
        if rows is not None:
            stored = stored.narrow(1, 0, longest)
            one = len(rows) == 1
            stored = stored.narrow(0, rows[0], 1) if one else stored[on_device_of(stored, rows)]
        both = stored.narrow(1, 0, longest).transpose(1, 2)
        return both.narrow(1, 0, self.heads), both.narrow(1, self.heads, self.heads)

    def keep(self, names: set[int]) -> None:
        """Of the tokens of the last pass, a tree, keep some only, in their order.

        Args:
            names: which tokens of the pass.
        """
        if self.fresh is None or self.stored is None:
            return
        held = list(self.held)
        for row, (fresh, positions, start) in enumerate(zip(*self.fresh, strict=True)):
            kept = [place for place, name in enumerate(fresh) if name in names]
            end = held[row] = start + len(kept)
            if kept != list(range(len(kept))):
                source = [start + place for place in kept]
                rows = self.stored[row]
                rows[start:end] = rows.index_select(0, on_device_of(rows, source))
            # What is forgotten leaves its places as they were.
            own = list(range(start, start + len(fresh)))
            own[: len(kept)] = [positions[place] for place in kept]
            self.places[row, start : start + len(fresh)] = on_device_of(self.places, own)
            self.moved = self.moved or own[: len(kept)] != list(range(start, end))
        self._held, self._lengths, self.fresh = held, None, None

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the tokens whose position is `counts` or more. May synchronise with the host."""
        if not self.moved:
            self._held = [min(n, count) for n, count in zip(self.held, counts, strict=True)]
        elif longest := max(self.held):
            column_n = torch.arange(longest, device=self.places.device)
            held_Bn = column_n < self.lengths[:, None]
            kept_Bn = self.places[:, :longest] < on_device_of(self.places, list(counts))[:, None]
            self._held = (held_Bn & kept_Bn).sum(1).tolist()
        self._lengths = self.fresh = None

    def select(self, rows_A: Tensor) -> None:
        """Keep some of the sequences, in the order given."""
        self._held = [self.held[row] for row in rows_A.tolist()]
        self._lengths = self.fresh = None
        self.places = self.places.index_select(0, rows_A)
        if self.stored is not None:
            self.stored = self.stored.index_select(0, rows_A)

    def join(self, other: LayerCache) -> None:
        """Put the sequences of another cache behind one's own."""
        like = other.stored if self.stored is None else self.stored
        if like is not None:
            room = max(self.places.shape[1], other.places.shape[1])
            for cache in (self, other):
                cache._grow(like, room)
            assert self.stored is not None
            assert other.stored is not None
            self.stored = torch.cat((self.stored, other.stored))
            self.places = torch.cat((self.places, other.places))
        self._held = self.held + other.held
        self.moved = self.moved or other.moved
        self._lengths = self.fresh = None

    def _packed(self) -> tuple[Tensor, Tensor, TokenLayout]:
        assert self.stored is not None
        batch = self.lengths.shape[0]
        longest = self._longest_at_most
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=self.lengths.device)
        cu_seqlens[1:] = self.lengths.cumsum(0)
        if self._tokens == batch * longest:
            both, positions = (x[:, :longest].flatten(0, 1) for x in (self.stored, self.places))
        else:
            column_C = torch.arange(self.places.shape[1], device=self.places.device)
            held = (column_C < self.lengths[:, None]).flatten()
            index_T = torch.nonzero_static(held, size=self._tokens).squeeze(1)
            both, positions = (
                x.flatten(0, 1).index_select(0, index_T) for x in (self.stored, self.places)
            )
        keys, values = both.split(self.heads, 1)
        return keys, values, TokenLayout(cu_seqlens, longest, positions)

    def _reserve_at_most(self, k_TGh: Tensor, more: int) -> None:
        """Make room for `more` tokens in every row, whose lengths the device knows."""
        if self.stored is not None and self._longest_at_most + more > self.places.shape[1]:
            # The bound counts the longest share of every step: ask before growing.
            self._longest_at_most = max(self.held)
        pair = k_TGh.repeat(1, 2, 1) if self.stored is None else k_TGh
        self._reserve(pair, self._longest_at_most + more)

    def _reserve(self, kv_TGh: Tensor, needed: int) -> None:
        room = self.places.shape[1]
        if self.stored is None or needed > room:
            self._grow(kv_TGh, max(needed, 2 * room, _SMALLEST))

    def _grow(self, kv_TGh: Tensor, room: int) -> None:
        """Rows of so many places; of the heads, width and dtype of `kv`, [..., 2G, h], at first."""
        old, places = self.stored, self.places
        if old is not None and places.shape[1] >= room:
            return
        batch, held = places.shape
        like = kv_TGh if old is None else old
        self.stored = like.new_zeros(batch, room, *like.shape[-2:])
        self.heads = like.shape[-2] // 2
        # A place's own number, which in a layer that computes every token is its position.
        self.places = torch.arange(room, device=places.device).repeat(batch, 1)
        if old is not None:
            self.stored[:, :held] = old
            self.places[:, :held] = places


def on_device_of(like: Tensor, numbers: Any) -> Tensor:
    """Numbers of the host where a tensor is, without waiting."""
    if isinstance(numbers, list):
        numbers = torch.tensor(numbers, dtype=torch.int64)
    moved: Tensor = numbers.to(like.device)
    return moved


def by_sequence(items: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    parts, start = [], 0
    for count in lengths:
        parts.append(list(items[start : start + count]))
        start += count
    return parts


def _places(tokens: Tokens, held: list[int]) -> tuple[Tensor, Tensor, bool]:
    """int64 [T] each: sequence and place of every new token; whether places are positions."""
    key = ("places", *held)
    if key not in tokens.kept:
        places = [
            n + more for n, count in zip(held, tokens.lengths, strict=True) for more in range(count)
        ]
        rows_T, places_T = (torch.tensor(x).to(tokens.device) for x in (tokens.sequences, places))
        tokens.kept[key] = rows_T, places_T, places == list(tokens.positions)
    found: tuple[Tensor, Tensor, bool] = tokens.kept[key]
    return found
