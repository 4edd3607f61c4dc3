"""The attention of a layer of transformers, and what chosen tokens see there.

The model made a mask for all tokens of the text, so whatever it says of two of them (causal order,
windows, chunks, padding, documents) is read off for the chosen ones.

Shape legend: B sequences, S tokens of this forward, K chosen columns, N keys (held and chosen).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def attentions(layer: nn.Module) -> list[Any]:
    """The attentions of a layer: modules that say whether they are causal, and have a config."""
    return [
        module
        for module in layer.modules()
        if hasattr(module, "is_causal") and hasattr(module, "config")
    ]


def layer_index(attention: Any) -> int | None:
    """The layer that an attention is of, as it tells a cache; None: it tells none."""
    return getattr(attention, "layer_idx", getattr(attention, "layer_id", None))


def mask_by_columns(layer: nn.Module) -> str | None:
    """The name of a mask that a layer has of its own, beyond causal order; None: it has none."""
    for name, buffer in layer.named_buffers():
        if buffer.dim() < 2 or buffer.dtype not in (torch.bool, torch.uint8):
            continue
        square = buffer.reshape(-1, *buffer.shape[-2:])[0]
        if square.shape[0] != square.shape[1] or not square.equal(torch.ones_like(square).tril()):
            return name
    return None


def token_mask(mask: Any, batch_size: int, seq_len: int) -> Tensor | None:
    """bool [B, S]: the tokens of this forward that are no padding: those that see themselves.

    Args:
        mask: what the model made for a layer: None, [B, 1, S, N] bool or additive, a BlockMask, or
            [B, N] of padding; the last S of the N keys are the tokens of this forward.

    Raises:
        ValueError: it is of another shape.
    """
    if mask is None:
        return None
    device = mask.device if isinstance(mask, Tensor) else mask.kv_indices.device
    query_S = torch.arange(seq_len, device=device)
    if not isinstance(mask, Tensor):
        keys = mask.seq_lengths[1]
        row_B1 = torch.arange(batch_size, device=device)[:, None]
        head = torch.zeros((), dtype=torch.long, device=device)
        key_S = query_S + keys - seq_len
        return mask.mask_mod(row_B1, head, query_S, key_S).expand(batch_size, seq_len)
    if mask.dim() == 2 and mask.shape[0] == batch_size and mask.shape[1] >= seq_len:
        return mask[:, mask.shape[1] - seq_len :].bool()
    if mask.dim() != 4 or mask.shape[-2] not in (1, seq_len) or mask.shape[-1] < seq_len:
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)}: must be [{batch_size}, 1, {seq_len}, "
            f"{seq_len} or more], as the model makes it for its layers"
        )
    mask = mask.expand(batch_size, -1, seq_len, -1)
    own_BS = mask[:, 0, query_S, query_S + mask.shape[-1] - seq_len]
    return own_BS if own_BS.dtype == torch.bool else own_BS > torch.finfo(own_BS.dtype).min / 2


def mask_of_chosen(
    mask: Any,
    attention: Any,
    *,
    seq_len: int,
    columns_BK: Tensor,
    keys_BN: Tensor,
    earlier: int,
    dtype: torch.dtype,
) -> Tensor | BlockMask:
    """The mask of chosen tokens, in the form in which the layer was given that of all.

    Args:
        mask: of all tokens, as for `token_mask`; None: nothing but causal order, or not even that,
            as `attention` is made for.
        attention: of the layer.
        seq_len: S.
        columns_BK: int64, column of each chosen token in this forward; -1 where a row has none.
        keys_BN: int64, columns of the text of held tokens and, last, of the K chosen; -1: none.
        earlier: columns of the text before this forward.
        dtype: of the hidden states.

    Returns:
        What is no token sees itself alone, so that no row of a softmax is empty.
    """
    real_BK = columns_BK >= 0
    alone_BKN = F.pad(torch.diag_embed(~real_BK), (keys_BN.shape[1] - real_BK.shape[1], 0))
    visible_BKN = (keys_BN >= 0)[:, None, :] & real_BK[:, :, None]
    if mask is None:
        if attention.is_causal:
            visible_BKN &= keys_BN[:, None, :] <= (columns_BK + earlier)[:, :, None]
        return _in_form(attention, (visible_BKN | alone_BKN)[:, None], dtype)
    # The model's mask may begin later than the text, where no layer of this kind looks back so far.
    last = mask.shape[-1] if isinstance(mask, Tensor) else mask.seq_lengths[1]
    keys_BN = keys_BN - (earlier + seq_len - last)
    visible_BKN &= (keys_BN >= 0)[:, None, :]
    columns_BK, keys_BN = columns_BK.clamp(min=0), keys_BN.clamp(min=0)
    if not isinstance(mask, Tensor):
        return _block_mask(
            lambda b, h, q, k: (
                (mask.mask_mod(b, h, columns_BK[b, q], keys_BN[b, k]) & visible_BKN[b, q, k])
                | alone_BKN[b, q, k]
            ),
            visible_BKN,
        )
    rows_B11 = torch.arange(len(keys_BN), device=mask.device)[:, None, None]
    whole = mask.expand(len(keys_BN), -1, seq_len, -1)
    chosen = whole[rows_B11, :, columns_BK[:, :, None], keys_BN[:, None, :]].movedim(-1, 1)
    if chosen.dtype == torch.bool:
        return (chosen & visible_BKN[:, None]) | alone_BKN[:, None]
    chosen = chosen.masked_fill(~visible_BKN[:, None], torch.finfo(chosen.dtype).min)
    return chosen.masked_fill(alone_BKN[:, None], 0)


def _in_form(attention: Any, seen_B1KN: Tensor, dtype: torch.dtype) -> Tensor | BlockMask:
    """A mask as the layer's implementation of attention takes it."""
    implementation = attention.config._attn_implementation
    if implementation == "flex_attention":
        return _block_mask(lambda b, _, q, k: seen_B1KN[b, 0, q, k], seen_B1KN[:, 0])
    if implementation == "sdpa":
        return seen_B1KN
    additive = torch.zeros(seen_B1KN.shape, dtype=dtype, device=seen_B1KN.device)
    return additive.masked_fill(~seen_B1KN, torch.finfo(dtype).min)


def _block_mask(mask_mod: Any, like_BKN: Tensor) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, queries, keys = like_BKN.shape
    device = str(like_BKN.device)
    return create_block_mask(mask_mod, batch, None, queries, keys, device=device)
