"""VisionTransformer: a plain ViT classifier.

Shape legend: B batch, C channels, S tokens of an image, T packed tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.method import MethodHost, takes_methods
from adaptive.blocks.protocol import MergingContext
from adaptive.models.diffusion.layers import AxialRotary, patchify
from adaptive.models.vision.layers import VisionLayer
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.merge import group_sum
from adaptive.routing.grouping import Grouping
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import current_tape
from parallel.linear import Linear
from parallel.mesh import Mesh

Pooling = Literal["class_token", "mean"]
Positions = Literal["learned", "rotary"]


@takes_methods("merging")
@dataclass(frozen=True)
class VisionConfig(MethodHost):
    """Everything that decides a vision transformer's parameters.

    Attributes:
        image_size: pixels a side.
        channels: of the image.
        patch_size: pixels a side of one token.
        num_classes: labels are 0 … num_classes - 1.
        dim, num_layers, num_heads: width; layers; attention heads.
        ffn_dim: feed-forward width; None: 4 D.
        pooling: what the head reads: a "class_token", or the "mean" of the image's tokens, by
            size where they were merged.
        positions: "learned", added to every token, or "rotary", 2-D, in attention.
        norm_eps: of the layer norms.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    image_size: int = 224
    channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    dim: int = 384
    num_layers: int = 12
    num_heads: int = 6
    ffn_dim: int | None = None
    pooling: Pooling = "class_token"
    positions: Positions = "learned"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "image_size",
            "channels",
            "patch_size",
            "num_classes",
            "dim",
            "num_layers",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"ffn_dim={self.ffn_dim}: must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size}: must divide image_size={self.image_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide dim={self.dim}")
        if self.positions == "rotary" and self.dim // self.num_heads % 4:
            raise ValueError(
                f"num_heads={self.num_heads}: must divide dim={self.dim} into heads whose width "
                f"is a multiple of 4 with positions=rotary"
            )
        for name, allowed in (("pooling", Pooling), ("positions", Positions)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be {' or '.join(get_args(allowed))}"
                )
        self.check_methods(self.num_layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def prefix(self) -> int:
        """Tokens before those of the image: 1, the class token, or 0."""
        return int(self.pooling == "class_token")

    @property
    def tokens(self) -> int:
        """Tokens of an image, S, the prefix among them."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def ffn_width(self) -> int:
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim


class VisionTransformer(nn.Module):
    """Images to logits of classes: `model(x_BCHW) -> logits_BK`.

    Parameters are drawn from torch's default generator: seed it before building.

    Source: ViT, arXiv 2010.11929.
    """

    def __init__(self, config: VisionConfig, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        if mesh.shards > 1:
            raise ValueError(
                "context and sequence_parallel: must be 1 and False, a vision transformer's images "
                "are short"
            )
        if config.num_heads % mesh.tensor:
            raise ValueError(
                f"num_heads={config.num_heads}: must be a multiple of tensor={mesh.tensor}"
            )
        patch_dim = config.channels * config.patch_size**2
        self.patch_embedding = Linear(patch_dim, config.dim)
        self.class_token = self.positions = self.rotary = None
        if config.prefix:
            self.class_token = nn.Parameter(torch.randn(config.dim) * 0.02)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(config.tokens, config.dim) * 0.02)
        else:
            self.rotary = AxialRotary(config.dim // config.num_heads, config.grid)
        self.layers = nn.ModuleList(
            build_layer(config, index, mesh) for index in range(config.num_layers)
        )
        self.register_load_state_dict_pre_hook(_rename_layers)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = Linear(config.dim, config.num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, classes] in the dtype of the parameters.

        Args:
            x_BCHW: images, float.

        Raises:
            ValueError: if the images do not have the configured shape.
        """
        hidden_TD, grouping = self.features(x_BCHW)
        return self.head(self._pooled(hidden_TD, grouping))

    def features(self, x_BCHW: Tensor) -> tuple[Tensor, Grouping]:
        """Normed hidden states [G, D] of what is left of the tokens, and who is in which group."""
        hidden_TD, layout = self._embed(x_BCHW)
        whole, sizes = Grouping.whole(layout), None
        told: dict[str, Tensor] = {}  # what a learned budget has taken away
        for layer in self.layers:
            if isinstance(layer, VisionLayer):
                hidden_TD = layer(hidden_TD, layout=layout, rotary=self.rotary)
                continue
            hidden_TD, grouping = layer(
                hidden_TD, layout=layout, sizes=sizes, rotary=self.rotary, **told
            )
            if grouping is not None:
                whole = whole.then(grouping)
                layout, sizes = grouping.layout, grouping.sizes
                told = {} if grouping.kept is None else {"kept": grouping.kept}
        return self.norm(hidden_TD), whole

    def _embed(self, x_BCHW: Tensor) -> tuple[Tensor, TokenLayout]:
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if x_BCHW.dim() != 4 or tuple(x_BCHW.shape[1:]) != wanted:
            raise ValueError(f"x of shape {list(x_BCHW.shape)}: must be [B, {wanted}]")
        layout = TokenLayout.dense(x_BCHW.shape[0], config.tokens, x_BCHW.device)
        tape = current_tape()
        if tape is not None:
            tape.enter(layout)
        patches_BSP = patchify(x_BCHW, config.patch_size).to(self.patch_embedding.weight.dtype)
        hidden_BSD = self.patch_embedding(patches_BSP)
        if self.class_token is not None:
            first_B1D = self.class_token.expand(len(x_BCHW), 1, -1)
            hidden_BSD = torch.cat([first_B1D, hidden_BSD], dim=1)
        if self.positions is not None:
            hidden_BSD = hidden_BSD + self.positions
        return hidden_BSD.flatten(0, 1), layout

    def _pooled(self, hidden_GD: Tensor, grouping: Grouping) -> Tensor:
        """One row a sample: its class token, or the mean of its tokens by size."""
        layout = grouping.layout
        if self.config.prefix:
            # It is protected from merging, and stands first.
            return hidden_GD.index_select(0, layout.cu_seqlens[:-1].long())
        sample_G = layout.sequence_ids
        shares_G = grouping.sizes.to(hidden_GD.dtype)
        if grouping.kept is not None:
            shares_G = shares_G * grouping.kept.to(hidden_GD.dtype)
        totals_B = shares_G.new_zeros(layout.batch_size).index_add(0, sample_G, shares_G)
        order_G = torch.arange(grouping.groups, device=hidden_GD.device)
        members = order_G, layout.cu_seqlens.long()
        return group_sum(hidden_GD, shares_G / totals_B[sample_G], sample_G, members)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The patches take no gradient and have no class token; the head has one row a sample."""
        patches = self.patch_embedding
        image = work.share(1 - self.config.prefix / self.config.tokens)
        count.linear(patches.in_features, patches.out_features, image, input_grad=False)
        for layer in self.layers:
            count(layer, work)
            if not isinstance(layer, VisionLayer):
                work = layer.merged(count, work)  # type: ignore[operator]
        count(self.head, work.of_samples)


def _rename_layers(model: nn.Module, weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Weights of a model whose layers merge are those of one whose do not, and the other way."""
    assert isinstance(model, VisionTransformer)
    for index, layer in enumerate(model.layers):
        plain = f"{prefix}layers.{index}."
        wanted = plain if isinstance(layer, VisionLayer) else f"{plain}layer."
        own = {name for name, _ in layer.named_parameters(recurse=False)}
        own |= {name for name, _ in layer.named_buffers() if not name.startswith("layer.")}
        for name in [name for name in weights if name.startswith(plain)]:
            rest = name.removeprefix(plain).removeprefix("layer.")
            if rest in own:
                continue
            weights[wanted + rest] = weights.pop(name)


def build_layer(config: VisionConfig, index: int, mesh: Mesh) -> nn.Module:
    """Layer `index`, merging where the configuration says so."""
    layer: nn.Module = VisionLayer(
        config.dim,
        config.num_heads,
        ffn_dim=config.ffn_width,
        norm_eps=config.norm_eps,
        prefix=config.prefix,
        mesh=mesh,
    )
    for method in config.methods:
        context = MergingContext(index, config.num_layers, config.prefix, config.tokens)
        layer = method.build(context, layer)
    return layer
