"""How a wrapper meets the block it wraps: layouts in, packed tokens to the block, and back.

Shape legend: B batch, S sequence, T = B*S or packed tokens, R selected tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaptive.blocks.chosen_attention import attention_mask_of, attention_of
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
    sequence has fewer (see `to_rows`). Zeros on the right cannot reach earlier tokens of a causal
    block; a bidirectional block on ragged selections needs its own mask (override `inner`). A block
    that returns a tuple, as those of `transformers` may, is taken at its first element. A layer of
    `transformers`, causal or not, that is given `attention_mask=None` gets the mask of the chosen
    tokens, by their original positions, for the attention that it was made with: see
    `attention_mask_of`.

    Raises:
        ValueError: if the block returns anything but hidden states of the shape that it was given,
            or changes them in place; if its attention cannot be told what the chosen tokens see.
    """
    version = _version(packed_RD)
    if getattr(block, "takes_packed", False):
        given, output = packed_RD, block(packed_RD, layout=layout, **kwargs)
    else:
        given = to_rows(packed_RD, layout)
        attention = attention_of(block)
        if attention is not None and kwargs.get("attention_mask") is None:
            rows_BK = (to_rows(layout.positions[:, None], layout)[..., 0], filled_columns(layout))
            kwargs["attention_mask"] = attention_mask_of(attention, *rows_BK, given.dtype)
        output = block(given, **kwargs)
    output = output[0] if isinstance(output, tuple) and output else output
    name = type(block).__name__
    if not isinstance(output, Tensor) or output.shape != given.shape:
        is_tensor = isinstance(output, Tensor)
        what = f"shape {list(output.shape)}" if is_tensor else type(output).__name__
        raise ValueError(
            f"{name} returned {what}: must return the updated hidden states, {list(given.shape)}"
        )
    if _version(packed_RD) != version:
        raise ValueError(
            f"{name} changed its input in place: must leave it as it is (x = x + y, not x += y), "
            "since the update is the difference to it"
        )
    return output if given is packed_RD else from_rows(output, layout)


def to_rows(packed_RX: Tensor, layout: TokenLayout) -> Tensor:
    """[B, K, X]: one row a sequence, its tokens in order, zeros on the right of shorter ones.

    Where no sequence has a token, K is 1 and all is zero: a block runs all the same (every
    parameter takes part on every rank), and many cannot run on rows without columns.

    Args:
        packed_RX: [R, X], anything that belongs to the tokens of `layout`.
        layout: of these tokens; K is its `max_seqlen`, at least 1.
    """
    if layout.uniform and layout.max_seqlen:
        return packed_RX.unflatten(0, (layout.batch_size, layout.max_seqlen))
    columns = max(layout.max_seqlen, 1)
    rows = packed_RX.new_zeros((layout.batch_size * columns, *packed_RX.shape[1:]))
    return combine_(rows, packed_RX, _places(layout)).unflatten(0, (layout.batch_size, columns))


def from_rows(rows_BKX: Tensor, layout: TokenLayout) -> Tensor:
    """[R, X]: the rows back as packed tokens; what lies on the right of shorter ones is dropped."""
    if layout.uniform and layout.max_seqlen:
        return rows_BKX.flatten(0, 1)
    return pack(rows_BKX.flatten(0, 1), _places(layout))


def filled_columns(layout: TokenLayout) -> Tensor | None:
    """bool [B, K]: where the rows of `to_rows` hold a token; None: everywhere."""
    if layout.uniform and layout.max_seqlen:
        return None
    columns = torch.arange(max(layout.max_seqlen, 1), device=layout.cu_seqlens.device)
    return columns < layout.cu_seqlens.diff()[:, None]


def _places(layout: TokenLayout) -> Tensor:
    """int64 [R]: where each token lies among the flattened rows."""
    sequence_R = layout.sequence_ids
    column_R = torch.arange(layout.tokens, device=sequence_R.device)
    column_R = column_R - layout.cu_seqlens.long()[sequence_R]
    return sequence_R * layout.max_seqlen + column_R


def _version(tensor: Tensor) -> int:
    """How often it was written to; not known under `inference_mode`, nor to a compiler."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def held_keys(kwargs: dict[str, Any]) -> Tensor | None:
    """int64 [B]: keys that each sequence's tokens attended to, where what a wrapper was given for
    its block holds earlier ones (a `cache`, or the `call` of a layer of transformers); else None.
    """
    holder = kwargs.get("call") if kwargs.get("cache") is None else kwargs["cache"]
    return getattr(holder, "lengths", None)


def refuse_cache(block: nn.Module, kwargs: dict[str, Any], layout: TokenLayout) -> None:
    """A cache of `transformers` would hold chosen tokens, and zeros, as if they were the text.

    One that is made for this forward alone, as in training, holds no more than its tokens, and
    nothing yet of the wrapped layer.

    Args:
        block: the wrapped layer.
        kwargs: what the wrapper was given for it.
        layout: of all tokens of this forward.
    """
    cache = kwargs.get("past_key_values")
    if cache is None:
        return
    attention = attention_of(block)
    index = None if attention is None else getattr(attention, "layer_idx", None)
    own = 0 if index is None else int(cache.get_seq_length(index))
    held = max(own, int(cache.get_seq_length()))
    if own or held > layout.max_seqlen:
        raise ValueError(
            f"past_key_values of {held} tokens: a wrapped layer cannot continue from a cache that "
            "is not its own; call the model with use_cache=False"
        )
