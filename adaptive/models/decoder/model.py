"""Decoder: a causal language model whose layers may be any of this library's blocks.

Shape legend: B batch, S sequence, T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from adaptive.blocks.method import MethodHost, takes_methods
from adaptive.blocks.protocol import LayerContext, Linears, MakeFeedForward, Method, StackContext
from adaptive.models.decoder.layers import (
    Attention,
    DecoderLayer,
    KeyValueCache,
    LayerNorm,
    ParameterFreeLayerNorm,
    RMSNorm,
    SwiGLU,
)
from adaptive.models.decoder.rope_scaling import RopeScaling
from adaptive.ops.cross_entropy import cross_entropy
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import pack
from adaptive.routing.layout import TokenLayout, layout_from_mask, valid_tokens
from adaptive.routing.recompute import checkpoint
from adaptive.routing.schedules import listed_layers
from adaptive.routing.tape import current_tape
from parallel.context import gather_context_rows, own_context_rows
from parallel.mesh import Mesh
from parallel.rows import even_shards
from parallel.tensor import (
    VocabEmbedding,
    column_linear,
    enter_tensor_region,
    gather_columns,
    row_linear,
)
from parallel.vocab_cross_entropy import vocab_cross_entropy

# Every layer is a tree of modules: a slip of the hand would build them for minutes.
MOST_LAYERS = 2048


@takes_methods("linear", "feed_forward", "layer", "stack")
@dataclass(frozen=True)
class DecoderConfig(MethodHost):
    """Everything that decides a decoder's parameters.

    Every method of these places has a field of its own name: its configuration, or None.

    Attributes:
        vocab_size: V. 256 is bytes.
        dim, num_layers, num_heads: width D; layers; query heads.
        num_kv_heads: key-value heads; None: as many as query heads.
        ffn_dim: feed-forward width; None: 8/3 D, rounded up to a multiple of 64.
        head_dim: width of a head; None: D / heads.
        attention_bias: biases of queries, keys and values (Qwen 2).
        qk_norm: a norm of every query and key head (Qwen 3); "projection": one over all heads of a
            token (OLMoE).
        max_seq_len: longest sequence that the model is trained on; generation stops there.
        rotary_fraction, rope_base: share of each head that rotates; base of its frequencies.
        rope_scaling: for longer texts than the first training's, see `RopeScaling`.
        sliding_window: positions that a token sees, its own included; None: all earlier ones.
        window_layers: the layers of which that holds; None: all.
        norm_eps: of the RMS norms.
        norm: of the blocks: "rms", or "parameter_free" LayerNorm (the final norm then has weights).
        tie_embeddings: the output projection is the embedding.
        init_std: standard deviation of weights; projections into the residual stream get
            `init_std / sqrt(2 layers)`.
        recompute: keep no activations inside layers; backward computes them again.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    vocab_size: int = 256
    dim: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    qk_norm: bool | Literal["projection"] = False
    max_seq_len: int = 512
    rotary_fraction: float = 1.0
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    window_layers: list[int] | None = None
    norm: Literal["rms", "parameter_free"] = "rms"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers={self.num_layers}: must be at most {MOST_LAYERS}")
        for name in ("head_dim", "ffn_dim", "sliding_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.rope_base > 0:
            raise ValueError(f"rope_base={self.rope_base}: must be above 0")
        for name in ("norm_eps", "init_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide dim={self.dim}")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction}: must be in [0, 1]")
        if self.qk_norm not in (True, False, "projection"):
            raise ValueError(f"qk_norm={self.qk_norm!r}: must be true, false or projection")
        if self.norm not in ("rms", "parameter_free"):
            raise ValueError(f"norm={self.norm!r}: must be rms or parameter_free")
        if self.window_layers is not None:
            listed_layers(self.window_layers, self.num_layers, key="window_layers")
            if self.sliding_window is None:
                raise ValueError(f"window_layers={self.window_layers}: needs sliding_window")
        self.check_methods(self.num_layers)

    def window(self, layer: int) -> int | None:
        """Positions that a token sees in a layer; None: all earlier ones."""
        slides = self.window_layers is None or layer in self.window_layers
        return self.sliding_window if slides else None

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn_width(self) -> int:
        return -(-self.dim * 8 // (3 * 64)) * 64 if self.ffn_dim is None else self.ffn_dim


class DecoderCache(Protocol):
    """Keys and values of earlier tokens, a KeyValueCache for each layer.

    Attributes:
        stack: what a method of place "stack" keeps of them; None before the first.
    """

    stack: Any

    def next_positions(self, layout: TokenLayout) -> TokenLayout:
        """The layout of the tokens to come, with positions that follow those already stored."""
        ...

    def layer(self, index: int) -> KeyValueCache: ...


class Decoder(nn.Module):
    """Token ids to logits.

    `model(input_ids_BS, token_mask=None) -> logits_BSV`. Padding leaves at the embedding and
    comes back as zeros at the logits; in between, tokens are packed `[T, D]`.

    Parameters are drawn from torch's default generator: seed it before building. Every rank of a
    mesh must build with the same seed.
    """

    def __init__(self, config: DecoderConfig, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.embedding = VocabEmbedding(
            config.vocab_size, config.dim, mesh=mesh, std=config.init_std
        )
        layers = [build_layer(config, index, mesh) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.stack: Any = None
        for method in (m for m in config.methods if m.place == "stack"):
            context = StackContext(
                config.num_layers, config.dim, config.init_std, config.norm_eps, mesh
            )
            self.stack = method.build(context, None)
        self.norm: nn.Module = RMSNorm(config.dim, eps=config.norm_eps, mesh=mesh)
        if config.norm == "parameter_free":
            self.norm = LayerNorm(config.dim, mesh=mesh)
        self.output = column_linear(config.dim, config.vocab_size, mesh=mesh, std=config.init_std)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        token_mask: Tensor | None = None,
        *,
        layout: TokenLayout | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits of the next token at every place.

        Args:
            input_ids_BS: int64 [B, S].
            token_mask: bool [B, S], False at padding (either side); None: no padding.
            layout: boundaries of several documents in each row, over the flattened [B*S] tokens;
                without it each row is one sequence. Excludes `token_mask`.
            cache: holds earlier tokens; the input then continues them.

        Returns:
            [B, S, V]; zeros at padding.

        Raises:
            ValueError: if `layout` and `token_mask` are both given, or of another shape.
        """
        ids_T, layout, valid = self._pack_inputs(input_ids_BS, token_mask, layout)
        hidden_TD, layout = self._hidden(ids_T, layout, cache)
        logits_TV = gather_columns(self._split_logits(hidden_TD, layout), self.mesh)
        logits_TV = gather_context_rows(logits_TV, self.mesh, shard_sizes=layout.shard_sizes)
        if valid is None:
            return logits_TV.unflatten(0, input_ids_BS.shape)
        logits = logits_TV.new_zeros(input_ids_BS.numel(), logits_TV.shape[-1])
        return logits.index_copy(0, valid, logits_TV).unflatten(0, input_ids_BS.shape)

    def token_losses(
        self,
        input_ids_BS: Tensor,
        targets_BS: Tensor,
        token_mask: Tensor | None = None,
        *,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """Cross-entropy of every valid token against its target, nats, float32 [T].

        A target below 0 is not learnt: its loss and all of its gradients are 0. The logits of
        padding are never computed. Under context parallelism, those of this rank's tokens.
        """
        ids_T, layout, valid = self._pack_inputs(input_ids_BS, token_mask, layout)
        _check_shape("targets", targets_BS, input_ids_BS)
        hidden_TD, layout = self._hidden(ids_T, layout, None)
        targets_T = targets_BS.flatten() if valid is None else targets_BS.flatten()[valid]
        targets_T = own_context_rows(targets_T, self.mesh, shard_sizes=layout.shard_sizes)
        logits_Tv = self._split_logits(hidden_TD, layout)
        learnt_T, targets_T = targets_T >= 0, targets_T.clamp(min=0)
        if self.mesh.tensor_group is None:
            losses_T = cross_entropy(logits_Tv, targets_T, overwrite=True)
        else:
            losses_T = vocab_cross_entropy(logits_Tv, targets_T, self.mesh, overwrite=True)
        return losses_T.where(learnt_T, 0)

    def hidden_states(
        self,
        input_ids_BS: Tensor,
        token_mask: Tensor | None = None,
        *,
        layout: TokenLayout | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Final normed hidden states [T, D] of valid tokens, and their flat indices or None.

        Under sequence or context parallelism, those of this rank's tokens.
        """
        ids_T, layout, valid = self._pack_inputs(input_ids_BS, token_mask, layout)
        return self._hidden(ids_T, layout, cache)[0], valid

    def _hidden(
        self, ids_T: Tensor, layout: TokenLayout, cache: DecoderCache | None
    ) -> tuple[Tensor, TokenLayout]:
        """Final normed hidden states of this rank's tokens, and where they lie."""
        tape = current_tape()
        if tape is not None:
            tape.enter(layout)
        if cache is not None:
            layout = cache.next_positions(layout)
        if self.mesh.shards > 1:
            layout = replace(layout, shard_sizes=even_shards(layout.tokens, self.mesh.shards))
            ids_T = own_context_rows(ids_T, self.mesh, shard_sizes=layout.shard_sizes)
        hidden_TD = self.embedding(ids_T, shard_sizes=layout.shard_sizes)
        layers = partial(self._run, cache)
        if self.stack is None:
            hidden_TD = layers(hidden_TD, layout, 0, len(self.layers))
        else:
            state = None if cache is None else cache.stack
            hidden_TD, state = self.stack(
                hidden_TD, ids_T, layout=layout, layers=layers, state=state, keep=cache is not None
            )
            if cache is not None:
                cache.stack = state
        return self.norm(hidden_TD), layout

    def _run(
        self,
        cache: DecoderCache | None,
        hidden_TD: Tensor,
        layout: TokenLayout,
        first: int,
        last: int,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """The tokens after the layers from `first` up to but not `last`."""
        options = {} if key_bias is None else {"key_bias": key_bias}
        for index in range(first, last):
            layer = self.layers[index]
            if cache is not None:
                hidden_TD = layer(hidden_TD, layout=layout, cache=cache.layer(index))
            elif self.config.recompute and torch.is_grad_enabled():
                hidden_TD = checkpoint(layer, hidden_TD, layout=layout, **options)
            else:
                hidden_TD = layer(hidden_TD, layout=layout, **options)
        return hidden_TD

    def _split_logits(self, hidden_TD: Tensor, layout: TokenLayout) -> Tensor:
        """This tensor rank's part of the vocabulary, for every token."""
        hidden_TD = enter_tensor_region(hidden_TD, self.mesh, shard_sizes=layout.shard_sizes)
        return self.output(hidden_TD)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Layers, and the logits."""
        self.count_layers(count, work)
        count(self.output, work)

    def count_layers(self, count: FlopCounter, work: Work) -> None:
        """What leads to the logits; layers twice in the forward direction where recomputed."""
        middle, inside = range(0), work
        if self.stack is not None:
            count(self.stack, work)
            middle, inside = (
                range(self.stack.first, self.stack.last),
                self.stack.inside(count, work),
            )
        for index, layer in enumerate(self.layers):
            own = inside if index in middle else work
            if not self.config.recompute:
                count(layer, own)
                continue
            # Recomputation stops at the last activation kept: a dense layer's last product, which
            # nothing but a sum follows, is not computed again.
            last = getattr(getattr(layer, "ffn", None), "down", None)
            with count.recomputed(keeps=last):
                count(layer, own)

    def _pack_inputs(
        self, input_ids_BS: Tensor, token_mask: Tensor | None, layout: TokenLayout | None
    ) -> tuple[Tensor, TokenLayout, Tensor | None]:
        ids_T = input_ids_BS.flatten()
        if token_mask is None:
            batch, seq_len = input_ids_BS.shape
            dense = TokenLayout.dense(batch, seq_len, input_ids_BS.device)
            return ids_T, dense if layout is None else layout, None
        if layout is not None:
            raise ValueError("layout and token_mask: give one of them")
        _check_shape("token_mask", token_mask, input_ids_BS)
        layout, valid = layout_from_mask(valid_tokens(token_mask))
        return pack(ids_T, valid), layout, valid


def _check_shape(name: str, tensor: Tensor, input_ids_BS: Tensor) -> None:
    if tensor.shape != input_ids_BS.shape:
        shapes = list(tensor.shape), list(input_ids_BS.shape)
        raise ValueError(f"{name} of shape {shapes[0]}: must be {shapes[1]}, as the token ids")


def build_layer(config: DecoderConfig, index: int, mesh: Mesh) -> nn.Module:
    """Layer `index` of the decoder, with what the methods put in place of its parts."""
    residual_std = config.init_std / (2 * config.num_layers) ** 0.5
    context = LayerContext(
        layer=index,
        num_layers=config.num_layers,
        dim=config.dim,
        ffn_dim=config.ffn_width,
        std=config.init_std,
        output_std=residual_std,
        mesh=mesh,
    )
    here = [m for m in config.methods if index in m.routed_layers(config.num_layers)]
    norm: Any = partial(RMSNorm, eps=config.norm_eps, mesh=mesh)
    if config.norm == "parameter_free":
        norm = partial(ParameterFreeLayerNorm, mesh=mesh)
    linears = Linears(
        partial(column_linear, mesh=mesh, std=config.init_std),
        partial(row_linear, mesh=mesh, std=residual_std),
    )
    for method in (m for m in here if m.place == "linear"):
        linears = method.build(context, linears)
    attention = Attention(
        config.dim,
        config.num_heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        rotary_fraction=config.rotary_fraction,
        rope_base=config.rope_base,
        rope_scaling=config.rope_scaling,
        window=config.window(index),
        make_input=linears.input,
        make_output=linears.output,
        mesh=mesh,
    )
    make: MakeFeedForward = linears.feed_forward or partial(
        SwiGLU, config.dim, make_input=linears.input, make_output=linears.output, mesh=mesh
    )
    for method in (m for m in here if m.place == "feed_forward"):
        make = partial(_feed_forward, method, context, make)
    layer: nn.Module = DecoderLayer(
        norm(config.dim), attention, norm(config.dim), make(config.ffn_width)
    )
    for method in (m for m in here if m.place == "layer"):
        layer = method.build(context, layer)
    return layer


def _feed_forward(
    method: Method, context: LayerContext, inner: MakeFeedForward, ffn_dim: int
) -> nn.Module:
    return method.build(replace(context, ffn_dim=ffn_dim), inner)
