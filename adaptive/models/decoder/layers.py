"""The layers that reference models are made of: norm, rotary, attention, feed-forward.

Shape legend: T packed tokens, R executed tokens, D width, F feed-forward width, H heads,
G key-value heads, h head width.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.feed_forward import MakeLinear, SwiGLU
from adaptive.models.decoder.rope_scaling import RopeScaling
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import pack
from adaptive.ops.ring_attention import ring_attention
from adaptive.ops.rms_norm import rms_norm
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection
from parallel.context import check_heads, heads_to_tokens, repeat_heads, tokens_to_heads
from parallel.mesh import Mesh
from parallel.ring.attention import cheaper_scheme
from parallel.tensor import (
    check_divides,
    column_linear,
    enter_tensor_region,
    leave_tensor_region,
    replicated,
    replicated_in_region,
    row_linear,
    split_parameter,
    sum_over_tensor,
)

__all__ = [
    "Attention",
    "DecoderLayer",
    "KeyValueCache",
    "LayerNorm",
    "MakeLinear",
    "ParameterFreeLayerNorm",
    "RMSNorm",
    "SwiGLU",
    "apply_rotary",
    "rotary_tables",
]


class KeyValueCache(Protocol):
    """What attention needs of a cache: store these tokens' keys and values, get all so far."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens held for each sequence."""
        ...

    def extend(
        self, k_TGh: Tensor, v_TGh: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, TokenLayout]: ...


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, computed in float32. Source: arXiv 1910.07467."""

    def __init__(self, dim: int, *, eps: float = 1e-6, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.mesh = Mesh.single() if mesh is None else mesh
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        weight_D: Tensor = self.weight
        if self.mesh.tensor_group is not None:
            weight_D = replicated(weight_D, self.mesh)
        return rms_norm(x_TD, weight_D.to(x_TD.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, of which each rank may hold some of the tokens."""

    def __init__(self, dim: int, *, eps: float = 1e-5, mesh: Mesh | None = None) -> None:
        super().__init__(dim, eps)
        self.mesh = Mesh.single() if mesh is None else mesh

    def forward(self, x_TD: Tensor) -> Tensor:
        weight_D, bias_D = (replicated(p, self.mesh) for p in (self.weight, self.bias))
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, self.eps)


class ParameterFreeLayerNorm(nn.Module):
    """LayerNorm without weight or bias (TokenFormer blocks, diffusion transformers)."""

    def __init__(self, dim: int, *, eps: float = 1e-5, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD, (self.dim,), eps=self.eps)


def rotary_tables(
    positions_T: Tensor,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, 1, rotary_dim / 2], of rotate-half pairs (i, i + rotary_dim/2)."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions_T.device).float() / rotary_dim
    frequencies = base**-exponent
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, base=base)
    angles = positions_T.float()[:, None] * frequencies[None, :]
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    if scaling is not None and scaling.amplitude != 1:
        return cos * scaling.amplitude, sin * scaling.amplitude
    return cos, sin


def apply_rotary(x_THh: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first `2 * tables.shape[-1]` channels of each head; the rest passes.

    Source: arXiv 2104.09864, rotate-half form.
    """
    cos, sin = (table.to(x_THh.dtype) for table in tables)
    half = cos.shape[-1]
    first, second, rest = x_THh.split([half, half, x_THh.shape[-1] - 2 * half], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1)


class HeadNorm(nn.Module):
    """RMS norm of every query or key head, one weight for all. Source: arXiv 2302.05442."""

    def __init__(self, head_dim: int, *, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.eps, self.mesh = eps, mesh
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_THh: Tensor) -> Tensor:
        weight_h = replicated_in_region(self.weight, self.mesh).to(x_THh.dtype)
        return rms_norm(x_THh.flatten(0, 1), weight_h, self.eps).view_as(x_THh)


class ProjectionNorm(nn.Module):
    """RMS norm over all heads of a token's queries or keys, a weight for each channel (OLMoE).

    Tensor ranks hold some of the heads: they sum squares, and each has its channels' weights.
    """

    def __init__(self, num_heads: int, head_dim: int, *, eps: float, mesh: Mesh) -> None:
        super().__init__()
        self.eps, self.mesh, self.width = eps, mesh, num_heads * head_dim
        self.weight = split_parameter(torch.ones(self.width), 0, mesh=mesh, name="norm")

    def forward(self, x_THh: Tensor) -> Tensor:
        weight_Hh = self.weight.to(x_THh.dtype).view(x_THh.shape[1:])
        if self.mesh.tensor_group is None:
            return rms_norm(x_THh.flatten(1), weight_Hh.flatten(), self.eps).view_as(x_THh)
        wide_THh = x_THh.to(torch.promote_types(x_THh.dtype, torch.float32))
        squares_T = sum_over_tensor(wide_THh.square().sum((1, 2)), self.mesh)
        scale_T = (squares_T / self.width + self.eps).rsqrt()
        return (wide_THh * scale_T[:, None, None]).to(x_THh.dtype) * weight_Hh


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over packed tokens.

    Queries may be fewer than keys: with `context`, `x_RD` attends to the tokens of the context,
    causal by position (SkipLayer's executing tokens among all).

    Under tensor parallelism the heads are split: `enter_tensor_region` brings every token to
    every tensor rank, `leave_tensor_region` sums their parts.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool | Literal["projection"] = False,
        norm_eps: float = 1e-6,
        rotary_fraction: float = 1.0,
        rope_base: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        window: int | None = None,
        make_input: MakeLinear | None = None,
        make_output: MakeLinear | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_divides("num_heads", num_heads, mesh)
        check_divides("num_kv_heads", num_kv_heads, mesh)
        make_input = partial(column_linear, mesh=mesh) if make_input is None else make_input
        make_output = partial(row_linear, mesh=mesh) if make_output is None else make_output
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.rotary_dim = int(self.head_dim * rotary_fraction) // 2 * 2
        self.rotary = partial(rotary_tables, base=rope_base, scaling=rope_scaling)
        # Heads of this rank: the projections are split by whole heads.
        self.heads, self.kv_heads = num_heads // mesh.tensor, num_kv_heads // mesh.tensor
        check_heads(self.heads, mesh)
        self.ring, self.window = mesh.ring, window
        if self.ring and window is not None:
            raise ValueError(
                f"sliding_window={window}: cannot be with context_attention=ring; use ulysses"
            )
        self.query = make_input(dim, num_heads * self.head_dim)
        self.key = make_input(dim, num_kv_heads * self.head_dim)
        self.value = make_input(dim, num_kv_heads * self.head_dim)
        self.output = make_output(num_heads * self.head_dim, dim)
        for name, count in (("query", num_heads), ("key", num_kv_heads), ("value", num_kv_heads)):
            full = torch.zeros(count * self.head_dim)
            own = split_parameter(full, 0, mesh=mesh, name=f"{name} bias") if bias else None
            self.register_parameter(f"{name}_bias", own)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if qk_norm == "projection":
            self.query_norm, self.key_norm = (
                ProjectionNorm(heads, self.head_dim, eps=norm_eps, mesh=mesh)
                for heads in (num_heads, num_kv_heads)
            )
        elif qk_norm:
            self.query_norm, self.key_norm = (
                HeadNorm(self.head_dim, eps=norm_eps, mesh=mesh) for _ in range(2)
            )

    def forward(
        self,
        x_RD: Tensor,
        *,
        layout: TokenLayout,
        context: tuple[Tensor, TokenLayout] | None = None,
        cache: KeyValueCache | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        split = self.mesh.tensor_group is not None
        if split:
            x_RD = enter_tensor_region(x_RD, self.mesh, shard_sizes=layout.shard_sizes)
        source_TD, keys = (x_RD, layout) if context is None else context
        if split and context is not None:
            source_TD = enter_tensor_region(source_TD, self.mesh, shard_sizes=keys.shard_sizes)
        q, k, v = self.query(x_RD), self.key(source_TD), self.value(source_TD)
        if self.query_bias is not None:
            q, k, v = q + self.query_bias, k + self.key_bias, v + self.value_bias
        q_RHh = q.unflatten(-1, (self.heads, self.head_dim))
        k_TGh, v_TGh = (x.unflatten(-1, (self.kv_heads, self.head_dim)) for x in (k, v))
        if self.query_norm is not None and self.key_norm is not None:
            q_RHh, k_TGh = self.query_norm(q_RHh), self.key_norm(k_TGh)
        if self.ring:
            if cache is not None:
                raise ValueError(
                    "context_attention=ring: cannot generate with a cache; use ulysses, or one rank"
                )
            attended_RHh = self._attend_ring(q_RHh, k_TGh, v_TGh, layout, keys)
        elif key_bias is not None:
            q_RHh, k_TGh = self._rotate(q_RHh, k_TGh, layout.positions, None)
            # Its gradient is the sum of what the heads of all ranks say.
            key_bias = enter_tensor_region(key_bias, self.mesh)
            attended_RHh = varlen_attention(
                q_RHh, k_TGh, v_TGh, queries=layout, causal=True, key_bias=key_bias
            )
        else:
            same = context is None
            attended_RHh = self._attend(q_RHh, k_TGh, v_TGh, layout, None if same else keys, cache)
        update_RD = self.output(attended_RHh.flatten(-2))
        if split:
            update_RD = leave_tensor_region(update_RD, self.mesh, shard_sizes=layout.shard_sizes)
        return update_RD

    def _attend(
        self,
        q_RHh: Tensor,
        k_TGh: Tensor,
        v_TGh: Tensor,
        layout: TokenLayout,
        keys: TokenLayout | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """By whole sequences; context ranks meanwhile hold all tokens and their own heads."""
        mesh = self.mesh
        if mesh.context_group is not None:
            k_TGh, v_TGh = repeat_heads(k_TGh, mesh), repeat_heads(v_TGh, mesh)
            if keys is None:
                q_RHh, k_TGh, v_TGh = tokens_to_heads(
                    [q_RHh, k_TGh, v_TGh], mesh, shard_sizes=layout.shard_sizes
                )
            else:
                (q_RHh,) = tokens_to_heads([q_RHh], mesh, shard_sizes=layout.shard_sizes)
                k_TGh, v_TGh = tokens_to_heads([k_TGh, v_TGh], mesh, shard_sizes=keys.shard_sizes)
        q_RHh, k_TGh = self._rotate(
            q_RHh, k_TGh, layout.positions, None if keys is None else keys.positions
        )
        if cache is not None:
            k_TGh, v_TGh, keys = cache.extend(k_TGh, v_TGh, layout if keys is None else keys)
        attended_RHh = varlen_attention(
            q_RHh, k_TGh, v_TGh, queries=layout, keys=keys, causal=True, window=self.window
        )
        if mesh.context_group is not None:
            attended_RHh = heads_to_tokens(attended_RHh, mesh, shard_sizes=layout.shard_sizes)
        return attended_RHh

    def _attend_ring(
        self, q_RHh: Tensor, k_TGh: Tensor, v_TGh: Tensor, layout: TokenLayout, keys: TokenLayout
    ) -> Tensor:
        """Queries or keys travel round the ring; before, rows are evened out for the mask."""
        own, others = layout.ring(self.mesh), keys.ring(self.mesh)
        positions = None if keys is layout else others.positions
        q_RHh, k_TGh = self._rotate(q_RHh, k_TGh, own.positions, positions)
        if keys is layout:
            q_RHh, k_TGh, v_TGh = own.to_ring([q_RHh, k_TGh, v_TGh])
        else:
            (q_RHh,) = own.to_ring([q_RHh])
            k_TGh, v_TGh = others.to_ring([k_TGh, v_TGh])
        scheme = cheaper_scheme(self.heads, self.kv_heads, self.head_dim, self.mesh.context)
        attended_RHh = ring_attention(
            q_RHh, k_TGh, v_TGh, own.layout, keys=others.layout, scheme=scheme
        )
        return own.from_ring(attended_RHh)

    def _rotate(
        self, q_RHh: Tensor, k_TGh: Tensor, positions_R: Tensor, positions_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions; None: keys are at those of the queries."""
        if not self.rotary_dim:
            return q_RHh, k_TGh
        tables = self.rotary(positions_R, self.rotary_dim)
        q_RHh = apply_rotary(q_RHh, tables)
        if positions_T is not None:
            tables = self.rotary(positions_T, self.rotary_dim)
        return q_RHh, apply_rotary(k_TGh, tables)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Projections of the queries, and of the keys and values of the source; attention."""
        count(self.query, work)
        count(self.key, work.of_source)
        count(self.value, work.of_source)
        count.attention(self.heads * self.mesh.tensor, self.head_dim, work)
        count(self.output, work)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward on packed tokens, residuals included.

    `forward(x, layout=…)` maps tokens to updated tokens. With `queries`, only those tokens are
    updated and returned, while keys and values come from all of `x`: what SkipLayer runs.

    `attention(x, layout=…, context=…, cache=…)` and `ffn(x, layout=…)` return updates.
    """

    takes_packed = True
    takes_queries = True

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, ffn_norm: nn.Module, ffn: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn

    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: TokenLayout,
        queries: Selection | None = None,
        cache: KeyValueCache | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        normed_TD = self.attention_norm(x_TD)
        context = None
        if queries is not None:
            context = (normed_TD, layout)
            x_TD, normed_TD = pack(x_TD, queries.indices), pack(normed_TD, queries.indices)
            layout = queries.layout
        options = {} if key_bias is None else {"key_bias": key_bias}
        x_TD = x_TD + self.attention(
            normed_TD, layout=layout, context=context, cache=cache, **options
        )
        return x_TD + self.ffn(self.ffn_norm(x_TD), layout=layout)
