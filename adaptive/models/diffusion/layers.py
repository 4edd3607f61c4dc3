"""The layers of a diffusion transformer: embeddings, adaLN-Zero, attention, feed-forward.

Shape legend: B batch, T packed tokens, S tokens of an image, C channels, D width, F feed-forward
width, H heads, h head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.rms_norm import rms_norm
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout
from parallel.linear import Linear, linear
from parallel.mesh import Mesh
from parallel.rows import even_shards
from parallel.tensor import (
    enter_tensor_region,
    gather_columns,
    leave_tensor_region,
    replicated,
    replicated_in_region,
    split_parameter,
)

NORM_EPS = 1e-6


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Images to tokens [B, S, C*p*p]: rows of patches, each as (channel, patch row, column)."""
    batch, channels, height, width = x_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    patches = x_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches_BSP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify`: [B, S, C*p*p] to [B, C, H, W]."""
    rows, columns = grid
    patches = patches_BSP.unflatten(-1, (-1, patch_size, patch_size))
    patches = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(patches.shape[0], -1, rows * patch_size, columns * patch_size)


class TimeEmbedding(nn.Module):
    """Time in [0, 1], not scaled, to [B, D]: sinusoids (cos, then sin) through an MLP."""

    def __init__(self, dim: int, *, sinusoids: int = 256) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.up = Linear(sinusoids, dim)
        self.down = Linear(dim, dim)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.sinusoids // 2
        exponent = torch.arange(half, device=t_B.device, dtype=torch.float32) / half
        angles_Bh = t_B.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
        waves = torch.cat([angles_Bh.cos(), angles_Bh.sin()], dim=-1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves)))

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """One row a sample; its input, time, takes no gradient."""
        rows = work.of_samples
        count.linear(self.up.in_features, self.up.out_features, rows, input_grad=False)
        count(self.down, rows)


class AxialRotary(ExactBuffers):
    """2-D rotary positions: half of each head turns with the row, half with the column.

    Interleaved pairs (2i, 2i+1), frequencies `base^(-2i / (h/2))`. Tables of the whole grid are
    kept, and rows are gathered at the positions at hand: a kept token keeps its place.
    """

    exact_buffers = ("cos", "sin")  # a model that was bfloat16 once would turn by rounded angles
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int], *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head width {head_dim}: must be a multiple of 4 for 2-D rotary")
        half = head_dim // 2
        frequency = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        angles = [axis.flatten()[:, None] * frequency for axis in (rows, columns)]
        angles_Sh = torch.cat(angles, dim=-1)
        self.register_buffer("cos", angles_Sh.cos().float(), persistent=False)
        self.register_buffer("sin", angles_Sh.sin().float(), persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, h/2] at flat row-major positions."""
        return self.cos[positions_T][:, None], self.sin[positions_T][:, None]


def rotate_pairs(x_THh: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the interleaved pairs (2i, 2i+1) of every head by the angles of the tables."""
    if x_THh.dtype == torch.float32 and not torch.compiler.is_compiling():
        # A turn is a complex product: one pass, and one in the backward.
        pairs = torch.view_as_complex(x_THh.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(*tables)).flatten(-2)
    cos, sin = (table.to(x_THh.dtype) for table in tables)
    even, odd = x_THh.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class ColumnLinear(Linear):
    """A linear layer with bias whose outputs are split over the tensor ranks."""

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh) -> None:
        _start_linear(self, in_features, out_features)
        self.weight = split_parameter(self.weight, 0, mesh=mesh, name="out_features")
        self.bias = split_parameter(self.bias, 0, mesh=mesh, name="out_features")


class RowLinear(Linear):
    """A linear layer with bias whose inputs are split; leaves the tensor region.

    The bias is whole on every rank and added once, after the partial results are summed.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh) -> None:
        _start_linear(self, in_features, out_features)
        self.mesh = mesh
        self.weight = split_parameter(self.weight, 1, mesh=mesh, name="in_features")

    def forward(self, x_Td: Tensor, *, shard_sizes: tuple[int, ...] | None = None) -> Tensor:
        if self.mesh.tensor == 1:
            return super().forward(x_Td)
        out_TD = leave_tensor_region(linear(x_Td, self.weight), self.mesh, shard_sizes=shard_sizes)
        return out_TD + replicated(self.bias, self.mesh)


class OwnRowsLinear(Linear):
    """A linear layer with bias, whole on every rank, of this rank's own rows."""

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh) -> None:
        super().__init__(in_features, out_features)
        self.mesh = mesh

    def forward(self, x_TD: Tensor) -> Tensor:
        if not self.mesh.sequence_parallel:
            return super().forward(x_TD)
        weight, bias = replicated(self.weight, self.mesh), replicated(self.bias, self.mesh)
        return linear(x_TD, weight, bias)


class HeadNorm(nn.Module):
    """RMS norm of every head with one learnt vector, on this tensor rank's heads."""

    def __init__(self, head_dim: int, *, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_THh: Tensor) -> Tensor:
        weight = replicated_in_region(self.weight, self.mesh).to(x_THh.dtype)
        return rms_norm(x_THh.flatten(0, 1), weight, NORM_EPS).view_as(x_THh)


class DiffusionAttention(nn.Module):
    """Bidirectional attention with 2-D rotary positions and per-head RMS norm of q and k.

    Under tensor parallelism the heads are split.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qk_norm: bool = True, mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.head_dim = dim // num_heads
        self.heads = num_heads // mesh.tensor
        self.query = ColumnLinear(dim, dim, mesh=mesh)
        self.key = ColumnLinear(dim, dim, mesh=mesh)
        self.value = ColumnLinear(dim, dim, mesh=mesh)
        self.output = RowLinear(dim, dim, mesh=mesh)
        self.query_norm = HeadNorm(self.head_dim, mesh=mesh) if qk_norm else None
        self.key_norm = HeadNorm(self.head_dim, mesh=mesh) if qk_norm else None

    def forward(
        self, x_TD: Tensor, *, layout: TokenLayout, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        x_TD = enter_tensor_region(x_TD, self.mesh, shard_sizes=layout.shard_sizes)
        shape = (self.heads, self.head_dim)
        q_THh = self.query(x_TD).unflatten(-1, shape)
        k_THh = self.key(x_TD).unflatten(-1, shape)
        v_THh = self.value(x_TD).unflatten(-1, shape)
        if self.query_norm is not None and self.key_norm is not None:
            q_THh, k_THh = self.query_norm(q_THh), self.key_norm(k_THh)
        q_THh, k_THh = rotate_pairs(q_THh, rotary), rotate_pairs(k_THh, rotary)
        attended_THh = varlen_attention(q_THh, k_THh, v_THh, queries=layout, causal=False)
        return self.output(attended_THh.flatten(-2), shard_sizes=layout.shard_sizes)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Four projections, and attention of all heads."""
        for projection in (self.query, self.key, self.value, self.output):
            count(projection, work)
        count.attention(self.heads * self.mesh.tensor, self.head_dim, work)


class GELUFeedForward(nn.Module):
    """`down(gelu_tanh(up(x)))`, with biases."""

    def __init__(self, dim: int, ffn_dim: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.up = ColumnLinear(dim, ffn_dim, mesh=mesh)
        self.down = RowLinear(ffn_dim, dim, mesh=mesh)

    def forward(self, x_TD: Tensor, *, shard_sizes: tuple[int, ...] | None = None) -> Tensor:
        x_TD = enter_tensor_region(x_TD, self.mesh, shard_sizes=shard_sizes)
        x_TF = F.gelu(self.up(x_TD), approximate="tanh")
        return self.down(x_TF, shard_sizes=shard_sizes)


class SwiGLUFeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with biases and two separate input projections."""

    def __init__(self, dim: int, ffn_dim: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.gate = ColumnLinear(dim, ffn_dim, mesh=mesh)
        self.up = ColumnLinear(dim, ffn_dim, mesh=mesh)
        self.down = RowLinear(ffn_dim, dim, mesh=mesh)

    def forward(self, x_TD: Tensor, *, shard_sizes: tuple[int, ...] | None = None) -> Tensor:
        x_TD = enter_tensor_region(x_TD, self.mesh, shard_sizes=shard_sizes)
        x_TF = F.silu(self.gate(x_TD)) * self.up(x_TD)
        return self.down(x_TF, shard_sizes=shard_sizes)


class Modulation(nn.Module):
    """adaLN: `chunks` vectors [B, D] of every sample's condition, all zero at first.

    Under tensor parallelism the columns are split and gathered: there is one row a sample.

    Source: DiT, arXiv 2212.09748, adaLN-Zero.
    """

    def __init__(self, dim: int, chunks: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.chunks = chunks
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.linear = ColumnLinear(dim, chunks * dim, mesh=mesh)
        nn.init.zeros_(self.linear.weight)

    def forward(self, condition_BD: Tensor) -> tuple[Tensor, ...]:
        # Every rank has all samples, and other columns of them.
        condition_BD = replicated_in_region(F.silu(condition_BD), self.mesh)
        columns_BC = gather_columns(self.linear(condition_BD), self.mesh)
        # Under sequence parallelism each rank goes on with other tokens: gradients are summed.
        return replicated(columns_BC, self.mesh).chunk(self.chunks, dim=-1)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """One row a sample, whatever share of its tokens is computed."""
        count(self.linear, work.of_samples)


def modulated_norm(
    x_TD: Tensor, shift_BD: Tensor, scale_BD: Tensor, layout: TokenLayout, mesh: Mesh
) -> Tensor:
    """`layer_norm(x) · (1 + scale) + shift`, each token with its own sample's vectors."""
    normed_TD = F.layer_norm(x_TD, (x_TD.shape[-1],), eps=NORM_EPS)
    scale_BD = 1 + scale_BD
    if layout.uniform and mesh.shards == 1:
        normed_BSD = normed_TD.unflatten(0, (layout.batch_size, layout.max_seqlen))
        return torch.addcmul(shift_BD[:, None], normed_BSD, scale_BD[:, None]).flatten(0, 1)
    sample_T = _samples(layout, mesh)
    return torch.addcmul(shift_BD[sample_T], normed_TD, scale_BD[sample_T])


def gated_add(
    x_TD: Tensor, gate_BD: Tensor, update_TD: Tensor, layout: TokenLayout, mesh: Mesh
) -> Tensor:
    """`x + gate · update`, each token with its own sample's gate."""
    if layout.uniform and mesh.shards == 1:
        shape = (layout.batch_size, layout.max_seqlen)
        sum_BSD = torch.addcmul(
            x_TD.unflatten(0, shape), gate_BD[:, None], update_TD.unflatten(0, shape)
        )
        return sum_BSD.flatten(0, 1)
    return torch.addcmul(x_TD, gate_BD[_samples(layout, mesh)], update_TD)


def _samples(layout: TokenLayout, mesh: Mesh) -> Tensor:
    """int64 [T], the sample of each row that this rank holds."""
    sample_T = layout.sequence_ids
    if mesh.shards == 1:
        return sample_T
    sizes = layout.shard_sizes or even_shards(layout.tokens, mesh.shards)
    return sample_T.split(list(sizes))[mesh.shard_rank]


class DiffusionBlock(nn.Module):
    """Attention and feed-forward, each behind a modulated norm and a gate; residuals included.

    `forward(x, layout=…, condition=…, rotary=…)`: packed tokens [T, D] of B samples, their
    condition [B, D], and the rotary module that all blocks share.

    Chunks of the modulation: shift, scale, gate for attention, then for the feed-forward.

    Source: DiT, arXiv 2212.09748, adaLN-Zero block.
    """

    takes_packed = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn_dim: int,
        ffn: str = "gelu",
        qk_norm: bool = True,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.modulation = Modulation(dim, 6, mesh=mesh)
        self.attention = DiffusionAttention(dim, num_heads, qk_norm=qk_norm, mesh=mesh)
        feed_forward: Any = SwiGLUFeedForward if ffn == "swiglu" else GELUFeedForward
        self.ffn = feed_forward(dim, ffn_dim, mesh=mesh)

    def forward(
        self, x_TD: Tensor, *, layout: TokenLayout, condition: Tensor, rotary: AxialRotary
    ) -> Tensor:
        mesh, shards = self.mesh, layout.shard_sizes
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(condition)
        normed_TD = modulated_norm(x_TD, shift, scale, layout, mesh)
        update_TD = self.attention(normed_TD, layout=layout, rotary=rotary(layout.positions))
        x_TD = gated_add(x_TD, gate, update_TD, layout, mesh)
        normed_TD = modulated_norm(x_TD, ffn_shift, ffn_scale, layout, mesh)
        return gated_add(x_TD, ffn_gate, self.ffn(normed_TD, shard_sizes=shards), layout, mesh)


class VelocityHead(nn.Module):
    """Modulated norm and a linear layer to patches, zero at first."""

    def __init__(self, dim: int, patch_dim: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.modulation = Modulation(dim, 2, mesh=mesh)
        self.linear = OwnRowsLinear(dim, patch_dim, mesh=mesh)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_TD: Tensor, *, layout: TokenLayout, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)
        return self.linear(modulated_norm(x_TD, shift, scale, layout, self.mesh))


def _start_linear(layer: Linear, in_features: int, out_features: int) -> None:
    """A linear layer with Xavier weights and zero bias; draws random numbers once."""
    Linear.__init__(layer, in_features, out_features, device="meta")
    layer.weight = nn.Parameter(torch.empty(out_features, in_features))
    layer.bias = nn.Parameter(torch.zeros(out_features))
    nn.init.xavier_uniform_(layer.weight)
