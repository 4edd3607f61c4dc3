"""Routed layers inside megatron-core's GPTModel: ModuleSpecs for its builder.

    spec = mixture_of_depths_spec(get_gpt_layer_local_spec(), capacity=0.125)
    model = GPTModel(config, transformer_layer_spec=block_of(spec, dense, config.num_layers), …)

megatron's hidden states are [S, B, D]. Its tensor parallelism is inside the layers and stays as it
is; its sequence parallelism, pipeline splits of a layer's tokens and packed sequences are refused.

Shape legend: S sequence, B batch, D width, K kept per sequence, R chosen tokens, T = B*S.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.blocks.mixture_of_depths import MixtureOfDepths
from adaptive.blocks.skip_layer import SkipLayer
from adaptive.blocks.wrapping import run_block
from adaptive.models.decoder.layers import RMSNorm
from adaptive.routing.hyperspherical import HypersphericalRouter
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection
from parallel.megatron import core
from parallel.mesh import Mesh


def mixture_of_depths_spec(layer_spec: Any, **options: Any) -> Any:
    """A spec of megatron's layer that computes a share of every sequence's tokens.

    Args:
        layer_spec: ModuleSpec of a `TransformerLayer`.
        options: of `MixtureOfDepths`, without `block` and `dim`.
    """
    return _routed_spec(layer_spec, _Depths, options)


def skip_layer_spec(layer_spec: Any, *, mesh: Mesh | None = None, **options: Any) -> Any:
    """A spec of megatron's layer that runs for the tokens whose router says so.

    Executing tokens attend to executing tokens: megatron's attention has queries and keys of the
    same tokens.

    Args:
        layer_spec: ModuleSpec of a `TransformerLayer`.
        mesh: the mesh that megatron's groups belong to. With noise, all tensor ranks must draw
            the same choices.
        options: of `SkipLayer`, without `block`, `dim` and `keys`.
    """
    return _routed_spec(layer_spec, _Skips, {"keys": "executing", "mesh": mesh, **options})


def hyperspherical_spec(layer_spec: Any, **options: Any) -> Any:
    """A spec of a layer with megatron's experts, chosen by a HypersphericalRouter.

    megatron's own config (`moe_router_topk`, `moe_router_score_function`, aux losses) says what
    becomes of the logits.

    Args:
        layer_spec: ModuleSpec of a `TransformerLayer` whose `mlp` is a MoE layer.
        options: of `HypersphericalRouter`, without `dim` and `num_experts`.
    """
    spec = deepcopy(layer_spec)
    experts = spec.submodules.mlp.submodules
    if not hasattr(experts, "router"):
        raise ValueError("layer_spec: its mlp must be a MoE layer (num_experts of the GPT spec)")
    router: Any = _hyperspherical_router()
    experts.router = functools.partial(router, options=options)
    return spec


def block_of(layer_specs: Sequence[Any], *, layer_norm: Any = None) -> Any:
    """What `GPTModel(transformer_layer_spec=…)` takes for layers that differ.

    Args:
        layer_specs: one a layer, e.g. dense and routed ones in turn.
        layer_norm: of the end; None: megatron's default without Transformer Engine.
    """
    block = core("transformer.transformer_block")
    norm = block.LayerNormImpl if layer_norm is None else layer_norm
    return block.TransformerBlockSubmodules(layer_specs=list(layer_specs), layer_norm=norm)


def with_norm(layer_spec: Any) -> Any:
    """The spec with `MegatronRMSNorm`, for megatron's sequence parallelism without CUDA.

    megatron's own norms need Apex or Transformer Engine there.
    """
    spec = deepcopy(layer_spec)
    spec.submodules.input_layernorm = MegatronRMSNorm
    spec.submodules.pre_mlp_layernorm = MegatronRMSNorm
    return spec


class MegatronRMSNorm(RMSNorm):
    """RMSNorm as megatron builds norms; it sums the weight's gradient over the tensor ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _Depths(MixtureOfDepths):
    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        return _run(self.block, packed_RD, selection.layout, **kwargs)


class _Skips(SkipLayer):
    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        return _run(self.block, packed_RD, selection.layout, **kwargs)


class _Compute(nn.Module):
    """megatron's layer as a block on [B, K, D]; holds it without owning its parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, x_BKD: Tensor, *, mask: Tensor, rotary: Tensor | None) -> Tensor:
        hidden_KBD = x_BKD.transpose(0, 1).contiguous()
        out_KBD, _ = self._layer[0].compute(
            hidden_states=hidden_KBD, attention_mask=mask, rotary_pos_emb=rotary
        )
        return out_KBD.transpose(0, 1)


def _run(
    block: nn.Module,
    packed_RD: Tensor,
    layout: TokenLayout,
    *,
    attention_mask: Tensor | None,
    rotary: Tensor | None,
) -> Tensor:
    """Chosen tokens as rows of their own, with the mask and the rotary angles of their places."""
    batch, longest = layout.batch_size, max(layout.max_seqlen, 1)  # as `to_rows` makes them
    column_R = torch.arange(layout.tokens, device=packed_RD.device)
    sequence_R = layout.sequence_ids
    column_R = column_R - layout.cu_seqlens.long()[sequence_R]
    place_BK = torch.zeros(batch, longest, dtype=torch.long, device=packed_RD.device)
    place_BK[sequence_R, column_R] = layout.positions
    absent_BK = torch.ones_like(place_BK, dtype=torch.bool)
    absent_BK[sequence_R, column_R] = False
    if attention_mask is None:
        hidden_BKK = place_BK[:, None, :] > place_BK[:, :, None]
    else:
        masks = attention_mask.expand(batch, -1, -1, -1)[:, 0]
        row_B = torch.arange(batch, device=packed_RD.device)[:, None, None]
        hidden_BKK = masks[row_B, place_BK[:, :, None], place_BK[:, None, :]]
    # Zeros on the right of short rows are nobody's keys but their own.
    itself = torch.eye(longest, dtype=torch.bool, device=packed_RD.device)
    hidden_BKK = (hidden_BKK | absent_BK[:, None, :]) & ~(itself & absent_BK[:, None, :])
    angles = None if rotary is None else rotary[:, 0, 0][place_BK.t()][:, :, None]
    return run_block(block, packed_RD, layout, mask=hidden_BKK[:, None], rotary=angles)


def _routed_spec(layer_spec: Any, wrapper: type[nn.Module], options: dict[str, Any]) -> Any:
    spec = deepcopy(layer_spec)
    spec.module = _routed_layer()
    spec.params = {**(spec.params or {}), "wrapper": wrapper, "options": options}
    return spec


@functools.cache
def _routed_layer() -> type[Any]:
    """megatron's layer with a router in front: made when megatron is there to derive from."""
    base: Any = core("transformer.transformer_layer").TransformerLayer

    class RoutedTransformerLayer(base):
        """Chooses tokens, then runs megatron's layer on them; `routing` holds the router."""

        def __init__(
            self,
            config: Any,
            submodules: Any,
            *args: Any,
            wrapper: type[nn.Module],
            options: dict[str, Any],
            **kwargs: Any,
        ) -> None:
            if config.sequence_parallel:
                raise ValueError(
                    "sequence_parallel=True: must be False for routed layers inside megatron; "
                    "use adaptive.models.Decoder for sequence parallelism"
                )
            super().__init__(config, submodules, *args, **kwargs)
            self.routing = wrapper(_Compute(self), config.hidden_size, **options)

        def compute(self, **kwargs: Any) -> tuple[Tensor, Any]:
            """megatron's layer itself."""
            return super().forward(**kwargs)

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            context: Tensor | None = None,
            rotary_pos_emb: Tensor | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Any]:
            for name in ("packed_seq_params", "inference_context", "attention_bias"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"{name}: must be None for routed layers inside megatron")
            out_BSD = self.routing(
                hidden_states.transpose(0, 1).contiguous(),
                attention_mask=attention_mask,
                rotary=rotary_pos_emb,
            )
            return out_BSD.transpose(0, 1).contiguous(), context

    return RoutedTransformerLayer


@functools.cache
def _hyperspherical_router() -> type[Any]:
    base: Any = core("transformer.moe.router").TopKRouter

    class HypersphericalTopKRouter(base):
        """megatron's top-k router, whose logits are cosines over a temperature."""

        def __init__(self, config: Any, *args: Any, options: dict[str, Any], **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            # Its own linear gate has no part in anything.
            self.weight = None
            self.cosine = HypersphericalRouter(
                config.hidden_size, config.num_moe_experts, **options
            )
            for parameter in self.cosine.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

        def gating(self, input: Tensor) -> Tensor:
            logits_TE = self.cosine(input.flatten(0, -2))
            return logits_TE.unflatten(0, input.shape[:-1])

    return HypersphericalTopKRouter
