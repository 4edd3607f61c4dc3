"""Representation alignment: hidden states of one layer learn to tell features of another model.

Shape legend: B batch, S tokens of an image, R tokens that the layer computes, D width, F width of
the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.sprint import SparseDenseFusion
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import pack
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, current_tape


@dataclass(frozen=True)
class AlignmentConfig:
    """Which layer is aligned, to how wide features.

    Attributes:
        feature_dim: width of the features that the user supplies, one row a token.
        layer: layers before the aligned output, counted through encoder and middle, from 1.
        hidden_dim: width of the projector's two hidden layers.
        coefficient: of the loss.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    feature_dim: int
    layer: int = 2
    hidden_dim: int = 2048
    coefficient: float = 0.5

    def __post_init__(self) -> None:
        for name in ("feature_dim", "layer", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.coefficient < 0:
            raise ValueError(f"coefficient={self.coefficient}: must be 0 or more")


class AlignedFusion(SparseDenseFusion):
    """A SparseDenseFusion whose layer `config.layer` is aligned while a RoutingTape is active.

    The loss is minus the mean cosine between `projector(hidden)` and the features of the same
    token, over the tokens that the layer computes (in the middle: the kept ones).

    Takes `features=` [B, S, F] in its forward, besides what the blocks take.

    Source: REPA, arXiv 2410.06940, equation 8.
    """

    def __init__(self, *parts: Any, config: AlignmentConfig, **options: Any) -> None:
        super().__init__(*parts, **options)
        depth = len(self.encoder) + len(self.middle)
        if config.layer > depth:
            raise ValueError(
                f"alignment.layer={config.layer}: must be at most {depth}, the layers of encoder "
                f"and middle"
            )
        self.alignment = config
        dim, hidden = self.fusion.dim, config.hidden_dim
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, config.feature_dim),
        )

    def inner(
        self,
        blocks: nn.ModuleList,
        packed_TD: Tensor,
        layout: TokenLayout,
        *,
        features: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        part, number = self._place()
        if features is None or blocks is not part:
            return super().inner(blocks, packed_TD, layout, **kwargs)
        packed_TD = super().inner(part[:number], packed_TD, layout, **kwargs)
        self._align(packed_TD, features, layout)
        return super().inner(part[number:], packed_TD, layout, **kwargs)

    def leaves_out(self, kwargs: dict[str, Any]) -> bool:
        """Not where the middle is aligned: a sample whose path is dropped has that loss still."""
        aligned = kwargs.get("features") is not None and self._place()[0] is self.middle
        return not aligned and super().leaves_out(kwargs)

    def planned_work(self, work: Work) -> Work:
        """As of the fusion, but that an aligned middle leaves no sample out."""
        if self.training and self._place()[0] is self.middle:
            return work.share(self.keep) if self.keep < 1 else work
        return super().planned_work(work)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        super().count_flops(count, work)
        part, _ = self._place()
        if self.training:
            chosen = count.chosen(self, planned=self.planned_work(work), dense=work)
            count(self.projector, chosen if part is self.middle else work)

    def _place(self) -> tuple[nn.ModuleList, int]:
        """The part that holds the aligned layer, and how many of its blocks come before."""
        inside = self.alignment.layer - len(self.encoder)
        return (self.encoder, self.alignment.layer) if inside <= 0 else (self.middle, inside)

    def _align(self, hidden_RD: Tensor, features_BSF: Tensor, layout: TokenLayout) -> None:
        tape = current_tape()
        if tape is None:
            return
        batch, tokens, width = features_BSF.shape
        if batch != layout.batch_size or width != self.alignment.feature_dim:
            raise ValueError(
                f"features of shape {list(features_BSF.shape)}: must be [{layout.batch_size}, "
                f"tokens, {self.alignment.feature_dim}]"
            )
        rows_R = layout.sequence_ids * tokens + layout.positions
        wanted_RF = pack(features_BSF.flatten(0, 1), rows_R)
        cosine_R = F.cosine_similarity(self.projector(hidden_RD).float(), wanted_RF.float(), dim=-1)
        # A mean over computed tokens, as a share of a mean over all tokens of the global batch.
        weight = tokens * batch / layout.tokens
        share = tape.scope.share_of(-cosine_R.sum() * weight, tokens * batch)
        loss = AuxiliaryLoss(share, self.alignment.coefficient)
        record = RoutingRecord(
            name="",
            kind="representation_alignment",
            tokens=tokens * batch,
            executed=layout.tokens,
            executed_lengths=None,
        )
        tape.record(self.projector, record, {"alignment": loss})
