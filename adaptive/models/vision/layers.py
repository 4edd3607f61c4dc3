"""The layers of a vision transformer: attention with biases, feed-forward, pre-norm block.

Shape legend: T packed tokens, D width, F feed-forward width, H heads, h head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.token_merging import Heads
from adaptive.models.diffusion.layers import AxialRotary, ColumnLinear, RowLinear, rotate_pairs
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.masked_attention import masked_attention
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh
from parallel.tensor import enter_tensor_region, leave_tensor_region


class VisionAttention(nn.Module):
    """Bidirectional attention with biases; with `rotary`, patches turn with row and column.

    Under tensor parallelism the heads are split.
    """

    def __init__(
        self, dim: int, num_heads: int, *, prefix: int = 0, mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.heads = num_heads // mesh.tensor
        self.prefix = prefix
        self.query = ColumnLinear(dim, dim, mesh=mesh)
        self.key = ColumnLinear(dim, dim, mesh=mesh)
        self.value = ColumnLinear(dim, dim, mesh=mesh)
        self.output = RowLinear(dim, dim, mesh=mesh)

    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: TokenLayout,
        rotary: AxialRotary | None = None,
        key_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Heads]:
        """The update [T, D], and what this rank's heads compared."""
        x_TD = enter_tensor_region(x_TD, self.mesh)
        shape = (self.heads, self.head_dim)
        q_THh = self.query(x_TD).unflatten(-1, shape)
        k_THh = unrotated_THh = self.key(x_TD).unflatten(-1, shape)
        v_THh = self.value(x_TD).unflatten(-1, shape)
        if rotary is not None:
            # Tokens of the prefix (a class token) have no place in the image: they do not turn.
            places_T = (layout.positions - self.prefix).clamp(min=0)
            cos, sin = rotary(places_T)
            prefix_T11 = (layout.positions < self.prefix)[:, None, None]
            tables = cos.masked_fill(prefix_T11, 1), sin.masked_fill(prefix_T11, 0)
            q_THh, k_THh = rotate_pairs(q_THh, tables), rotate_pairs(k_THh, tables)
        if key_mask is None:
            attended_THh = varlen_attention(
                q_THh, k_THh, v_THh, queries=layout, causal=False, key_bias=key_bias
            )
        else:
            # Each rank's heads give the mask a gradient of their own.
            key_mask = enter_tensor_region(key_mask, self.mesh)
            attended_THh = masked_attention(
                q_THh, k_THh, v_THh, layout=layout, key_mask=key_mask, key_bias=key_bias
            )
        return self.output(attended_THh.flatten(-2)), Heads(q_THh, k_THh, unrotated_THh)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Four projections, and attention of all heads."""
        for projection in (self.query, self.key, self.value, self.output):
            count(projection, work)
        count.attention(self.num_heads, self.head_dim, work)


class VisionFeedForward(nn.Module):
    """`down(gelu(up(x)))`, with biases and the exact GELU."""

    def __init__(self, dim: int, ffn_dim: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.up = ColumnLinear(dim, ffn_dim, mesh=mesh)
        self.down = RowLinear(ffn_dim, dim, mesh=mesh)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(enter_tensor_region(x_TD, self.mesh))))


class VisionLayer(nn.Module):
    """Pre-norm attention and feed-forward on packed tokens, residuals included.

    In two halves, between which tokens may merge.

    Source: ViT, arXiv 2010.11929, equations 2 and 3.
    """

    takes_packed = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn_dim: int,
        norm_eps: float = 1e-6,
        prefix: int = 0,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = VisionAttention(dim, num_heads, prefix=prefix, mesh=mesh)
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = VisionFeedForward(dim, ffn_dim, mesh=mesh)

    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: TokenLayout,
        rotary: AxialRotary | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        x_TD, _ = self.attend(x_TD, layout=layout, rotary=rotary, key_bias=key_bias)
        return self.feed_forward(x_TD)

    def attend(
        self,
        x_TD: Tensor,
        *,
        layout: TokenLayout,
        rotary: AxialRotary | None = None,
        key_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Heads]:
        """The tokens after attention, and what its heads compared."""
        update_TD, heads = self.attention(
            self.attention_norm(x_TD),
            layout=layout,
            rotary=rotary,
            key_bias=key_bias,
            key_mask=key_mask,
        )
        return x_TD + update_TD, heads

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        """The tokens after the feed-forward."""
        return x_TD + self.ffn(self.ffn_norm(x_TD))

    @torch.no_grad()
    def mean_over_heads(self, x_THc: Tensor) -> Tensor:
        """[T, c]: the mean over the heads of all tensor ranks."""
        mesh = self.attention.mesh
        sum_Tc = leave_tensor_region(x_THc.detach().sum(1), mesh)
        return sum_Tc / self.attention.num_heads
