"""What chosen tokens attend to, in the form in which a layer of `transformers` wants to be told.

Its model made a mask, or counts on an order, for all tokens; a wrapped layer gets a few of them.

Shape legend: B sequences, K columns of the chosen tokens' rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def chosen_mask(
    positions_BK: Tensor,
    valid_BK: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Who sees whom among chosen tokens, by their original positions.

    Args:
        positions_BK: int64 [B, K], ascending in each row.
        valid_BK: bool [B, K], False where a row has no token: nobody sees that. None: all True.
        window: a token sees the `window` positions that end with its own, chosen or not; None:
            every earlier one.
        causal: a token sees no later one; else all see all, and there is no window.

    Returns:
        bool [B, 1, K, K], True where the query (third axis) sees the key. What is no token sees
        itself alone, so that no row of a softmax is empty.
    """
    distance_BKK = positions_BK[:, :, None] - positions_BK[:, None, :]
    seen_BKK = distance_BKK >= 0 if causal else torch.ones_like(distance_BKK, dtype=torch.bool)
    if window is not None:
        seen_BKK = seen_BKK & (distance_BKK < window)
    if valid_BK is not None:
        seen_BKK = seen_BKK & valid_BK[:, None, :] & valid_BK[:, :, None]
        seen_BKK = seen_BKK | torch.diag_embed(~valid_BK)
    return seen_BKK[:, None]


def attention_of(block: nn.Module) -> Any:
    """The attention of a layer of `transformers`, a causal one first; None in any other block."""
    found = None
    for module in block.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "is_causal") and hasattr(config, "_attn_implementation"):
            if module.is_causal:
                return module
            found = found or module
    return found


def attention_window(attention: Any) -> int | None:
    """Positions that an attention of `transformers` looks back at, its own included; None: all.

    Raises:
        ValueError: it looks back in another way than a sliding window.
    """
    config, index = attention.config, getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and index is not None else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(
            f"layer_types[{index}]={kind!r}: a wrapped layer must have full_attention or "
            "sliding_attention; override inner and give the chosen tokens a mask of their own"
        )
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if kind == "full_attention" or getattr(config, "use_sliding_window", None) is False:
        return None
    return getattr(config, "sliding_window", None)


def attention_mask_of(
    attention: Any, positions_BK: Tensor, valid_BK: Tensor | None, dtype: torch.dtype
) -> Tensor | BlockMask | None:
    """`attention_mask=` of an attention of `transformers` that is given chosen tokens alone.

    Args:
        attention: see `attention_of`.
        positions_BK, valid_BK: see `chosen_mask`; tokens fill each row from the left.
        dtype: of the hidden states.

    Returns:
        None where SDPA's own causal path is right, or all tokens see all.

    Raises:
        ValueError: the implementation is none of sdpa, eager and flex_attention. flash-attention
            counts windows, and finds the borders of documents, by the columns of a row.
    """
    implementation = attention.config._attn_implementation
    causal = bool(attention.is_causal)
    if not causal and valid_BK is None:
        return None
    window = attention_window(attention) if causal else None
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise ValueError(
            f"attn_implementation={implementation!r}: a wrapped layer needs sdpa, eager or "
            "flex_attention, to be told which of the chosen tokens see which"
        )
    if implementation == "sdpa" and window is None and causal:
        return None
    seen_B1KK = chosen_mask(positions_BK, valid_BK, window=window, causal=causal)
    if implementation == "sdpa":
        return seen_B1KK
    if implementation == "eager":
        hidden = torch.zeros(seen_B1KK.shape, dtype=dtype, device=seen_B1KK.device)
        return hidden.masked_fill(~seen_B1KK, torch.finfo(dtype).min)
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, columns, _ = seen_B1KK.shape
    return create_block_mask(
        lambda b, _, query, key: seen_B1KK[b, 0, query, key],
        batch,
        None,
        columns,
        columns,
        device=str(seen_B1KK.device),
    )
