"""Merging around a diffusion transformer's attention, at sampling: ToMeSD's form.

Tokens merge before attention and are taken apart right behind it, so the residual stream itself is
never averaged, and a checkpoint needs no training for it.

Shape legend: T packed tokens, G groups, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.models.diffusion.layers import DiffusionBlock
from adaptive.models.diffusion.model import DiffusionTransformer
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.merge import merge, unmerge
from adaptive.routing.layout import TokenLayout
from adaptive.routing.merging import Amount, amount_of, tomesd
from adaptive.routing.recompute import decide
from adaptive.routing.tape import RoutingRecord, current_tape

CELL = (2, 2)


class MergedAttention(nn.Module):
    """Attention of groups of tokens: `unmerge(attention(merge(x)))`.

    Args:
        attention: as of a DiffusionBlock.
        grid: rows and columns of every image's tokens.
        amount: tokens merged, a count or a share; at most all but one of every 2x2 cell.
        generator: draws which token of a cell receives, one draw for all samples of a batch, so
            that both halves of a guided batch merge alike.

    Source: ToMeSD, arXiv 2303.17604, section 3.
    """

    def __init__(
        self,
        attention: nn.Module,
        *,
        grid: tuple[int, int],
        amount: Amount,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.attention: Any = attention
        self.grid, self.amount, self.generator = grid, amount, generator
        self.cells = (grid[0] // CELL[0]) * (grid[1] // CELL[1])

    def forward(
        self, x_TD: Tensor, *, layout: TokenLayout, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        # Drawn on the CPU: the same images on every device.
        drawn = torch.randint(0, CELL[0] * CELL[1], (1, self.cells), generator=self.generator)
        grouping = decide(
            lambda: tomesd(
                x_TD,
                layout,
                grid=self.grid,
                amount=self.amount,
                cells_BC=drawn.to(x_TD.device),
                cell=CELL,
            )
        )
        assert grouping.representatives is not None
        cos, sin = (table.index_select(0, grouping.representatives) for table in rotary)
        merged_GD = merge(x_TD, None, grouping)
        update_GD = self.attention(merged_GD, layout=grouping.layout, rotary=(cos, sin))
        tape = current_tape()
        if tape is not None:
            stands_T = torch.zeros(layout.tokens, dtype=torch.bool, device=x_TD.device)
            record = RoutingRecord(
                name="",
                kind="tomesd",
                tokens=layout.tokens,
                executed=grouping.groups,
                executed_lengths=grouping.cu_seqlens.diff(),
                chosen=stands_T.index_fill(0, grouping.representatives, True),
            )
            tape.record(self, record)
        return unmerge(update_GD, grouping)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The comparison of a cell's others with all that receive, and attention of the groups."""
        receive = self.cells
        others = self.grid[0] * self.grid[1] - receive
        merged = min(amount_of(self.amount, self.grid[0] * self.grid[1]), others)
        ones_B = torch.ones_like(work.tokens)
        sides = Work(ones_B * others, ones_B * receive, ones_B * receive, work.sequences)
        count.comparison(self.attention.query.in_features, sides)
        left_B = work.tokens - merged
        planned = Work(left_B, left_B, left_B, work.sequences)
        count(self.attention, count.chosen(self, planned=planned, dense=work))


@contextmanager
def merged_attention(
    model: DiffusionTransformer, amount: Amount, *, seed: int = 0
) -> Iterator[DiffusionTransformer]:
    """Inside, every attention of `model` merges `amount` tokens (0: none, bit for bit the model).

    Raises:
        ValueError: if the model's grid has no cells of 2x2 tokens, or its tokens lie over ranks.
    """
    if amount == 0:
        yield model
        return
    grid = model.config.grid
    amount_of(amount, model.config.tokens)
    if any(side % of for side, of in zip(grid, CELL, strict=True)):
        raise ValueError(f"merge={amount}: the grid {list(grid)} must be of even sides")
    if model.mesh.shards > 1:
        raise ValueError(f"merge={amount}: must be 0 under sequence_parallel")
    generator = torch.Generator().manual_seed(seed)
    blocks = [block for block in model.modules() if isinstance(block, DiffusionBlock)]
    plain = [block.attention for block in blocks]
    for block, attention in zip(blocks, plain, strict=True):
        merged: Any = MergedAttention(attention, grid=grid, amount=amount, generator=generator)
        block.attention = merged.train(block.training)
    try:
        yield model
    finally:
        for block, attention in zip(blocks, plain, strict=True):
            block.attention = attention
