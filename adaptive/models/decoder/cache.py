"""The keys and values of earlier tokens, so that generation computes each token once.

Every layer keeps its own: a routed layer holds only the tokens that it processed.

Shape legend: B sequences, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.models.decoder.layer_cache import LayerCache
from adaptive.models.decoder.tokens import Tokens
from adaptive.routing.layout import TokenLayout


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
