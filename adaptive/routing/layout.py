"""TokenLayout: where each packed token came from.

Shape legend: B sequences, S longest sequence, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.ring.order import RingOrder
from parallel.rows import even_shards


@dataclass(frozen=True)
class TokenLayout:
    """The boundaries and positions of `T` tokens packed from `B` sequences.

    Attributes:
        cu_seqlens: int32 [B+1], cumulative sequence lengths, first 0 and last T.
        max_seqlen: length of the longest sequence, known to the host.
        positions: int64 [T], position of each token within its own sequence. Rotary
            embeddings and causal masks use these, never an index into the pack.
        shard_sizes: where the tokens lie over several ranks (`Mesh.shard_group`), how many each
            holds, in pack order, outside split products; None for an even split.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    shard_sizes: tuple[int, ...] | None = None

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def uniform(self) -> bool:
        """True when every sequence has `max_seqlen` tokens (decided from shapes, no host sync)."""
        return self.tokens == self.batch_size * self.max_seqlen

    @property
    def sequence_ids(self) -> Tensor:
        """int64 [T]: the sequence that each token belongs to."""
        lengths = self.cu_seqlens.diff().long()
        index = torch.arange(self.batch_size, device=lengths.device)
        return torch.repeat_interleave(index, lengths, output_size=self.tokens)

    def ring(self, mesh: Mesh) -> RingOrder:
        """Where tokens lie over the context ranks in ring attention, and how they get there.

        Synchronises with the host at the first call; all layers of a forward share what it made.
        """
        made = self.__dict__.get("_ring")
        if made is None:
            assert mesh.context_group is not None
            shards = self.shard_sizes or even_shards(self.tokens, mesh.shards)
            sizes = mesh.context_sizes(shards)
            # A later forward may train, and cannot save what inference mode made.
            with torch.inference_mode(False):
                made = RingOrder.of(self.positions, self.sequence_ids, sizes, mesh.context_group)
            object.__setattr__(self, "_ring", made)
        return made

    @staticmethod
    def dense(
        batch_size: int, seq_len: int, device: torch.device | str | None = None
    ) -> TokenLayout:
        """The layout of `[B, S]` tokens flattened in row order, with no padding."""
        positions = torch.arange(seq_len, device=device).repeat(batch_size)
        starts = torch.arange(batch_size + 1, device=device, dtype=torch.int32)
        return TokenLayout(starts * seq_len, seq_len, positions)

    @staticmethod
    def from_lengths(
        lengths: Sequence[int], device: torch.device | str | None = None
    ) -> TokenLayout:
        """The layout of sequences of the given lengths, laid end to end."""
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths={list(lengths)}: must be one or more counts, none negative")
        counts = torch.tensor(list(lengths), dtype=torch.int32)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = counts.cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])
        return TokenLayout(cu_seqlens.to(device), max(lengths), positions.to(device))

    def take(self, indices: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> TokenLayout:
        """The layout of the tokens at `indices`, which keep their positions."""
        return TokenLayout(cu_seqlens, max_seqlen, self.positions[indices])


def valid_tokens(token_mask: Tensor) -> Tensor:
    """A mask of valid tokens as bool, its shape unchanged.

    Raises:
        ValueError: if it has a floating dtype. Additive attention masks have: 0 where a token is
            valid and -inf where it is not, the opposite of what `bool` makes of them.
    """
    if token_mask.is_floating_point():
        dtype = str(token_mask.dtype).removeprefix("torch.")
        raise ValueError(
            f"token_mask of dtype {dtype}: must be bool, False at padding "
            "(of an additive mask: mask == 0)"
        )
    return token_mask.bool()


def layout_from_documents(
    documents_BS: Tensor, device: torch.device | str | None = None
) -> tuple[TokenLayout, Tensor]:
    """Several documents in a row, and padding behind them, as sequences of their own.

    Args:
        documents_BS: int64, which of its row's documents a token is of, ascending in each row;
            negative at padding. On the host, so that nothing waits for a device.
        device: of what is returned.

    Returns:
        The layout of the T valid tokens, whose positions begin anew with each document, and their
        flat indices int64 [T].
    """
    indices = (documents_BS >= 0).flatten().nonzero().squeeze(1)
    rows_B1 = torch.arange(documents_BS.shape[0])[:, None] * (documents_BS.shape[1] + 1)
    document_T = (documents_BS + rows_B1).flatten()[indices]
    tokens = len(document_T)
    borders = document_T.diff().nonzero().squeeze(1) + 1
    cu_seqlens = torch.cat([torch.tensor([0]), borders, torch.tensor([tokens])[: tokens > 0]])
    lengths = cu_seqlens.diff()
    positions = torch.arange(tokens) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    max_seqlen = int(lengths.max()) if len(lengths) else 0
    layout = TokenLayout(cu_seqlens.int().to(device), max_seqlen, positions.to(device))
    return layout, indices.to(device)


def layout_from_mask(valid_BS: Tensor) -> tuple[TokenLayout, Tensor]:
    """Drop padding: the layout of the valid tokens, and their flat indices int64 [T].

    Positions count columns from the first valid token of the row, so left padding and right
    padding give the same positions. Synchronises with the host once (the number of valid tokens).
    """
    lengths = valid_BS.sum(1)
    indices = valid_BS.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.zeros(valid_BS.shape[0] + 1, dtype=torch.int32, device=valid_BS.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    positions = (valid_BS.long().cumsum(1) - 1).flatten()[indices]
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    return TokenLayout(cu_seqlens, max_seqlen, positions), indices
