"""Selection: which tokens of a batch take part, in original order, with which weights.

Shape legend: B sequences, S longest sequence, T tokens of the source, R = T' selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh
from parallel.rows import even_shards, rows_of_rank


@dataclass(frozen=True)
class Selection:
    """The tokens that a depth router chose (Mixture-of-Depths, SkipLayer, SPRINT).

    Attributes:
        indices: int64 [R], into the flattened tokens of the source (`[B*S]` or a pack),
            ascending, so that causal order survives.
        cu_seqlens: int32 [B+1], cumulative number of selected tokens a sequence.
        max_seqlen: most tokens selected in one sequence (an upper bound is allowed).
        weights: float [R] or None, differentiable: what the block's update is multiplied by.
        batch_size: B.
        seq_len: longest sequence of the source.
        positions: int64 [R], original position of each selected token in its sequence.
        shard_sizes: where the source lies over several ranks, how many of the selected tokens each
            holds; `indices` and `weights` are then this rank's alone (see `on_shard`),
            while `cu_seqlens` and `positions` stay those of all.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    weights: Tensor | None
    batch_size: int
    seq_len: int
    positions: Tensor
    shard_sizes: tuple[int, ...] | None = None

    @property
    def layout(self) -> TokenLayout:
        """The selected tokens as a pack of their own."""
        return TokenLayout(self.cu_seqlens, self.max_seqlen, self.positions, self.shard_sizes)

    @property
    def tokens(self) -> int:
        """Number of selected tokens that this rank holds, R."""
        return self.indices.shape[0]

    def on_shard(self, source: TokenLayout, mesh: Mesh) -> Selection:
        """The same choice, as this rank sees it where a pack lies over several ranks.

        A router gathers scores, chooses over whole sequences, and then calls this: `indices` now
        address the rows that this rank holds, so `pack`, `combine` and `mask` work on them, and
        `layout` says where every rank's rows lie. Where each rank holds whole sequences, itself.
        Synchronises with the host once.
        """
        if mesh.shards == 1:
            return self
        sizes = source.shard_sizes or even_shards(source.tokens, mesh.shards)
        indices, shard_sizes = rows_of_rank(self.indices, sizes, mesh.shard_rank)
        return replace(self, indices=indices, shard_sizes=shard_sizes)

    def of_sequences(self, sequences_M: Tensor) -> Selection:
        """The same tokens of some sequences only, as a choice from a batch of M.

        To be called before `on_shard`. Synchronises with the host once where sequences have
        different numbers of tokens, otherwise never.

        Args:
            sequences_M: int64 [M], ascending, on any device.
        """
        lengths_B = self.cu_seqlens.diff()
        sequences_M = sequences_M.to(lengths_B.device)
        lengths_M = lengths_B[sequences_M]
        cu_seqlens = torch.zeros(len(sequences_M) + 1, dtype=torch.int32, device=lengths_B.device)
        cu_seqlens[1:] = lengths_M.cumsum(0)
        if self.layout.uniform:
            rows, longest = len(sequences_M) * self.max_seqlen, self.max_seqlen
        else:
            rows, longest = torch.stack([lengths_M.sum(), lengths_M.amax()]).tolist()
        shift_M = self.cu_seqlens[sequences_M] - cu_seqlens[:-1]
        shift_R = torch.repeat_interleave(shift_M, lengths_M, output_size=rows)
        kept_R = torch.arange(rows, device=shift_R.device) + shift_R
        return replace(
            self,
            indices=self.indices[kept_R],
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            weights=None if self.weights is None else self.weights[kept_R],
            batch_size=len(sequences_M),
            positions=self.positions[kept_R],
        )

    def with_weights(self, weights: Tensor | None) -> Selection:
        return replace(self, weights=weights)

    def mask(self, source_tokens: int) -> Tensor:
        """bool [source_tokens]: True where a token of the source was selected."""
        chosen = torch.zeros(source_tokens, dtype=torch.bool, device=self.indices.device)
        # `chosen[indices] = True` would copy a number from the host, and wait.
        chosen.index_fill_(0, self.indices, True)
        return chosen

    @staticmethod
    def whole(layout: TokenLayout) -> Selection:
        """Every token of `layout`."""
        return Selection(
            indices=torch.arange(layout.tokens, device=layout.positions.device),
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            weights=None,
            batch_size=layout.batch_size,
            seq_len=layout.max_seqlen,
            positions=layout.positions,
        )

    @staticmethod
    def nothing(layout: TokenLayout) -> Selection:
        """No token of `layout`."""
        return Selection(
            indices=layout.positions[:0],
            cu_seqlens=torch.zeros_like(layout.cu_seqlens),
            max_seqlen=0,
            weights=None,
            batch_size=layout.batch_size,
            seq_len=layout.max_seqlen,
            positions=layout.positions[:0],
        )

    @staticmethod
    def from_mask(chosen_T: Tensor, layout: TokenLayout) -> Selection:
        """Select the tokens of `layout` where `chosen_T` is True.

        Synchronises with the host once, for the number of selected tokens and the longest share.
        """
        return Selection.from_masks(chosen_T[:, None], layout)[0]

    @staticmethod
    def from_masks(chosen_TU: Tensor, layout: TokenLayout) -> list[Selection]:
        """One Selection a column: the tokens of each of U units. They may overlap.

        Synchronises with the host once for all of them.
        """
        tokens, units = chosen_TU.shape
        if tokens == layout.batch_size == 1:  # a text that grows by a token
            return [
                Selection.whole(layout) if taken else Selection.nothing(layout)
                for taken in chosen_TU[0].tolist()
            ]
        running = torch.zeros(tokens + 1, units, dtype=torch.int32, device=chosen_TU.device)
        running[1:] = chosen_TU.cumsum(0)
        cu_seqlens = running[layout.cu_seqlens.long()]
        # With a row of zeros: a batch of no sequence has no longest one.
        lengths = torch.cat([running[:1], cu_seqlens.diff(dim=0)])
        counts, longest = torch.stack([cu_seqlens[-1], lengths.amax(0)]).tolist()
        selections = []
        for unit in range(units):
            chosen = torch.nonzero_static(chosen_TU[:, unit], size=counts[unit]).squeeze(1)
            selections.append(
                Selection(
                    indices=chosen,
                    cu_seqlens=cu_seqlens[:, unit].contiguous(),
                    max_seqlen=longest[unit],
                    weights=None,
                    batch_size=layout.batch_size,
                    seq_len=layout.max_seqlen,
                    positions=layout.positions[chosen],
                )
            )
        return selections
