"""How a wrapper meets the block it wraps: layouts in, packed tokens to the block, and back.

Shape legend: B batch, S sequence, T = B*S or packed tokens, R selected tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptive.ops.pack import combine_, pack
from adaptive.routing.layout import TokenLayout, valid_tokens


def flatten_tokens(
    hidden: Tensor, layout: TokenLayout | None, token_mask: Tensor | None
) -> tuple[Tensor, TokenLayout, Tensor | None]:
    """Hidden states at the public border, or inside a model, as `[T, D]` with their layout.

    Args:
        hidden: [B, S, D], or packed [T, D] together with `layout`.
        layout: where packed tokens came from; None for [B, S, D].
        token_mask: bool [B, S] (or [T]), False at padding; None when there is none. Integers are
            taken as `bool` takes them.

    Returns:
        hidden [T, D] (a view where possible), its layout, and the flat mask or None. With padding
        the layout covers all B*S places; positions count from each row's first valid token.
    """
    if hidden.dim() == 2:
        if layout is None:
            raise ValueError("hidden of shape [T, D]: needs layout=, the TokenLayout of the pack")
        return hidden, layout, None if token_mask is None else valid_tokens(token_mask)
    if hidden.dim() != 3:
        raise ValueError(f"hidden of shape {list(hidden.shape)}: must be [B, S, D] or [T, D]")
    batch, seq_len, _ = hidden.shape
    layout = TokenLayout.dense(batch, seq_len, hidden.device)
    if token_mask is None:
        return hidden.flatten(0, 1), layout, None
    if token_mask.shape != (batch, seq_len):
        raise ValueError(
            f"token_mask of shape {list(token_mask.shape)}: must be [{batch}, {seq_len}]"
        )
    valid_BS = valid_tokens(token_mask)
    positions = (valid_BS.long().cumsum(1) - 1).clamp(min=0).flatten()
    layout = TokenLayout(layout.cu_seqlens, layout.max_seqlen, positions)
    return hidden.flatten(0, 1), layout, valid_BS.flatten()


def without_padding(hidden_TD: Tensor, valid_T: Tensor | None) -> Tensor:
    """Zeros at padding: what lies there, a NaN too, reaches no weight's gradient."""
    return hidden_TD if valid_T is None else hidden_TD.masked_fill(~valid_T[:, None], 0)


def run_block(block: nn.Module, packed_RD: Tensor, layout: TokenLayout, **kwargs: Any) -> Tensor:
    """Run a block on packed tokens, whatever it was written for.

    A block with `takes_packed = True` gets `block(packed, layout=…, **kwargs)`. Any other block
    gets `[B, K, D]`: one row a sequence, its tokens in original order, zeros on the right where a
    sequence has fewer. Zeros on the right cannot reach earlier tokens of a causal block; a
    bidirectional block on ragged selections needs its own mask (override `inner`). A block that
    returns a tuple, as those of `transformers` may, is taken at its first element.
    """
    if getattr(block, "takes_packed", False):
        return block(packed_RD, layout=layout, **kwargs)
    return from_rows(_first(block(to_rows(packed_RD, layout), **kwargs)), layout)


def to_rows(packed_RX: Tensor, layout: TokenLayout) -> Tensor:
    """[B, K, X]: one row a sequence, its tokens in order, zeros on the right of shorter ones.

    Args:
        packed_RX: [R, X], anything that belongs to the tokens of `layout`.
        layout: of these tokens; K is its `max_seqlen`.
    """
    if layout.uniform:
        return packed_RX.unflatten(0, (layout.batch_size, layout.max_seqlen))
    shape = (layout.batch_size * layout.max_seqlen, *packed_RX.shape[1:])
    rows = combine_(packed_RX.new_zeros(shape), packed_RX, _places(layout))
    return rows.unflatten(0, (layout.batch_size, layout.max_seqlen))


def from_rows(rows_BKX: Tensor, layout: TokenLayout) -> Tensor:
    """[R, X]: the rows back as packed tokens; what lies on the right of shorter ones is dropped."""
    if layout.uniform:
        return rows_BKX.flatten(0, 1)
    return pack(rows_BKX.flatten(0, 1), _places(layout))


def _places(layout: TokenLayout) -> Tensor:
    """int64 [R]: where each token lies among the flattened rows."""
    sequence_R = layout.sequence_ids
    column_R = torch.arange(layout.tokens, device=sequence_R.device)
    column_R = column_R - layout.cu_seqlens.long()[sequence_R]
    return sequence_R * layout.max_seqlen + column_R


def _first(output: Tensor | tuple[Any, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
