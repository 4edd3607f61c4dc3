"""Which tokens a sparse path keeps when nobody scores them: structured cells, or plain chance.

Shape legend: B sequences, S sequence length, T packed tokens, C cells of a grid, M tokens of a
cell, K kept per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from adaptive.routing.choice import capacity_tokens, expert_choice, expert_choice_packed
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection
from parallel.draws import draw_own_rows

Keeping = Literal["structured", "random"]

# Share kept -> (cell, tokens kept in it), by the number of axes of the grid. The 2-D cells are
# the paper's; the others keep the same shares in the smallest cell that can.
_CELLS: dict[int, dict[float, tuple[tuple[int, ...], int]]] = {
    1: {0.125: ((8,), 1), 0.25: ((4,), 1), 0.375: ((8,), 3), 0.5: ((2,), 1)},
    2: {0.125: ((4, 4), 2), 0.25: ((2, 2), 1), 0.375: ((4, 4), 6), 0.5: ((2, 2), 2)},
    3: {0.125: ((2, 2, 2), 1), 0.25: ((2, 2, 2), 2), 0.375: ((2, 2, 2), 3), 0.5: ((2, 2, 2), 4)},
}


@dataclass(frozen=True)
class Cells:
    """`keep` tokens are kept at random in every cell of `shape` (axes as in the grid)."""

    shape: tuple[int, ...]
    keep: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def cells_for(keep: float, axes: int) -> Cells:
    """The cell that keeps the share `keep` of a grid with `axes` axes.

    Raises:
        ValueError: if the number of axes or the share has no cell.

    Source: SPRINT, arXiv 2510.21986, structured group-wise subsampling.
    """
    if axes not in _CELLS:
        raise ValueError(f"grid of {axes} axes: structured keeping needs 1, 2 or 3")
    if keep not in _CELLS[axes]:
        shares = ", ".join(str(share) for share in _CELLS[axes])
        raise ValueError(
            f"keep={keep}: structured keeping needs one of {shares} (or 1.0 for every token)"
        )
    shape, kept = _CELLS[axes][keep]
    return Cells(shape, kept)


def check_keeping(keep: float, keeping: str, grid: tuple[int, ...] | None) -> None:
    """Raise ValueError for a share, a way of keeping, or a grid that cannot be served."""
    if keeping not in get_args(Keeping):
        raise ValueError(f"keeping={keeping!r}: must be one of {', '.join(get_args(Keeping))}")
    if keep == 1:
        return
    if keeping == "random":
        if not 0 < keep < 1:
            raise ValueError(f"keep={keep}: must be in (0, 1]")
        return
    cells = cells_for(keep, 1 if grid is None else len(grid))
    if grid is not None:
        _check_grid(grid, cells)


def draw_keep_ids(
    batch_size: int,
    grid: tuple[int, ...],
    *,
    keep: float,
    keeping: Keeping = "structured",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the tokens that every sequence keeps: int64 [B, K], ascending in each row.

    Structured keeping takes the same number at random from every cell, so every place of the
    image keeps a neighbour; random keeping takes `round(keep · S)` anywhere. The shapes depend
    on the arguments alone: no host synchronisation.

    Args:
        batch_size: B, drawn independently.
        grid: sizes of the token grid, row-major, e.g. (16, 16) or (frames, rows, columns).
        keep: share of tokens kept; for structured keeping one of 0.125, 0.25, 0.375, 0.5.
        keeping: "structured" or "random".
        generator: of `device`; torch's default generator if None.
        device: where the result lives.

    Raises:
        ValueError: for an unknown share, or a grid that the cell does not divide.

    Source: SPRINT, arXiv 2510.21986, structured group-wise subsampling.
    """
    check_keeping(keep, keeping, grid)
    seq_len = math.prod(grid)
    if keep == 1:
        return torch.arange(seq_len, device=device).expand(batch_size, -1)

    def draw(rows: int) -> Tensor:
        return torch.rand(rows, seq_len, generator=generator, device=device)

    # A generator of the caller's is of these rows already.
    draws_BS = draw_own_rows(draw, batch_size) if generator is None else draw(batch_size)
    if keeping == "random":
        kept = expert_choice(draws_BS, capacity_tokens(keep, seq_len))
        return kept.positions.view(batch_size, -1)
    cells = cells_for(keep, len(grid))
    members_CM = _cell_members(grid, cells, device)
    order_BCK = draws_BS[:, members_CM].topk(cells.keep, dim=-1).indices
    rows_C1 = torch.arange(members_CM.shape[0], device=device)[:, None]
    return members_CM[rows_C1, order_BCK].flatten(1).sort(dim=1).values


def selection_of(keep_ids_BK: Tensor, layout: TokenLayout) -> Selection:
    """The Selection of given columns, in any order, of sequences of one length.

    Raises:
        ValueError: if the sequences differ in length or the shape does not fit them.
    """
    if not layout.uniform:
        raise ValueError("keep_ids: needs sequences of one length; leave it out to draw")
    batch, seq_len = layout.batch_size, layout.max_seqlen
    if keep_ids_BK.dim() != 2 or keep_ids_BK.shape[0] != batch:
        raise ValueError(f"keep_ids of shape {list(keep_ids_BK.shape)}: must be [{batch}, kept]")
    kept = keep_ids_BK.shape[1]
    if not 1 <= kept <= seq_len:
        raise ValueError(f"keep_ids: keeps {kept} tokens, must be between 1 and {seq_len}")
    columns_BK = keep_ids_BK.sort(dim=1).values
    rows_B1 = torch.arange(batch, device=columns_BK.device)[:, None] * seq_len
    indices = (columns_BK + rows_B1).flatten()
    return Selection(
        indices=indices,
        cu_seqlens=torch.arange(batch + 1, device=indices.device, dtype=torch.int32) * kept,
        max_seqlen=kept,
        weights=None,
        batch_size=batch,
        seq_len=seq_len,
        positions=layout.positions[indices],
    )


def check_columns(keep_ids_BK: Tensor, seq_len: int) -> None:
    """Raise ValueError for a column that is not in its sequence, or comes twice.

    Beyond the end of a sequence lies the next one. Only columns on the host are looked at: a
    device would have to be waited for.
    """
    if keep_ids_BK.device.type != "cpu" or torch.compiler.is_compiling():
        return
    columns_BK = keep_ids_BK.sort(dim=1).values
    wrong_BK = (columns_BK < 0) | (columns_BK >= seq_len)
    wrong_BK[:, 1:] |= columns_BK[:, 1:] == columns_BK[:, :-1]
    if wrong_BK.any():
        raise ValueError(
            f"keep_ids: holds {int(columns_BK[wrong_BK][0])}, must be different numbers between 0 "
            f"and {seq_len - 1} in each row"
        )


def keep_packed(layout: TokenLayout, *, keep: float, keeping: Keeping = "structured") -> Selection:
    """Draw the tokens that sequences of any lengths keep.

    Structured cells are runs of neighbouring positions; the last cell of a sequence, when cut
    short, keeps as many as it has up to the cell's number, so no sequence keeps none.
    Synchronises with the host once (the number kept), except for random keeping of sequences of
    one length.
    """
    check_keeping(keep, keeping, None)
    device = layout.positions.device
    draws_T = draw_own_rows(lambda tokens: torch.rand(tokens, device=device), layout.tokens)
    if keeping == "random":
        return expert_choice_packed(draws_T, layout, keep)
    cells = cells_for(keep, 1)
    cells_a_sequence = -(-layout.max_seqlen // cells.size)
    column_T = torch.arange(layout.tokens, device=draws_T.device)
    column_T = column_T - layout.cu_seqlens.long()[layout.sequence_ids]
    cell_T = layout.sequence_ids * cells_a_sequence + column_T // cells.size
    # Sorted by draw, then stably by cell: a token's place in its cell's run is its rank.
    order_T = draws_T.argsort()
    order_T = order_T[cell_T[order_T].argsort(stable=True)]
    sorted_T = cell_T[order_T]
    place_T = torch.arange(layout.tokens, device=draws_T.device)
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = place_T - torch.searchsorted(sorted_T, sorted_T)
    return Selection.from_mask(rank_T < cells.keep, layout)


def _check_grid(grid: tuple[int, ...], cells: Cells) -> None:
    if any(size % side for size, side in zip(grid, cells.shape, strict=True)):
        raise ValueError(
            f"grid {_times(grid)}: must be divisible by the cell {_times(cells.shape)} of "
            f"structured keeping; use another image or patch size, or keeping=random"
        )


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)


def _cell_members(grid: tuple[int, ...], cells: Cells, device: torch.device | str | None) -> Tensor:
    """int64 [C, M]: the flat indices of the tokens of every cell."""
    index = torch.arange(math.prod(grid), device=device)
    split = [n for size, side in zip(grid, cells.shape, strict=True) for n in (size // side, side)]
    axes = len(grid)
    # (cell rows, in-cell rows, cell columns, in-cell columns, …) -> cells first, members last.
    order = [2 * axis for axis in range(axes)] + [2 * axis + 1 for axis in range(axes)]
    return index.view(split).permute(order).reshape(-1, cells.size)
