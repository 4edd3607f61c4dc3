"""The tokens of one pass of generation, as the host knows them.

Shape legend: B sequences, T tokens of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive.routing.layout import TokenLayout


class Tokens:
    """How many tokens each sequence brings, and where they stand.

    Layers read numbers of it instead of asking a device; what they make of it (masks, places in a
    cache) is kept for the other layers of the pass.

    Args:
        lengths: new tokens of each of B sequences; 0 where one rests.
        positions: of each token in its sequence, sequence after sequence.
        device: of the tensors made here.
        tree: bool [T, T], which of the pass's tokens each one sees, itself included; None: those
            of its sequence up to itself.
        ids: which tokens of the pass these are, where they were taken from it; None: all.

    Attributes:
        single: every sequence brings one.
        kept: what was made of this pass, by name.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        positions: Sequence[int],
        device: torch.device,
        *,
        tree: Tensor | None = None,
        ids: Sequence[int] | None = None,
    ) -> None:
        self.lengths, self.positions, self.device = tuple(lengths), positions, device
        self.tree, self.ids = tree, ids
        self.count = len(positions)
        self.single = self.count == len(self.lengths) and max(self.lengths) == 1
        self.kept: dict[Any, Any] = {}
        self._layout: TokenLayout | None = None
        self._positions_T: Tensor | None = None

    @staticmethod
    def of(layout: TokenLayout) -> Tokens:
        """Those of a layout. Synchronises with the host."""
        lengths, positions = layout.cu_seqlens.diff().tolist(), layout.positions.tolist()
        tokens = Tokens(lengths, positions, layout.positions.device)
        tokens._layout = layout
        return tokens

    @property
    def layout(self) -> TokenLayout:
        """The same for modules that compute on packed tokens."""
        if self._layout is None:
            packed = TokenLayout.from_lengths(self.lengths, self.device)
            self._layout = TokenLayout(packed.cu_seqlens, packed.max_seqlen, self.positions_T)
        return self._layout

    @property
    def positions_T(self) -> Tensor:
        if self._positions_T is None:
            self._positions_T = torch.tensor(list(self.positions)).to(self.device)
        return self._positions_T

    @property
    def sequences(self) -> list[int]:
        """The sequence of each token."""
        return [row for row, length in enumerate(self.lengths) for _ in range(length)]

    def names(self) -> Sequence[int]:
        """Which tokens of the pass these are."""
        return range(self.count) if self.ids is None else self.ids

    def take(self, rows: Sequence[int]) -> Tokens:
        """Some of them, ascending; sequences without one rest."""
        if len(rows) == self.count:
            return self
        lengths, sequences, names = [0] * len(self.lengths), self.sequences, self.names()
        for row in rows:
            lengths[sequences[row]] += 1
        return Tokens(
            lengths,
            [self.positions[row] for row in rows],
            self.device,
            tree=self.tree,
            ids=[names[row] for row in rows],
        )
