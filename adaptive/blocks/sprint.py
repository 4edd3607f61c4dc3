"""SPRINT: the middle of a network computes a share of the tokens, and a fusion restores the rest.

Shape legend: B batch, S sequence, T tokens, R kept tokens, K kept per sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.path_fusion import MaskToken, PathFusion
from adaptive.blocks.protocol import Method, RoutedBlock, SequenceContext
from adaptive.blocks.wrapping import flatten_tokens, run_block
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import pack
from adaptive.routing.keeping import (
    Keeping,
    check_columns,
    check_keeping,
    draw_keep_ids,
    keep_packed,
    selection_of,
)
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import checkpoint, decide
from adaptive.routing.selection import Selection
from adaptive.routing.tape import RoutingRecord, current_tape
from parallel.draws import draw_own_rows
from parallel.mesh import Mesh
from parallel.rows import even_shards

Paths = Literal["both", "sparse", "dense"]


class SparseDenseFusion(RoutedBlock):
    """`decoder(fuse(restore(middle(kept tokens)), encoder(all tokens)))`.

    The encoder f and the decoder h run on every token, the middle g on the kept ones. g's output
    goes back to full length with a [MASK] vector at dropped places, and
    `Linear(2D -> D)(concat[g restored ; f])` joins the two paths. In training tokens are dropped
    (`keep`) and, with probability `path_drop`, a sample's whole g output is [MASK]; in evaluation
    every token is kept, unless `keep_ids` says otherwise.

    A sample whose g output is [MASK] is left out of the middle: it is not computed to be thrown
    away. It is computed and masked where leaving it out would need the host to wait for the device
    (`drop_path` given there), under `torch.compile`, whose shapes it would change, and where blocks
    get tensors that `per_sequence` does not name.

    Args:
        encoder, middle, decoder: blocks, each mapping hidden states to updated hidden states,
            residual included. A block with `takes_packed = True` is called as
            `block(packed, layout=…)`, any other as `block(hidden_BKD)`. Override `inner` to feed
            them anything else.
        dim: width D.
        keep: share of tokens that the middle computes in training; 1.0 is every token. May be
            set between steps. Structured keeping knows 0.125, 0.25, 0.375 and 0.5.
        keeping: "structured" (as many in every cell of the grid), or "random".
        grid: sizes of the token grid for structured cells, e.g. (16, 16); None: one axis.
        path_drop: probability that a sample's g output is replaced by [MASK] in training.
        mask_token: "fixed", N(0, 0.02) without gradient (the official one), or "learnt".
        paths: "both"; or, as controls, "sparse" (the fusion sees [MASK] in f's place) and
            "dense" (no middle, g is always [MASK]).
        per_sequence: keyword arguments of the blocks that are tensors with a row for every sequence
            (a condition [B, D]); a block gets the rows of the sequences that it computes.
        recompute: keep no activations inside blocks; backward computes them again.
        mesh: how the ranks share the model; one rank by default.

    Source: SPRINT, arXiv 2510.21986, section 3.
    """

    kind = "sparse_dense_fusion"

    def __init__(
        self,
        encoder: Iterable[nn.Module],
        middle: Iterable[nn.Module],
        decoder: Iterable[nn.Module],
        dim: int,
        *,
        keep: float = 0.25,
        keeping: Keeping = "structured",
        grid: tuple[int, ...] | None = None,
        path_drop: float = 0.1,
        mask_token: MaskToken = "fixed",
        paths: Paths = "both",
        per_sequence: Collection[str] = (),
        recompute: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        check_keeping(keep, keeping, grid)
        if not 0 <= path_drop <= 1:
            raise ValueError(f"path_drop={path_drop}: must be in [0, 1]")
        if paths not in get_args(Paths):
            raise ValueError(f"paths={paths!r}: must be one of {', '.join(get_args(Paths))}")
        self.encoder = nn.ModuleList(encoder)
        self.middle = nn.ModuleList(middle)
        self.decoder = nn.ModuleList(decoder)
        if paths == "dense" and len(self.middle):
            raise ValueError(f"paths='dense': needs an empty middle, not {len(self.middle)} blocks")
        self.keep = keep
        self.keeping = keeping
        self.grid = grid
        self.path_drop = path_drop
        self.paths = paths
        self.per_sequence = frozenset(per_sequence)
        self.recompute = recompute
        self.mesh = Mesh.single() if mesh is None else mesh
        self.fusion = PathFusion(dim, mask_token=mask_token, mesh=self.mesh)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
        keep_ids: Tensor | None = None,
        drop_path: Tensor | None = None,
        **inner_kwargs: Any,
    ) -> Tensor:
        """Run the three parts.

        Args:
            hidden: [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, which no block sees and which
                leaves as it came in.
            layout: where packed tokens came from.
            keep_ids: int64 [B, K], the columns that the middle computes, in any order, for
                sequences of one length; None: drawn in training, all in evaluation.
            drop_path: bool [B], samples whose g output is [MASK], on the host for them to be left
                out of the middle; None: drawn in training, none in evaluation.
            inner_kwargs: handed to every block through `inner`.

        Returns:
            The shape and dtype of `hidden`.
        """
        hidden_TD, layout, valid_T = flatten_tokens(hidden, layout, token_mask)
        if valid_T is None:
            out_TD = self._fused(hidden_TD, layout, keep_ids, drop_path, inner_kwargs)
            return out_TD.view_as(hidden)
        if self.mesh.shards > 1:
            raise ValueError(
                "token_mask: not where ranks share a sequence; pack the tokens instead"
            )
        mask_T = valid_T
        present = decide(lambda: Selection.from_mask(mask_T, layout))
        packed_PD = pack(hidden_TD, present.indices)
        out_PD = self._fused(packed_PD, present.layout, keep_ids, drop_path, inner_kwargs)
        return hidden_TD.index_copy(0, present.indices, out_PD).view_as(hidden)

    def inner(
        self, blocks: nn.ModuleList, packed_TD: Tensor, layout: TokenLayout, **kwargs: Any
    ) -> Tensor:
        """Run the blocks of one part. Override to feed blocks of your own.

        Args:
            blocks: `self.encoder`, `self.middle` or `self.decoder`.
            packed_TD: [T, D], that part's tokens, sequence after sequence, in original order.
            layout: who they are: boundaries and original positions.
            kwargs: what the caller gave beyond the wrapper's own arguments.
        """
        for block in blocks:
            if self.recompute and torch.is_grad_enabled():
                packed_TD = checkpoint(run_block, block, packed_TD, layout, **kwargs)
            else:
                packed_TD = run_block(block, packed_TD, layout, **kwargs)
        return packed_TD

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Encoder and decoder for all tokens, the middle for the kept ones among themselves."""
        chosen = count.chosen(self, planned=self.planned_work(work), dense=work)
        with count.recomputed() if self.recompute else nullcontext():
            for part, of_part in (
                (self.encoder, work),
                (self.middle, chosen),
                (self.decoder, work),
            ):
                count(part, of_part)
        self.count_fusion(count, work, chosen)

    def planned_work(self, work: Work) -> Work:
        """What the middle is expected to compute of it."""
        if not self.training:
            return work
        kept = work.share(self.keep) if self.keep < 1 else work
        return kept.of_sequences(1 - self.path_drop)

    def count_fusion(self, count: FlopCounter, dense: Work, sparse: Work) -> None:
        """Count the products of the rows of each path, and [MASK]'s own."""
        one_row = Work.of([1])
        rows = [one_row, one_row if self.paths == "sparse" else dense]
        rows += [] if self.paths == "dense" else [sparse]
        dim = self.fusion.dim
        for work in rows:
            count.linear(dim, dim, work, input_grad=work is not one_row)

    def leaves_out(self, kwargs: dict[str, Any]) -> bool:
        """Whether blocks that get these keyword arguments can do without some of the sequences."""
        others = [value for name, value in kwargs.items() if name not in self.per_sequence]
        unclear = (Tensor, list, tuple, dict)
        return not any(isinstance(value, unclear) for value in others)

    def _choose(self, layout: TokenLayout, keep_ids: Tensor | None) -> Selection | None:
        if self.paths == "dense":
            return None
        if keep_ids is not None:
            selection = selection_of(keep_ids, layout)
            check_columns(keep_ids, layout.max_seqlen)
            return selection
        if not self.training or self.keep == 1:
            return None
        grid, device = self.grid, layout.positions.device
        if grid is None:
            return keep_packed(layout, keep=self.keep, keeping=self.keeping)
        drawn = draw_keep_ids(
            layout.batch_size, grid, keep=self.keep, keeping=self.keeping, device=device
        )
        return selection_of(drawn, layout)

    def middle_path(
        self, dense_TD: Tensor, layout: TokenLayout, selection: Selection | None, **kwargs: Any
    ) -> Tensor:
        """g: the middle's output [R, D] for the selected tokens (all of them for None)."""
        if selection is None:
            return self.inner(self.middle, dense_TD, layout, **kwargs)
        packed_RD = pack(dense_TD, selection.indices)
        return self.inner(self.middle, packed_RD, selection.layout, **kwargs)

    def fuse(
        self,
        dense_TD: Tensor,
        sparse_RD: Tensor | None,
        *,
        indices_R: Tensor | None = None,
        kept_R: Tensor | None = None,
    ) -> Tensor:
        """Join the paths that this module has; arguments as of `PathFusion.forward`."""
        return self.fusion(
            None if self.paths == "sparse" else dense_TD,
            None if self.paths == "dense" else sparse_RD,
            indices_R=indices_R,
            kept_R=kept_R,
            tokens=dense_TD.shape[0],
        )

    def _fused(
        self,
        hidden_TD: Tensor,
        layout: TokenLayout,
        keep_ids: Tensor | None,
        drop_path: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        without = self.leaves_out(kwargs) and not torch.compiler.is_compiling()
        drawn = decide(lambda: self._draw(layout, keep_ids, drop_path, without))
        selection, present_M, kept_R = drawn
        dense_TD = self.inner(self.encoder, hidden_TD, layout, **kwargs)
        sparse_RD = None
        if self.paths != "dense":
            of_middle = kwargs if present_M is None else self._rows_of(present_M, kwargs)
            sparse_RD = self.middle_path(dense_TD, layout, selection, **of_middle)
        fused_TD = self.fuse(
            dense_TD,
            sparse_RD,
            indices_R=None if selection is None else selection.indices,
            kept_R=kept_R,
        )
        out_TD = self.inner(self.decoder, fused_TD, layout, **kwargs)
        self._record(layout, selection, rows=dense_TD.shape[0])
        return out_TD

    def _draw(
        self, layout: TokenLayout, keep_ids: Tensor | None, drop_path: Tensor | None, without: bool
    ) -> tuple[Selection | None, Tensor | None, Tensor | None]:
        """What the middle computes: tokens, their sequences, and what is kept of its output.

        Tokens are those of this rank's rows, None for all; sequences int64 [M], None for all;
        kept bool [R], None for all. Draws from torch's default generators, which tensor ranks
        seed alike.
        """
        selection = self._choose(layout, keep_ids)
        drop_B = self._path_drops(layout, drop_path)
        present_M = None
        if drop_B is not None and without and drop_B.device.type == "cpu":
            if drop_B.any():
                # Where all are dropped one is computed: every parameter takes part in every step.
                kept_B = torch.arange(layout.batch_size) == 0 if drop_B.all() else ~drop_B
                present_M = kept_B.nonzero().squeeze(1)
                everything = Selection.whole(layout) if selection is None else selection
                selection = everything.of_sequences(present_M)
                drop_B = drop_B[present_M]
            drop_B = drop_B if drop_B.any() else None
        selection = None if selection is None else selection.on_shard(layout, self.mesh)
        kept_R = None if drop_B is None else self._of_rows(~drop_B, layout, selection)
        return selection, present_M, kept_R

    def _rows_of(self, sequences_M: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for blocks that compute some of the sequences."""
        return {
            name: value[sequences_M.to(value.device)]
            if name in self.per_sequence and isinstance(value, Tensor)
            else value
            for name, value in kwargs.items()
        }

    def _path_drops(self, layout: TokenLayout, drop_path: Tensor | None) -> Tensor | None:
        if drop_path is not None:
            if drop_path.shape != (layout.batch_size,):
                shape = list(drop_path.shape)
                raise ValueError(f"drop_path of shape {shape}: must be [{layout.batch_size}]")
            return None if self.paths == "dense" else drop_path.bool()
        if not self.training or self.path_drop == 0 or self.paths == "dense":
            return None
        # On the host, which what is left out decides the shapes of.
        device = "meta" if layout.positions.is_meta else "cpu"
        draws_B = draw_own_rows(lambda rows: torch.rand(rows, device=device), layout.batch_size)
        return draws_B < self.path_drop

    def _of_rows(
        self, of_sequence_B: Tensor, layout: TokenLayout, selection: Selection | None
    ) -> Tensor:
        """A value of each sequence, repeated for its (selected) tokens that this rank holds."""
        taken = layout if selection is None else selection.layout
        of_sequence_B = of_sequence_B.to(taken.positions.device)
        if taken.uniform:
            of_token_T = of_sequence_B[:, None].expand(-1, taken.max_seqlen).flatten()
        else:
            of_token_T = of_sequence_B[taken.sequence_ids]
        if self.mesh.shards == 1:
            return of_token_T
        sizes = taken.shard_sizes or even_shards(taken.tokens, self.mesh.shards)
        return of_token_T.split(sizes)[self.mesh.shard_rank]

    def _record(self, layout: TokenLayout, selection: Selection | None, *, rows: int) -> None:
        tape = current_tape()
        if tape is None:
            return
        executed = rows if selection is None else selection.tokens
        taken = layout if selection is None else selection.layout
        lengths_B = taken.cu_seqlens.diff()
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=rows,
            executed=0 if self.paths == "dense" else executed,
            executed_lengths=None if self.paths == "dense" else lengths_B,
            chosen=None if selection is None else selection.mask(rows),
        )
        tape.record(self, record)


@dataclass(frozen=True)
class SparseDenseFusionConfig(Method):
    """Which tokens the middle of a network computes (SPRINT).

    Attributes:
        keep, keeping, path_drop, mask_token, paths: see `SparseDenseFusion`.
    """

    name = "sparse_dense_fusion"
    place = "sequence"
    blocks = (SparseDenseFusion,)
    sees_every_token = False

    keep: float = 0.25
    keeping: Keeping = "structured"
    path_drop: float = 0.1
    mask_token: MaskToken = "fixed"
    paths: Paths = "both"

    def __post_init__(self) -> None:
        if not 0 <= self.path_drop <= 1:
            raise ValueError(f"path_drop={self.path_drop}: must be in [0, 1]")

    def build(
        self,
        context: SequenceContext,
        inner: tuple[Iterable[nn.Module], Iterable[nn.Module], Iterable[nn.Module]],
        *,
        block: Callable[..., SparseDenseFusion] = SparseDenseFusion,
    ) -> SparseDenseFusion:
        """The layers of encoder, middle and decoder as one network; `block` may be a subclass."""
        return block(
            *inner,
            context.dim,
            grid=context.grid,
            per_sequence=context.per_sequence,
            recompute=context.recompute,
            mesh=context.mesh,
            **self.options(),
        )
