"""Pattention: a layer whose weights are tokens that the input attends to.

Shape legend: B batch, S sequence, T tokens, N parameter tokens, n those of this tensor rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.protocol import LayerContext, Linears, Method
from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.parameter_attention import parameter_attention
from adaptive.ops.parameter_weights import Activation
from adaptive.routing.layout import TokenLayout
from parallel.mesh import Mesh
from parallel.tensor import (
    check_divides,
    enter_tensor_region,
    gather_columns,
    leave_tensor_region,
    mark_split,
    replicated_in_region,
    split_parameter,
    sum_over_tensor,
)

Split = Literal["tokens", "channels"]
Role = Literal["whole", "input", "output"]


class Pattention(ExactBuffers):
    """`Θ(x Kᵀ) V`: attention of the input to N parameter tokens, in place of a linear layer.

    Also in place of a whole feed-forward (`PattentionFeedForward`). There is no bias and no 1/√D.

    Args:
        in_features, out_features: widths of the input and of the output.
        num_tokens: parameter tokens, N.
        activation: Θ, see `parameter_attention`: "l2_norm_gelu" (the paper's), "gelu_l2_norm" or
            "softmax".
        scale: what normalised scores are multiplied by; None: √N for the norms, 1 for softmax.
            It is stored, and growth leaves it as it is.
        dropout: share of the weights zeroed in training.
        top_k: only the `top_k` parameter tokens with the largest |weight| of each token take part.
        save_memory: compute scores again in the backward, a block at a time; see
            `parameter_attention` for what that costs.
        std: standard deviation of the values at the start; keys have 0.02, to which the
            normalised activations are blind.
        split: how tensor ranks share the layer. "tokens": each has N / tensor parameter tokens,
            and the norm of the scores is summed over the ranks. "channels": each has all keys and
            out_features / tensor columns of the values, and computes all scores.
        role: where it stands between tensor ranks. "whole": from and to all features, on its own.
            Inside a tensor region: "input" leaves its outputs split (like `column_linear`),
            "output" takes them split and returns a partial sum (like `row_linear`).
        mesh: how the ranks share the model; one rank by default.

    Attributes:
        key_tokens: [n, in], value_tokens: [n, out]; this tensor rank's part of them.
        scale: float64 buffer, part of the state dict; never cast to a lower precision.

    Raises:
        ValueError: for sizes below 1 or that the tensor degree does not divide.

    Source: TokenFormer, arXiv 2410.23168, section 3.2.
    """

    takes_packed = True
    exact_buffers = ("scale",)  # rounded, every score changes
    scale: Tensor

    compiles = False  # a Function in chunks, faster than what a compiler makes of its formula

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        *,
        activation: Activation = "l2_norm_gelu",
        scale: float | None = None,
        dropout: float = 0.0,
        top_k: int | None = None,
        save_memory: bool = False,
        std: float = 0.02,
        split: Split = "tokens",
        role: Role = "whole",
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        for name in ("in_features", "out_features", "num_tokens"):
            if locals()[name] < 1:
                raise ValueError(f"{name}={locals()[name]}: must be at least 1")
        _check_options(activation, dropout, split)
        if role not in get_args(Role):
            raise ValueError(f"role={role!r}: must be one of {', '.join(get_args(Role))}")
        if top_k is not None and not 1 <= top_k <= num_tokens:
            raise ValueError(f"top_k={top_k}: must be between 1 and num_tokens={num_tokens}")
        if scale is None:
            scale = 1.0 if activation == "softmax" else math.sqrt(num_tokens)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale}: must be a positive number")
        self.mesh = Mesh.single() if mesh is None else mesh
        self.in_features, self.out_features = in_features, out_features
        self.activation: Activation = activation
        self.dropout, self.top_k, self.save_memory, self.std = dropout, top_k, save_memory, std
        self.split, self.role = split, role
        if split == "channels" or role == "input":
            check_divides("out_features", out_features, self.mesh)
        # Not read off the weight, which an engine may shard to nothing between forwards.
        self._num_tokens = num_tokens
        keys = nn.Parameter(torch.empty(num_tokens, in_features))
        values = nn.Parameter(torch.empty(num_tokens, out_features))
        nn.init.normal_(keys, std=0.02)
        nn.init.normal_(values, std=std)
        if split == "tokens":
            self.key_tokens = split_parameter(keys, 0, mesh=self.mesh, name="num_tokens")
            self.value_tokens = split_parameter(values, 0, mesh=self.mesh, name="num_tokens")
        else:
            self.key_tokens = keys
            self.value_tokens = split_parameter(values, 1, mesh=self.mesh, name="out_features")
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    @property
    def num_tokens(self) -> int:
        """Parameter tokens of the whole layer, N."""
        return self._num_tokens

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """Transform every token by itself.

        Args:
            hidden: [..., in], e.g. [B, S, in] or packed [T, in].
            token_mask: taken for uniformity; tokens do not see each other.
            layout: where packed tokens came from; only its shard sizes are read.

        Returns:
            [..., out] in the dtype of `hidden`.
        """
        x_TD = hidden.flatten(0, -2) if hidden.dim() != 2 else hidden
        shard_sizes = None if layout is None else layout.shard_sizes
        if self.role == "whole":
            x_TD = enter_tensor_region(x_TD, self.mesh, shard_sizes=shard_sizes)
        elif self.role == "output":
            # What follows differs between ranks, so backward sums before it keeps own columns.
            x_TD = replicated_in_region(gather_columns(x_TD, self.mesh), self.mesh)
        out_T = self._attend(x_TD)
        if self.role == "input":
            if self.split == "tokens":
                out_T = self._own_columns(sum_over_tensor(out_T, self.mesh))
        elif self.split == "channels" and self.mesh.tensor > 1:
            width = out_T.shape[-1]
            before = self.mesh.tensor_rank * width
            out_T = F.pad(out_T, (before, self.out_features - width - before))
        if self.role == "whole":
            out_T = leave_tensor_region(out_T, self.mesh, shard_sizes=shard_sizes)
        return out_T if hidden.dim() == 2 else out_T.unflatten(0, hidden.shape[:-1])

    @torch.no_grad()
    def grow(self, extra_tokens: int) -> None:
        """Append parameter tokens; the function stays the same.

        New keys are zero, so their scores and weights are, whatever the new values; those are
        drawn like the first ones, from torch's default generator (alike on every tensor rank). The
        first gradient goes to the new keys. Both parameters are replaced: build the optimizer
        afterwards, or use `adaptive.growth.grow`, which brings its moments along.

        Under tensor parallelism every rank appends its share, so that the order of parameter
        tokens, which nothing depends on, differs from that of an unsplit layer.

        Raises:
            ValueError: if `extra_tokens` is below 1, the tensor degree does not divide it, or the
                activation is softmax, where a zero score takes weight from all others.

        Source: TokenFormer, arXiv 2410.23168, section 3.4.
        """
        if extra_tokens < 1:
            raise ValueError(f"extra_tokens={extra_tokens}: must be at least 1; layers only grow")
        check_growable(self.activation)
        if self.split == "tokens":
            check_divides("extra_tokens", extra_tokens, self.mesh)
        values = torch.empty(extra_tokens, self.out_features).normal_(std=self.std)
        count = extra_tokens
        if self.mesh.tensor > 1:
            dim = 0 if self.split == "tokens" else 1
            values = values.chunk(self.mesh.tensor, dim)[self.mesh.tensor_rank]
            count = values.shape[0]
        keys = self.key_tokens.new_zeros(count, self.in_features)
        self._num_tokens += extra_tokens
        self.key_tokens = _extended(self.key_tokens, keys)
        self.value_tokens = _extended(self.value_tokens, values)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Scores of all parameter tokens, and values of those that take part."""
        tokens = self.num_tokens
        if self.save_memory and self.top_k is None:
            with count.recomputed():
                count.linear(self.in_features, tokens, work)
        else:
            count.linear(self.in_features, tokens, work)
        taking_part = tokens if self.top_k is None else self.top_k
        count.linear(taking_part, self.out_features, work)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_tokens={self.num_tokens}, "
            f"activation={self.activation!r}"
        )

    def _attend(self, x_TD: Tensor) -> Tensor:
        keys: Tensor = self.key_tokens
        group = self.mesh.tensor_group
        if self.split == "channels":
            keys, group = replicated_in_region(keys, self.mesh), None
        return parameter_attention(
            x_TD,
            keys,
            self.value_tokens,
            scale=self.scale,
            activation=self.activation,
            top_k=self.top_k,
            dropout=self.dropout if self.training else 0.0,
            save_memory=self.save_memory,
            group=group,
            shard=self.mesh.context_rank,
        )

    def _own_columns(self, out_TO: Tensor) -> Tensor:
        return out_TO.chunk(self.mesh.tensor, -1)[self.mesh.tensor_rank]


class PattentionFeedForward(Pattention):
    """One Pattention in place of a whole feed-forward; grows by `ffn_tokens`."""


def check_growable(activation: str) -> None:
    """Raise ValueError if zero keys would not leave the function as it is."""
    if activation == "softmax":
        raise ValueError(
            "activation='softmax': cannot grow without changing the function; "
            "must be l2_norm_gelu or gelu_l2_norm"
        )


@dataclass(frozen=True)
class PattentionConfig(Method):
    """A decoder whose attention projections and feed-forward are Pattention (TokenFormer).

    Attributes:
        tokens: parameter tokens of the query, key and value projections each.
        ffn_tokens: of the feed-forward.
        output_tokens: of the output projection; None: as many as `tokens`.
        activation, dropout, save_memory, split: see `Pattention`.
        top_k, ffn_top_k: parameter tokens that take part for each token, in the projections and
            in the feed-forward; None: all.
    """

    name = "pattention"
    place = "linear"
    blocks = (Pattention,)

    tokens: int = 256
    ffn_tokens: int = 1024
    output_tokens: int | None = None
    activation: Activation = "l2_norm_gelu"
    dropout: float = 0.0
    top_k: int | None = None
    ffn_top_k: int | None = None
    save_memory: bool = False
    split: Split = "tokens"

    def __post_init__(self) -> None:
        for name in ("tokens", "ffn_tokens", "output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        most = min(self.tokens, self.output_tokens or self.tokens)
        for name, limit in (("top_k", most), ("ffn_top_k", self.ffn_tokens)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise ValueError(f"{name}={value}: must be between 1 and {limit}")
        _check_options(self.activation, self.dropout, self.split)

    def build(self, context: LayerContext, inner: Linears) -> Linears:
        """Projections and feed-forwards of parameter tokens; `ffn_dim` has no effect on them."""
        outputs = self.tokens if self.output_tokens is None else self.output_tokens
        make = partial(self._make, Pattention, mesh=context.mesh)
        feed_forward = partial(
            self._make,
            PattentionFeedForward,
            self.ffn_tokens,
            self.ffn_top_k,
            context.dim,
            context.dim,
            mesh=context.mesh,
            std=context.output_std,
        )
        return Linears(
            partial(make, self.tokens, self.top_k, role="input", std=context.std),
            partial(make, outputs, self.top_k, role="output", std=context.output_std),
            lambda _: feed_forward(),
        )

    def _make(
        self,
        kind: type[Any],
        num_tokens: int,
        top_k: int | None,
        in_features: int,
        out_features: int,
        **options: Any,
    ) -> Any:
        return kind(
            in_features,
            out_features,
            num_tokens,
            activation=self.activation,
            dropout=self.dropout,
            top_k=top_k,
            save_memory=self.save_memory,
            split=self.split,
            **options,
        )


def _extended(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    """A parameter with rows appended, marked and trained like the old one."""
    grown = nn.Parameter(torch.cat([old, new.to(old)]), requires_grad=old.requires_grad)
    if getattr(old, "tensor_model_parallel", False):
        mark_split(grown, old.partition_dim)  # type: ignore[attr-defined]
    return grown


def _check_options(activation: str, dropout: float, split: str) -> None:
    for name, value, allowed in (
        ("activation", activation, get_args(Activation)),
        ("split", split, get_args(Split)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be in [0, 1)")
