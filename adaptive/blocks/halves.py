"""The two halves of a decoder layer, each with its residual, for what routes one of them.

Shape legend: T tokens, R of them, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptive.ops.pack import pack
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection

_PARTS = ("attention_norm", "attention", "ffn_norm", "ffn")


def check_halves(block: nn.Module, granularity: str) -> None:
    """Raise ValueError if a block has no halves to route one of."""
    missing = [name for name in _PARTS if not hasattr(block, name)]
    if missing:
        raise ValueError(
            f"granularity={granularity!r}: needs a block with {', '.join(_PARTS)}; "
            f"{type(block).__name__} has no {missing[0]}"
        )


def attend(
    block: Any, hidden_TD: Tensor, layout: TokenLayout, queries: Selection | None, **kwargs: Any
) -> Tensor:
    """The attention half of a decoder layer, residual included, for all tokens or `queries`."""
    normed_TD = block.attention_norm(hidden_TD)
    if queries is None:
        return hidden_TD + block.attention(normed_TD, layout=layout, **kwargs)
    update_RD = block.attention(
        pack(normed_TD, queries.indices),
        layout=queries.layout,
        context=(normed_TD, layout),
        **kwargs,
    )
    return pack(hidden_TD, queries.indices) + update_RD


def feed_forward(block: Any, hidden_TD: Tensor, layout: TokenLayout) -> Tensor:
    """The feed-forward half of a decoder layer, residual included."""
    return hidden_TD + block.ffn(block.ffn_norm(hidden_TD), layout=layout)
