"""DiffusionTransformer: a flow-matching transformer (DiT, SiT) whose middle drops tokens (SPRINT).

Shape legend: B batch, C channels, H W pixels (or latents), S tokens, T = B*S, K kept, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.path_fusion import MaskToken
from adaptive.blocks.protocol import Method, SequenceContext
from adaptive.blocks.sprint import Paths, SparseDenseFusion, SparseDenseFusionConfig
from adaptive.models.diffusion.alignment import AlignedFusion, AlignmentConfig
from adaptive.models.diffusion.layers import (
    AxialRotary,
    DiffusionBlock,
    OwnRowsLinear,
    TimeEmbedding,
    VelocityHead,
    patchify,
    unpatchify,
)
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.keeping import Keeping, check_keeping
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import current_tape
from parallel.mesh import Mesh
from parallel.rows import even_shards
from parallel.tensor import gather_shards

Guidance = Literal["path_drop", "classifier_free"]

# Width, heads and total depth of the published sizes; encoder and decoder take 2 layers each.
_SIZES = {"S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "XL": (1152, 16, 28)}


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything that decides a diffusion transformer's parameters.

    Attributes:
        image_size: pixels (or latents) a side.
        channels: of the image or latent.
        patch_size: pixels a side of one token.
        num_classes: labels are 0 … num_classes - 1; num_classes itself is the null label.
        dim: width.
        num_heads: attention heads, of a width that is a multiple of 4.
        encoder_depth: layers before tokens are dropped.
        middle_depth: layers that compute the kept tokens.
        decoder_depth: layers after the fusion.
        ffn: "gelu" (tanh form) or "swiglu".
        ffn_dim: feed-forward width; None: 4 D.
        qk_norm: learnt RMS norm of every head's queries and keys.
        rope_base: of the 2-D rotary positions.
        keep: share of tokens that the middle computes in training; 1.0 is every token.
        keeping: "structured" (0.125, 0.25, 0.375 or 0.5, as many in every cell) or "random".
        path_drop: probability that a sample's whole middle output is [MASK] in training.
        mask_token: [MASK] is "fixed" (the official one) or "learnt".
        paths: "both", or as controls "sparse" (no encoder in the fusion), "dense" (no middle).
        recompute: keep no activations inside layers; backward computes them again.
        alignment: representation alignment to the user's features, or None.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    image_size: int = 32
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000
    dim: int = 384
    num_heads: int = 6
    encoder_depth: int = 2
    middle_depth: int = 8
    decoder_depth: int = 2
    ffn: Literal["gelu", "swiglu"] = "gelu"
    ffn_dim: int | None = None
    qk_norm: bool = True
    rope_base: float = 10000.0
    keep: float = 0.25
    keeping: Keeping = "structured"
    path_drop: float = 0.1
    mask_token: MaskToken = "fixed"
    paths: Paths = "both"
    recompute: bool = False
    alignment: AlignmentConfig | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "patch_size", "num_classes", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("encoder_depth", "middle_depth", "decoder_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
            # Every layer is a tree of modules: a slip of the hand would build them for minutes.
            if getattr(self, name) > 1024:
                raise ValueError(f"{name}={getattr(self, name)}: must be at most 1024")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size}: must divide image_size={self.image_size}"
            )
        if self.dim % self.num_heads or self.dim // self.num_heads % 4:
            raise ValueError(
                f"num_heads={self.num_heads}: must divide dim={self.dim} into heads whose width "
                f"is a multiple of 4"
            )
        if self.ffn not in ("gelu", "swiglu"):
            raise ValueError(f"ffn={self.ffn!r}: must be gelu or swiglu")
        if self.fusion.paths == "dense" and self.middle_depth:
            raise ValueError(f"middle_depth={self.middle_depth}: must be 0 with paths=dense")
        check_keeping(self.keep, self.keeping, self.grid)

    @property
    def fusion(self) -> SparseDenseFusionConfig:
        """The method that stands around the layers; its options are this configuration's own."""
        names = (f.name for f in fields(SparseDenseFusionConfig))
        return SparseDenseFusionConfig(**{name: getattr(self, name) for name in names})

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that this model has, in order of application."""
        return (self.fusion,)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def tokens(self) -> int:
        """Tokens of an image, S."""
        return self.grid[0] * self.grid[1]

    @property
    def ffn_width(self) -> int:
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    @staticmethod
    def of_size(size: Literal["S", "B", "L", "XL"], **options: Any) -> DiffusionConfig:
        """The published width, heads and depth of a size; `options` replace any field.

        Source: DiT, arXiv 2212.09748, table 1; depths of SPRINT, arXiv 2510.21986 (XL: 2/24/2).
        """
        if size not in _SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(_SIZES)}")
        dim, heads, depth = _SIZES[size]
        config = DiffusionConfig(dim=dim, num_heads=heads, middle_depth=depth - 4)
        return replace(config, **options)


class DiffusionTransformer(nn.Module):
    """Predicts the velocity `ε - x0` of noised images `x_t = (1 - t) x0 + t ε`.

    `model(x_BCHW, t_B, y_B) -> velocity_BCHW`. In training the middle computes a share of the
    tokens (`config.keep`); in evaluation all of them.

    Parameters are drawn from torch's default generator: seed it before building.

    Source: SPRINT, arXiv 2510.21986; SiT, arXiv 2401.08740; DiT, arXiv 2212.09748.
    """

    def __init__(self, config: DiffusionConfig, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        patch_dim = config.channels * config.patch_size**2
        self.patch_embedding = OwnRowsLinear(patch_dim, config.dim, mesh=mesh)
        nn.init.xavier_uniform_(self.patch_embedding.weight)
        nn.init.zeros_(self.patch_embedding.bias)
        self.time_embedding = TimeEmbedding(config.dim)
        self.label_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.rotary = AxialRotary(
            config.dim // config.num_heads, config.grid, base=config.rope_base
        )
        if config.num_heads % mesh.tensor:
            raise ValueError(
                f"num_heads={config.num_heads}: must be a multiple of tensor={mesh.tensor}"
            )
        if mesh.context > 1:
            raise ValueError(
                f"context={mesh.context}: must be 1, a diffusion transformer's images are short"
            )
        if mesh.sequence_parallel and config.alignment is not None:
            raise ValueError("sequence_parallel=True: must be False with an alignment")
        depths = (config.encoder_depth, config.middle_depth, config.decoder_depth)
        encoder, middle, decoder = ([self._block() for _ in range(depth)] for depth in depths)
        context = SequenceContext(
            config.dim, config.grid, ("condition", "features"), config.recompute, mesh
        )
        block: Any = SparseDenseFusion
        if config.alignment is not None:
            block = partial(AlignedFusion, config=config.alignment)
        self.trunk = config.fusion.build(context, (encoder, middle, decoder), block=block)
        self.head = VelocityHead(config.dim, patch_dim, mesh=mesh)

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor,
        *,
        keep_ids: Tensor | None = None,
        drop_path: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Velocity of every pixel.

        Args:
            x_BCHW: noised images or latents, float.
            t_B: times in [0, 1], float; 0 is data, 1 is noise.
            y_B: int64 labels; `null_label` is no class. Label dropout happens where examples are
                drawn (`adaptive.models.diffusion.flow_matching`), not here.
            keep_ids: int64 [B, K], tokens that the middle computes, in any order; None: drawn in
                training, all in evaluation.
            drop_path: bool [B], samples whose middle output is [MASK], which the middle leaves out
                where this is on the host; None: drawn in training, none in evaluation.
            features: float [B, S, F], what `config.alignment` aligns to; None: nothing.

        Returns:
            [B, C, H, W] in the dtype of the parameters.

        Raises:
            ValueError: if the image or the features do not have the configured shape, or there are
                features and no `config.alignment`.
        """
        if features is not None:
            self._check_features(features, x_BCHW.shape[0])
        hidden_TD, layout, condition_BD = self._embed(x_BCHW, t_B, y_B)
        aligned = {} if features is None else {"features": features}
        hidden_TD = self.trunk(
            hidden_TD,
            layout=layout,
            keep_ids=keep_ids,
            drop_path=drop_path,
            condition=condition_BD,
            rotary=self.rotary,
            **aligned,
        )
        return self._velocity(hidden_TD, layout, condition_BD)

    def guided(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        scale: float,
        guidance: Guidance = "path_drop",
    ) -> Tensor:
        """Guided velocity `v_u + scale · (v_c - v_u)`, both halves in one pass.

        Args:
            x, t, y: as in `forward`.
            scale: guidance scale w; 1 is the conditional velocity itself.
            guidance: "path_drop": v_u has the null label and no middle at all, which runs for
                v_c only; "classifier_free": v_u has the null label and the whole network.

        Source: SPRINT, arXiv 2510.21986, path-drop guidance; arXiv 2207.12598.
        """
        if guidance not in get_args(Guidance):
            raise ValueError(
                f"guidance={guidance!r}: must be one of {', '.join(get_args(Guidance))}"
            )
        if guidance == "path_drop" and self.mesh.sequence_parallel:
            raise ValueError(
                "guidance='path_drop': not under sequence_parallel; sample on a mesh without it"
            )
        null = torch.full_like(y, self.null_label)
        doubled = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        if guidance == "classifier_free":
            whole: dict[str, Tensor] = {}
            if self.training:  # which draws other tokens for either half
                every = torch.arange(self.config.tokens, device=x.device)
                whole = {"keep_ids": every.expand(2 * len(y), -1)}
                whole["drop_path"] = torch.zeros(2 * len(y), dtype=torch.bool)
            both = self(*doubled, **whole)
        else:
            both = self._half_without_middle(*doubled)
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    def _half_without_middle(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Velocities of a batch whose second half takes [MASK] for the middle's output."""
        hidden_TD, layout, condition_BD = self._embed(x_BCHW, t_B, y_B)
        trunk, rotary = self.trunk, self.rotary
        inner = {"condition": condition_BD, "rotary": rotary}
        dense_TD = trunk.inner(trunk.encoder, hidden_TD, layout, **inner)
        half, batch = layout.tokens // 2, layout.batch_size // 2
        first = TokenLayout.dense(batch, self.config.tokens, x_BCHW.device)
        sparse_RD = trunk.middle_path(
            dense_TD[:half], first, None, condition=condition_BD[:batch], rotary=rotary
        )
        indices_R = torch.arange(half, device=x_BCHW.device)
        fused_TD = trunk.fuse(dense_TD, sparse_RD, indices_R=indices_R)
        hidden_TD = trunk.inner(trunk.decoder, fused_TD, layout, **inner)
        return self._velocity(hidden_TD, layout, condition_BD)

    def _check_features(self, features_BSF: Tensor, batch: int) -> None:
        alignment = self.config.alignment
        if alignment is None:
            raise ValueError("features: need an alignment in the model's configuration")
        # A class token in front of the others would shift every row against its patch.
        wanted = [batch, self.config.tokens, alignment.feature_dim]
        if list(features_BSF.shape) != wanted:
            raise ValueError(
                f"features of shape {list(features_BSF.shape)}: must be {wanted}, one row a token"
            )

    def _embed(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor
    ) -> tuple[Tensor, TokenLayout, Tensor]:
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if x_BCHW.dim() != 4 or tuple(x_BCHW.shape[1:]) != wanted:
            raise ValueError(f"x of shape {list(x_BCHW.shape)}: must be [B, {wanted}]")
        patches_BSP = patchify(x_BCHW, config.patch_size).to(self.patch_embedding.weight.dtype)
        layout = TokenLayout.dense(x_BCHW.shape[0], config.tokens, x_BCHW.device)
        tape = current_tape()
        if tape is not None:
            tape.enter(layout)
        patches_TP = patches_BSP.flatten(0, 1)
        if self.mesh.shards > 1:
            sizes = even_shards(layout.tokens, self.mesh.shards)
            layout = replace(layout, shard_sizes=sizes)
            patches_TP = patches_TP.split(list(sizes))[self.mesh.shard_rank]
        hidden_TD = self.patch_embedding(patches_TP)
        return hidden_TD, layout, self.time_embedding(t_B) + self.label_embedding(y_B)

    def _velocity(self, hidden_TD: Tensor, layout: TokenLayout, condition_BD: Tensor) -> Tensor:
        patches_TP = self.head(hidden_TD, layout=layout, condition=condition_BD)
        patches_TP = gather_shards(patches_TP, self.mesh, shard_sizes=layout.shard_sizes)
        patches_BSP = patches_TP.unflatten(0, (layout.batch_size, -1))
        return unpatchify(patches_BSP, self.config.grid, self.config.patch_size)

    def guided_flops(self, batch_size: int, *, guidance: Guidance = "path_drop") -> int:
        """Operations of one `guided` call in evaluation, as `adaptive.flops` counts them.

        Of path-drop guidance, about (2e + m + 2d) / (2e + 2m + 2d) of classifier-free guidance.
        """
        count = FlopCounter()
        half = Work.dense(batch_size, self.config.tokens)
        both = Work.dense(2 * batch_size, self.config.tokens)
        patches = self.patch_embedding
        count.linear(patches.in_features, patches.out_features, both)
        trunk = self.trunk
        middle = both if guidance == "classifier_free" else half
        for part in (self.time_embedding, trunk.encoder, trunk.decoder, self.head):
            count(part, both)
        count(trunk.middle, middle)
        trunk.count_fusion(count, both, middle)
        return round(float(count.total().forward))

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The patches take no gradient; the embeddings of time have one row a sample."""
        patches = self.patch_embedding
        count.linear(patches.in_features, patches.out_features, work, input_grad=False)
        for part in (self.time_embedding, self.trunk, self.head):
            count(part, work)

    def _block(self) -> DiffusionBlock:
        config = self.config
        return DiffusionBlock(
            config.dim,
            config.num_heads,
            ffn_dim=config.ffn_width,
            ffn=config.ffn,
            qk_norm=config.qk_norm,
            mesh=self.mesh,
        )
