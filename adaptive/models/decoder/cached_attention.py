"""Attention of new tokens to what a layer's cache holds, without packing.

Shape legend: T packed tokens, A sequences that ask, W queries of each, H query heads, G key-value
heads, g query heads of one of those, h head width, n keys held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.models.decoder.layer_cache import LayerCache, by_sequence, on_device_of
from adaptive.models.decoder.tokens import Tokens

_ONE_BY_ONE = 4
"""Sequences up to which a call each costs less than padding and a mask."""
_PADDED = 16
"""New tokens of a sequence up to which those of several sequences are padded to one call."""


def attend(cache: LayerCache, q_THh: Tensor, tokens: Tokens, window: int | None = None) -> Tensor:
    """Attention [T, H, h] of queries, which are of the newest tokens, to what they see.

    Args:
        q_THh: [T, H, h], at their positions.
        tokens: which they are.
        window: positions that one sees, its own included; None: all earlier ones.
    """
    held = cache.held
    if window is not None and not cache.moved and max(held) <= window:
        window = None
    one_each = cache.one_each and tokens.tree is None
    all_held = one_each and window is None
    equal = tokens.single and held.count(held[0]) == len(held)
    if one_each and equal and (window is None or not cache.moved):
        k_BGnh, v_BGnh = cache.keys_and_values(held[0])
        if window is not None:  # places are positions
            k_BGnh, v_BGnh = k_BGnh[:, :, -window:], v_BGnh[:, :, -window:]
        # The queries of a group of heads stand beside each other: one key-value head each.
        q_BGgh = q_THh.unflatten(1, (cache.heads, -1))
        return F.scaled_dot_product_attention(q_BGgh, k_BGnh, v_BGnh).flatten(1, 2)
    asking = [row for row, count in enumerate(tokens.lengths) if count]
    width = max(tokens.lengths)
    if len(asking) > _ONE_BY_ONE and width <= _PADDED:
        return _attend_padded(cache, q_THh, tokens, asking, width, window)
    parts, start = [], 0
    for row in asking:
        count = tokens.lengths[row]
        k_1Gnh, v_1Gnh = cache.keys_and_values(held[row], [row])
        # The first piece of a text, all of whose tokens ask, needs no mask.
        first = count == held[row] and tokens.tree is None and window is None
        mask = None
        if not (first or all_held):
            mask = _visible(cache, tokens, [row], count, held[row], window)
        out_1HSh = F.scaled_dot_product_attention(
            q_THh[start : start + count].transpose(0, 1)[None],
            k_1Gnh,
            v_1Gnh,
            mask,
            is_causal=first and count > 1,
            enable_gqa=q_THh.shape[1] != cache.heads,
        )
        parts.append(out_1HSh[0].transpose(0, 1))
        start += count
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_padded(
    cache: LayerCache,
    q_THh: Tensor,
    tokens: Tokens,
    asking: list[int],
    width: int,
    window: int | None,
) -> Tensor:
    longest = max(cache.held[row] for row in asking)
    rows = None if len(asking) == len(cache.held) else asking
    k_AGnh, v_AGnh = cache.keys_and_values(longest, rows)
    mask_A1Wn = _visible(cache, tokens, asking, width, longest, window)
    if width == 1:
        q_AGgh = q_THh.unflatten(1, (cache.heads, -1))
        return F.scaled_dot_product_attention(q_AGgh, k_AGnh, v_AGnh, mask_A1Wn).flatten(1, 2)
    at_T = tokens.kept.get(("padded", width))
    if at_T is None:
        columns = [c for row in asking for c in range(tokens.lengths[row])]
        lines = [line for line, row in enumerate(asking) for _ in range(tokens.lengths[row])]
        at_T = on_device_of(q_THh, [a * width + c for a, c in zip(lines, columns, strict=True)])
        tokens.kept["padded", width] = at_T
    padded = q_THh.new_zeros(len(asking) * width, *q_THh.shape[1:]).index_copy_(0, at_T, q_THh)
    out_AHWh = F.scaled_dot_product_attention(
        padded.unflatten(0, (-1, width)).transpose(1, 2),
        k_AGnh,
        v_AGnh,
        mask_A1Wn,
        enable_gqa=q_THh.shape[1] != cache.heads,
    )
    return out_AHWh.transpose(1, 2).flatten(0, 1).index_select(0, at_T)


def _visible(
    cache: LayerCache,
    tokens: Tokens,
    asking: list[int],
    width: int,
    longest: int,
    window: int | None,
) -> Tensor:
    """bool [A, 1, W, n]: the held tokens that each query sees; at padding, the first."""
    held = cache.held
    key = (width, longest, window, tuple(held), tuple(asking))
    if not cache.moved and key in tokens.kept:
        return tokens.kept[key]
    positions = by_sequence(tokens.positions, tokens.lengths)
    lines = [positions[row] + [0] * (width - len(positions[row])) for row in asking]
    seen_AW1 = on_device_of(cache.places, lines)[:, :, None]
    count_A11 = on_device_of(cache.places, [held[row] for row in asking])[:, None, None]
    column_n = torch.arange(longest, device=cache.places.device)
    places_An = cache.places[:, :longest]
    if len(asking) < len(held):
        places_An = places_An.index_select(0, on_device_of(cache.places, asking))
    mask_AWn = (places_An[:, None] <= seen_AW1) & (column_n < count_A11)
    if tokens.tree is not None:
        assert cache.fresh is not None
        names = by_sequence(tokens.names(), tokens.lengths)
        for line, row in enumerate(asking):
            fresh, start = cache.fresh.names[row], cache.fresh.starts[row]
            seen = on_device_of(cache.places, tokens.tree[names[row]][:, fresh])
            mask_AWn[line, : len(names[row]), start : start + len(fresh)] = seen
    if window is not None:
        mask_AWn &= places_An[:, None] > seen_AW1 - window
    if not cache.moved:
        tokens.kept[key] = mask_AWn[:, None]
    return mask_AWn[:, None]
