"""The keys and values of earlier tokens, so that generation computes each token once.

Every layer keeps its own: a routed layer holds only the tokens that it processed.

Shape legend: B sequences, C places of a row, T packed tokens, G key-value heads, h head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.routing.layout import TokenLayout

_SMALLEST = 16
"""Places that a row has from the beginning; rows double when they are full."""


class LayerCache:
    """Keys and values of one layer: `[B, C, G, h]`, filled from the left, and their number.

    Attributes:
        lengths: int64 [B], tokens held for each sequence. Replaced, never changed in place.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.places = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        # What the host knows without asking the device.
        self._tokens = 0
        self._longest_at_most = 0

    @property
    def bytes(self) -> int:
        """Memory that keys and values take."""
        stored = [x for x in (self._keys, self._values) if x is not None]
        return sum(x.numel() * x.element_size() for x in stored)

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
        self._reserve(k_TGh, v_TGh, layout.max_seqlen)
        assert self._keys is not None
        assert self._values is not None
        rows_T = layout.sequence_ids
        starts_B = layout.cu_seqlens.long()
        offset_T = torch.arange(layout.tokens, device=rows_T.device) - starts_B[rows_T]
        place_T = self.lengths[rows_T] + offset_T
        self._keys[rows_T, place_T] = k_TGh.detach()
        self._values[rows_T, place_T] = v_TGh.detach()
        self.places[rows_T, place_T] = layout.positions
        self.lengths = self.lengths + starts_B.diff()
        self._tokens += layout.tokens
        self._longest_at_most += layout.max_seqlen
        return self._packed()

    def rewind(self, counts_B: Tensor) -> None:
        """Forget the tokens whose position is `counts_B` or more. Synchronises with the host."""
        column_C = torch.arange(self.places.shape[1], device=self.places.device)
        held_BC = column_C < self.lengths[:, None]
        self.lengths = (held_BC & (self.places < counts_B[:, None])).sum(1)
        self._tokens, self._longest_at_most = self._counts()

    def _packed(self) -> tuple[Tensor, Tensor, TokenLayout]:
        assert self._keys is not None
        assert self._values is not None
        batch = self.lengths.shape[0]
        longest = self._longest_at_most
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=self.lengths.device)
        cu_seqlens[1:] = self.lengths.cumsum(0)
        if self._tokens == batch * longest:
            stored = [x[:, :longest].flatten(0, 1) for x in self._stored]
        else:
            column_C = torch.arange(self.places.shape[1], device=self.places.device)
            held = (column_C < self.lengths[:, None]).flatten()
            index_T = torch.nonzero_static(held, size=self._tokens).squeeze(1)
            stored = [x.flatten(0, 1).index_select(0, index_T) for x in self._stored]
        keys, values, positions = stored
        return keys, values, TokenLayout(cu_seqlens, longest, positions)

    @property
    def _stored(self) -> list[Tensor]:
        assert self._keys is not None
        assert self._values is not None
        return [self._keys, self._values, self.places]

    def _reserve(self, k_TGh: Tensor, v_TGh: Tensor, more: int) -> None:
        """Make room for `more` tokens in every row."""
        room = self.places.shape[1]
        if self._keys is not None and self._longest_at_most + more > room:
            # The bound counts the longest share of every step: ask before growing.
            self._longest_at_most = self._counts()[1]
        needed = self._longest_at_most + more
        if self._keys is not None and needed <= room:
            return
        room = max(needed, 2 * room, _SMALLEST)
        batch = self.lengths.shape[0]
        old_keys, old_values, old_places = self._keys, self._values, self.places
        self._keys = k_TGh.new_zeros(batch, room, *k_TGh.shape[1:])
        self._values = v_TGh.new_zeros(batch, room, *v_TGh.shape[1:])
        self.places = old_places.new_zeros(batch, room)
        if old_keys is not None and old_values is not None:
            held = old_places.shape[1]
            self._keys[:, :held] = old_keys
            self._values[:, :held] = old_values
            self.places[:, :held] = old_places

    def _counts(self) -> tuple[int, int]:
        """Tokens held, and the longest row's. Synchronises with the host."""
        tokens, longest = torch.stack([self.lengths.sum(), self.lengths.max()]).tolist()
        return tokens, longest


class Cache:
    """The cache of a decoder: give it to `Decoder(...)(ids, cache=cache)` with the tokens to come.

    Args:
        model: a Decoder; it is asked for its number of layers.
        batch_size: sequences, the same ones in the same order in every call.

    A call may bring prompts of different lengths (padded, with a `token_mask`), then one token for
    each sequence, or several; a sequence whose mask is False throughout brings none.

    Attributes:
        counts: int64 [B], tokens seen of each sequence: the position of the next.
        stack: what the model's `stack` keeps of them (`SegmentState`); None: nothing.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        device = next(model.parameters()).device
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.stack: Any = None
        layers = model.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        self._layers = [LayerCache(batch_size, device) for _ in layers]

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
        self.counts = self.counts + layout.cu_seqlens.diff()
        return replace(layout, positions=positions)

    def rewind(self, counts_B: Tensor) -> None:
        """Forget all but the first `counts_B` tokens of every sequence (rejected drafts).

        Args:
            counts_B: int64 [B], at most `counts`.

        Raises:
            ValueError: the model computes segments, of which open ones cannot be taken back.
        """
        if self.stack is not None:
            raise ValueError("rewind: a model of segments keeps the sum of an open one only")
        for layer in self._layers:
            layer.rewind(counts_B)
        self.counts = counts_B.clone()
