"""The keys and values of earlier tokens, so that generation computes each token once.

Every layer keeps its own: a routed layer holds only the tokens that it processed.

Shape legend: B sequences, C places of a row, T packed tokens, A sequences that ask, H query heads,
G key-value heads, h head width, n keys held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.models.decoder.tokens import Tokens
from adaptive.routing.layout import TokenLayout

_SMALLEST = 16
"""Places that a row has from the beginning; rows double when they are full."""
_ONE_BY_ONE = 4
"""Sequences up to which a call each costs less than padding and a mask."""
_PADDED = 16
"""New tokens of a sequence up to which those of several sequences are padded to one call."""


class _Fresh(NamedTuple):
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
        self._stored: Tensor | None = None
        self._heads = 0
        # Tokens held for each sequence, as the device or as the host knows them, or both.
        self._lengths: Tensor | None = None
        self._held: list[int] | None = [0] * batch_size
        # What the host knows of lengths on the device without asking.
        self._tokens = 0
        self._longest_at_most = 0
        # Whether some place holds another position than its own number.
        self._moved = False
        # Of the last `append`: whether no sequence brought several; its nodes if it was a tree.
        self._one_each = False
        self._fresh: _Fresh | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens held for each sequence. Replaced, never changed in place."""
        if self._lengths is None:
            self._lengths = _on(self.places, self._held)
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
        return 0 if self._stored is None else self._stored.numel() * self._stored.element_size()

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
        assert self._stored is not None
        rows_T = layout.sequence_ids
        starts_B = layout.cu_seqlens.long()
        offset_T = torch.arange(layout.tokens, device=rows_T.device) - starts_B[rows_T]
        place_T = self.lengths[rows_T] + offset_T
        self._stored[rows_T, place_T] = torch.cat((k_TGh, v_TGh), 1).detach()
        self.places[rows_T, place_T] = layout.positions
        self._lengths, self._held = self.lengths + starts_B.diff(), None
        self._tokens += layout.tokens
        self._longest_at_most += layout.max_seqlen
        self._moved, self._fresh = True, None
        return self._packed()

    def append(self, kv_TGh: Tensor, tokens: Tokens) -> None:
        """Store the keys and values of new tokens.

        Args:
            kv_TGh: [T, 2G, h], keys and then values, at their positions.
            tokens: which they are.
        """
        held = self.held
        self._reserve(kv_TGh, max(held) + max(tokens.lengths))
        assert self._stored is not None
        if tokens.single and held.count(held[0]) == len(held):
            place = held[0]
            self._stored.select(1, place).copy_(kv_TGh)
            natural = all(position == place for position in tokens.positions)
            if self._moved or not natural:
                self.places.select(1, place).copy_(tokens.positions_T)
            new = [place + 1] * len(held)
        elif len(held) == 1:
            place, count = held[0], tokens.count
            self._stored[0].narrow(0, place, count).copy_(kv_TGh)
            natural = list(tokens.positions) == list(range(place, place + count))
            if self._moved or not natural:
                self.places[0].narrow(0, place, count).copy_(tokens.positions_T)
            new = [place + count]
        else:
            rows_T, places_T, natural = _places(tokens, held)
            self._stored[rows_T, places_T] = kv_TGh
            if self._moved or not natural:
                self.places[rows_T, places_T] = tokens.positions_T
            new = [n + more for n, more in zip(held, tokens.lengths, strict=True)]
        self._fresh = None
        if tokens.tree is not None:
            self._fresh = _Fresh(
                _by_sequence(tokens.names(), tokens.lengths),
                _by_sequence(tokens.positions, tokens.lengths),
                held,
            )
        elif not natural:
            self._moved = True
        self._held, self._lengths, self._one_each = new, None, tokens.single

    def attend(self, q_THh: Tensor, tokens: Tokens, window: int | None = None) -> Tensor:
        """Attention [T, H, h] of queries, which are of the newest tokens, to what they see.

        Args:
            q_THh: [T, H, h], at their positions.
            tokens: which they are.
            window: positions that one sees, its own included; None: all earlier ones.
        """
        held = self.held
        if window is not None and not self._moved and max(held) <= window:
            window = None
        one_each = self._one_each and tokens.tree is None
        all_held = one_each and window is None
        equal = tokens.single and held.count(held[0]) == len(held)
        if one_each and equal and (window is None or not self._moved):
            k_BGnh, v_BGnh = self._keys_and_values(held[0])
            if window is not None:  # places are positions
                k_BGnh, v_BGnh = k_BGnh[:, :, -window:], v_BGnh[:, :, -window:]
            # The queries of a group of heads stand beside each other: one key-value head each.
            q_BGgh = q_THh.unflatten(1, (self._heads, -1))
            return F.scaled_dot_product_attention(q_BGgh, k_BGnh, v_BGnh).flatten(1, 2)
        asking = [row for row, count in enumerate(tokens.lengths) if count]
        width = max(tokens.lengths)
        if len(asking) > _ONE_BY_ONE and width <= _PADDED:
            return self._attend_padded(q_THh, tokens, asking, width, window)
        parts, start = [], 0
        for row in asking:
            count = tokens.lengths[row]
            k_1Gnh, v_1Gnh = self._keys_and_values(held[row], [row])
            # The first piece of a text, all of whose tokens ask, needs no mask.
            first = count == held[row] and tokens.tree is None and window is None
            mask = None
            if not (first or all_held):
                mask = self._visible(tokens, [row], count, held[row], window)
            out_1HSh = F.scaled_dot_product_attention(
                q_THh[start : start + count].transpose(0, 1)[None],
                k_1Gnh,
                v_1Gnh,
                mask,
                is_causal=first and count > 1,
                enable_gqa=q_THh.shape[1] != self._heads,
            )
            parts.append(out_1HSh[0].transpose(0, 1))
            start += count
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_padded(
        self, q_THh: Tensor, tokens: Tokens, asking: list[int], width: int, window: int | None
    ) -> Tensor:
        longest = max(self.held[row] for row in asking)
        rows = None if len(asking) == len(self.held) else asking
        k_AGnh, v_AGnh = self._keys_and_values(longest, rows)
        mask_A1Wn = self._visible(tokens, asking, width, longest, window)
        if width == 1:
            q_AGgh = q_THh.unflatten(1, (self._heads, -1))
            return F.scaled_dot_product_attention(q_AGgh, k_AGnh, v_AGnh, mask_A1Wn).flatten(1, 2)
        at_T = tokens.kept.get(("padded", width))
        if at_T is None:
            columns = [c for row in asking for c in range(tokens.lengths[row])]
            lines = [line for line, row in enumerate(asking) for _ in range(tokens.lengths[row])]
            at_T = _on(q_THh, [a * width + c for a, c in zip(lines, columns, strict=True)])
            tokens.kept["padded", width] = at_T
        padded = q_THh.new_zeros(len(asking) * width, *q_THh.shape[1:]).index_copy_(0, at_T, q_THh)
        out_AHWh = F.scaled_dot_product_attention(
            padded.unflatten(0, (-1, width)).transpose(1, 2),
            k_AGnh,
            v_AGnh,
            mask_A1Wn,
            enable_gqa=q_THh.shape[1] != self._heads,
        )
        return out_AHWh.transpose(1, 2).flatten(0, 1).index_select(0, at_T)

    def _visible(
        self, tokens: Tokens, asking: list[int], width: int, longest: int, window: int | None
    ) -> Tensor:
        """bool [A, 1, W, n]: the held tokens that each query sees; at padding, the first."""
        held = self.held
        key = (width, longest, window, tuple(held), tuple(asking))
        if not self._moved and key in tokens.kept:
            return tokens.kept[key]
        positions = _by_sequence(tokens.positions, tokens.lengths)
        lines = [positions[row] + [0] * (width - len(positions[row])) for row in asking]
        seen_AW1 = _on(self.places, lines)[:, :, None]
        count_A11 = _on(self.places, [held[row] for row in asking])[:, None, None]
        column_n = torch.arange(longest, device=self.places.device)
        places_An = self.places[:, :longest]
        if len(asking) < len(held):
            places_An = places_An.index_select(0, _on(self.places, asking))
        mask_AWn = (places_An[:, None] <= seen_AW1) & (column_n < count_A11)
        if tokens.tree is not None:
            assert self._fresh is not None
            names = _by_sequence(tokens.names(), tokens.lengths)
            for line, row in enumerate(asking):
                fresh, start = self._fresh.names[row], self._fresh.starts[row]
                seen = _on(self.places, tokens.tree[names[row]][:, fresh])
                mask_AWn[line, : len(names[row]), start : start + len(fresh)] = seen
        if window is not None:
            mask_AWn &= places_An[:, None] > seen_AW1 - window
        if not self._moved:
            tokens.kept[key] = mask_AWn[:, None]
        return mask_AWn[:, None]

    def _keys_and_values(
        self, longest: int, rows: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """[A, G, n, h] each."""
        assert self._stored is not None
        stored = self._stored
        if rows is not None:
            stored = stored.narrow(1, 0, longest)
            one = len(rows) == 1
            stored = stored.narrow(0, rows[0], 1) if one else stored[_on(stored, rows)]
        both = stored.narrow(1, 0, longest).transpose(1, 2)
        return both.narrow(1, 0, self._heads), both.narrow(1, self._heads, self._heads)

    def keep(self, names: set[int]) -> None:
        """Of the tokens of the last pass, a tree, keep some only, in their order.

        Args:
            names: which tokens of the pass.
        """
        if self._fresh is None or self._stored is None:
            return
        held = list(self.held)
        for row, (fresh, positions, start) in enumerate(zip(*self._fresh, strict=True)):
            kept = [place for place, name in enumerate(fresh) if name in names]
            end = held[row] = start + len(kept)
            if kept != list(range(len(kept))):
                source = [start + place for place in kept]
                rows = self._stored[row]
                rows[start:end] = rows.index_select(0, _on(rows, source))
            # What is forgotten leaves its places as they were.
            own = list(range(start, start + len(fresh)))
            own[: len(kept)] = [positions[place] for place in kept]
            self.places[row, start : start + len(fresh)] = _on(self.places, own)
            self._moved = self._moved or own[: len(kept)] != list(range(start, end))
        self._held, self._lengths, self._fresh = held, None, None

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the tokens whose position is `counts` or more. May synchronise with the host."""
        if not self._moved:
            self._held = [min(n, count) for n, count in zip(self.held, counts, strict=True)]
        elif longest := max(self.held):
            column_n = torch.arange(longest, device=self.places.device)
            held_Bn = column_n < self.lengths[:, None]
            kept_Bn = self.places[:, :longest] < _on(self.places, list(counts))[:, None]
            self._held = (held_Bn & kept_Bn).sum(1).tolist()
        self._lengths = self._fresh = None

    def select(self, rows_A: Tensor) -> None:
        """Keep some of the sequences, in the order given."""
        self._held = [self.held[row] for row in rows_A.tolist()]
        self._lengths = self._fresh = None
        self.places = self.places.index_select(0, rows_A)
        if self._stored is not None:
            self._stored = self._stored.index_select(0, rows_A)

    def join(self, other: LayerCache) -> None:
        """Put the sequences of another cache behind one's own."""
        like = other._stored if self._stored is None else self._stored
        if like is not None:
            room = max(self.places.shape[1], other.places.shape[1])
            for cache in (self, other):
                cache._grow(like, room)
            assert self._stored is not None
            assert other._stored is not None
            self._stored = torch.cat((self._stored, other._stored))
            self.places = torch.cat((self.places, other.places))
        self._held = self.held + other.held
        self._moved = self._moved or other._moved
        self._lengths = self._fresh = None

    def _packed(self) -> tuple[Tensor, Tensor, TokenLayout]:
        assert self._stored is not None
        batch = self.lengths.shape[0]
        longest = self._longest_at_most
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=self.lengths.device)
        cu_seqlens[1:] = self.lengths.cumsum(0)
        if self._tokens == batch * longest:
            both, positions = (x[:, :longest].flatten(0, 1) for x in (self._stored, self.places))
        else:
            column_C = torch.arange(self.places.shape[1], device=self.places.device)
            held = (column_C < self.lengths[:, None]).flatten()
            index_T = torch.nonzero_static(held, size=self._tokens).squeeze(1)
            both, positions = (
                x.flatten(0, 1).index_select(0, index_T) for x in (self._stored, self.places)
            )
        keys, values = both.split(self._heads, 1)
        return keys, values, TokenLayout(cu_seqlens, longest, positions)

    def _reserve_at_most(self, k_TGh: Tensor, more: int) -> None:
        """Make room for `more` tokens in every row, whose lengths the device knows."""
        if self._stored is not None and self._longest_at_most + more > self.places.shape[1]:
            # The bound counts the longest share of every step: ask before growing.
            self._longest_at_most = max(self.held)
        pair = k_TGh.repeat(1, 2, 1) if self._stored is None else k_TGh
        self._reserve(pair, self._longest_at_most + more)

    def _reserve(self, kv_TGh: Tensor, needed: int) -> None:
        room = self.places.shape[1]
        if self._stored is None or needed > room:
            self._grow(kv_TGh, max(needed, 2 * room, _SMALLEST))

    def _grow(self, kv_TGh: Tensor, room: int) -> None:
        """Rows of so many places; of the heads, width and dtype of `kv`, [..., 2G, h], at first."""
        old, places = self._stored, self.places
        if old is not None and places.shape[1] >= room:
            return
        batch, held = places.shape
        like = kv_TGh if old is None else old
        self._stored = like.new_zeros(batch, room, *like.shape[-2:])
        self._heads = like.shape[-2] // 2
        # A place's own number, which in a layer that computes every token is its position.
        self.places = torch.arange(room, device=places.device).repeat(batch, 1)
        if old is not None:
            self._stored[:, :held] = old
            self.places[:, :held] = places


class Cache:
    """The cache of a decoder: give it to `Decoder(...)(ids, cache=cache)` with the tokens to come.

    Args:
        model: a Decoder; it is asked for its number of layers.
        batch_size: sequences, the same ones in the same order in every call.

    A call may bring prompts of different lengths (padded, with a `token_mask`), then one token for
    each sequence, or several; a sequence whose mask is False throughout brings none.

    Attributes:
        stack: what the model's `stack` keeps of them (`SegmentState`); None: nothing.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self._device = next(model.parameters()).device
        self._counts: Tensor | None = None
        self._seen: list[int] | None = [0] * batch_size
        self.stack: Any = None
        layers = model.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        self._layers = [LayerCache(batch_size, self._device) for _ in layers]

    @property
    def counts(self) -> Tensor:
        """int64 [B], tokens seen of each sequence: the position of the next."""
        if self._counts is None:
            self._counts = torch.tensor(self._seen, dtype=torch.int64).to(self._device)
        return self._counts

    @property
    def seen(self) -> list[int]:
        """The same on the host. Synchronises with it where a module has counted."""
        if self._seen is None:
            self._seen = self.counts.tolist()
        return self._seen

    @property
    def bytes(self) -> int:
        """Memory that all keys and values take."""
        return sum(layer.bytes for layer in self._layers)

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def next_positions(self, layout: TokenLayout) -> TokenLayout:
        """The layout of the tokens to come, with positions that follow those already seen.

        Raises:
            ValueError: if they are of another number of sequences.
        """
        if layout.batch_size != self.counts.shape[0]:
            raise ValueError(
                f"{layout.batch_size} sequences: the cache was made for {self.counts.shape[0]}"
            )
        positions = layout.positions + self.counts[layout.sequence_ids]
        self._counts, self._seen = self.counts + layout.cu_seqlens.diff(), None
        return replace(layout, positions=positions)

    def next_tokens(self, lengths: Sequence[int]) -> Tokens:
        """The tokens to come, so many of each sequence, at the positions that follow."""
        seen = self.seen
        positions = [
            position
            for start, count in zip(seen, lengths, strict=True)
            for position in range(start, start + count)
        ]
        self._seen = [start + count for start, count in zip(seen, lengths, strict=True)]
        self._counts = None
        return Tokens(lengths, positions, self._device)

    def next_tree(self, depths_B: Sequence[Sequence[int]], tree: Tensor) -> Tokens:
        """The nodes of a tree behind each sequence, of which `keep` then keeps a path.

        Args:
            depths_B: of each sequence's nodes; the first that follows the text has depth 0.
            tree: bool [T, T], the ancestors of every node, and itself.
        """
        seen = self.seen
        positions = [start + d for start, row in zip(seen, depths_B, strict=True) for d in row]
        return Tokens([len(row) for row in depths_B], positions, self._device, tree=tree)

    def keep(self, names: Sequence[Sequence[int]]) -> None:
        """Of the nodes of the last pass, keep a path behind each sequence; forget the others.

        Args:
            names: of each sequence, which of the pass's tokens, from the first on.
        """
        kept = {name for row in names for name in row}
        for layer in self._layers:
            layer.keep(kept)
        self._seen = [start + len(row) for start, row in zip(self.seen, names, strict=True)]
        self._counts = None

    def rewind(self, counts_B: Tensor) -> None:
        """Forget all but the first `counts_B` tokens of every sequence (rejected drafts).

        Synchronises with the host.

        Args:
            counts_B: int64 [B], at most `counts`.

        Raises:
            ValueError: the model computes segments, of which open ones cannot be taken back.
        """
        if self.stack is not None:
            raise ValueError(
                "rewind: a model of segments, or that deletes tokens, keeps its last state only"
            )
        self._seen, self._counts = counts_B.tolist(), None
        for layer in self._layers:
            layer.rewind(self._seen)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the sequences only, in the order given: others have ended.

        Raises:
            ValueError: the model computes segments, whose rows lie in one table.
        """
        self._refuse_segments("select")
        rows_A = torch.tensor(list(rows), dtype=torch.int64).to(self._device)
        for layer in self._layers:
            layer.select(rows_A)
        self._seen, self._counts = [self.seen[row] for row in rows], None

    def join(self, other: Cache) -> None:
        """Put the sequences of another cache of the model behind one's own: they have begun.

        Raises:
            ValueError: the model computes segments, whose rows lie in one table.
        """
        self._refuse_segments("join")
        for layer, others in zip(self._layers, other._layers, strict=True):
            layer.join(others)
        self._seen, self._counts = self.seen + other.seen, None

    def take(self, other: Cache) -> None:
        """Hold the sequences of another cache of the model, and none of one's own."""
        self._layers, self.stack = other._layers, other.stack
        self._seen, self._counts = other._seen, other._counts

    def _refuse_segments(self, what: str) -> None:
        if self.stack is not None:
            raise ValueError(f"{what}: the rows of a model of segments lie in one table")


def _on(like: Tensor, numbers: Any) -> Tensor:
    """Numbers of the host where a tensor is, without waiting."""
    if isinstance(numbers, list):
        numbers = torch.tensor(numbers, dtype=torch.int64)
    moved: Tensor = numbers.to(like.device)
    return moved


def _by_sequence(items: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
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
