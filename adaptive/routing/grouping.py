"""Grouping: which tokens of a pack become one, as Selection says which of them take part.

Shape legend: B sequences, T tokens of the source, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection


@dataclass(frozen=True)
class Grouping:
    """Many tokens to one. Groups are numbered in the order of their representatives in the pack.

    So a pack of groups keeps the order of its tokens, and causal attention over it stays causal.

    Attributes:
        group: int64 [T], the group of each token, 0 … G-1; -1: dropped, it is in none.
        sizes: float [G], how many of the original tokens each group stands for: the sum of its
            members' sizes. Composition over layers is exact only with them.
        cu_seqlens: int32 [B+1], cumulative number of groups a sequence.
        positions: int64 [G], position of each group's representative in its sequence.
        max_seqlen: most groups in one sequence (an upper bound is allowed); None: asked of
            `cu_seqlens` when first needed, which synchronises with the host.
        weights: float [T] or None (ones), differentiable: what a member counts in its group's mean
            beside its size.
        complete: True where no token is dropped, known to the maker; spares a masked product.
        representatives: int64 [G], the token of the source that each group stands in the place of,
            where the maker knows it.
        kept: float [G] or None (ones), differentiable: 0 for groups that a learned budget has taken
            away while training still computes them.

    Source: ToMe, arXiv 2210.09461, section 3; the sizes also in PiToMe, arXiv 2405.16148.
    """

    group: Tensor
    sizes: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    max_seqlen: int | None = None
    weights: Tensor | None = None
    complete: bool = False
    representatives: Tensor | None = None
    kept: Tensor | None = None

    @property
    def groups(self) -> int:
        """G."""
        return self.sizes.shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.group.shape[0]

    @property
    def layout(self) -> TokenLayout:
        """The groups as a pack of their own."""
        longest = self.max_seqlen
        if longest is None:
            longest = int(self.cu_seqlens.diff().amax()) if self.cu_seqlens.shape[0] > 1 else 0
            object.__setattr__(self, "max_seqlen", longest)
        return TokenLayout(self.cu_seqlens, longest, self.positions)

    @property
    def members(self) -> tuple[Tensor, Tensor]:
        """(order, starts): tokens group after group, dropped ones last, and where groups begin.

        `order[starts[g] : starts[g + 1]]` are the tokens of group g, ascending; int64 [T] and
        [G+1]. Made once for all ops of this grouping.
        """
        made = self.__dict__.get("_members")
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                group = torch.where(self.group < 0, self.groups, self.group)
                ordered, order = group.sort(stable=True)
                bounds = torch.arange(self.groups + 1, device=order.device)
                made = order, torch.searchsorted(ordered, bounds)
            object.__setattr__(self, "_members", made)
        return made

    def then(self, later: Grouping) -> Grouping:
        """This grouping, and then `later`, which groups the groups of this one."""
        group = later.group[self.group.clamp(min=0)].masked_fill(self.group < 0, -1)
        own, theirs = self.representatives, later.representatives
        return Grouping(
            group,
            later.sizes,
            later.cu_seqlens,
            later.positions,
            later.max_seqlen,
            complete=self.complete and later.complete,
            representatives=None if own is None or theirs is None else own[theirs],
            kept=later.kept,
        )

    @staticmethod
    def whole(layout: TokenLayout, sizes: Tensor | None = None) -> Grouping:
        """Every token a group of its own, of the sizes given (1)."""
        tokens = torch.arange(layout.tokens, device=layout.positions.device)
        if sizes is None:
            sizes = torch.ones(layout.tokens, device=tokens.device)
        return Grouping(
            tokens,
            sizes,
            layout.cu_seqlens,
            layout.positions,
            layout.max_seqlen,
            complete=True,
            representatives=tokens,
        )

    @staticmethod
    def of_selection(selection: Selection, source_tokens: int) -> Grouping:
        """The chosen tokens alone, each by itself; all others dropped."""
        chosen = selection.indices
        group = torch.full((source_tokens,), -1, dtype=torch.int64, device=chosen.device)
        group = group.index_copy(0, chosen, torch.arange(len(chosen), device=chosen.device))
        return Grouping(
            group,
            torch.ones(len(chosen), device=chosen.device),
            selection.cu_seqlens,
            selection.positions,
            selection.max_seqlen,
            selection.weights,
            representatives=chosen,
        )

    @staticmethod
    def from_targets(
        target_T: Tensor,
        layout: TokenLayout,
        sizes_T: Tensor | None = None,
        *,
        counts: tuple[int, int] | None = None,
        complete: bool = False,
    ) -> Grouping:
        """Groups from where each token goes.

        Args:
            target_T: int64 [T], the token (of the same sequence) that represents each token: itself
                for a representative, which must not go elsewhere; -1: dropped.
            layout: of the tokens.
            sizes_T: float [T], what each token stands for already; None: 1.
            counts: groups, and most of them in one sequence, where they are fixed; otherwise one
                synchronisation with the host asks for both.
            complete: no target is -1.
        """
        tokens = torch.arange(layout.tokens, device=target_T.device)
        stands_T = target_T == tokens
        running = torch.zeros(layout.tokens + 1, dtype=torch.int64, device=target_T.device)
        running[1:] = stands_T.cumsum(0)
        cu_seqlens = running[layout.cu_seqlens.long()]
        if counts is None:
            lengths = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens.diff()])
            groups, longest = torch.stack([cu_seqlens[-1], lengths.amax()]).tolist()
        else:
            groups, longest = counts
        group = running[target_T.clamp(min=0)]
        if not complete:
            group = group.masked_fill(target_T < 0, -1)
        representatives = torch.nonzero_static(stands_T, size=groups).squeeze(1)
        if sizes_T is None:
            sizes_T = torch.ones(layout.tokens, device=target_T.device)
        made = sizes_T.new_zeros(groups + 1)
        # The last place takes what is dropped.
        made = made.index_add(0, torch.where(group < 0, groups, group), sizes_T)
        return Grouping(
            group,
            made[:groups],
            cu_seqlens.int(),
            layout.positions[representatives],
            longest,
            complete=complete,
            representatives=representatives,
        )

    @staticmethod
    def from_starts(
        starts_T: Tensor,
        layout: TokenLayout,
        sizes_T: Tensor | None = None,
        *,
        representative: str = "first",
    ) -> Grouping:
        """Runs of neighbours: a group begins where `starts_T` is True, and at every sequence.

        Synchronises with the host once.

        Args:
            starts_T: bool [T].
            layout: of the tokens.
            sizes_T: float [T]; None: 1.
            representative: "first" or "last" member, whose position the group takes. A later layer
                that is causal by position needs the last: a group then follows all it holds.
        """
        if representative not in ("first", "last"):
            raise ValueError(f"representative={representative!r}: must be first or last")
        tokens = torch.arange(layout.tokens, device=starts_T.device)
        firsts = layout.cu_seqlens[:-1].long()
        # A sequence without tokens begins where the next one does, or behind the last token.
        begins = torch.cat([starts_T, starts_T.new_zeros(1)]).index_fill(0, firsts, True)[:-1]
        if representative == "first":
            target = torch.where(begins, tokens, 0).cummax(0).values
        else:
            ends = torch.cat([begins[1:], begins.new_ones(1)]) if len(begins) else begins
            target = torch.where(ends, tokens, layout.tokens).flip(0).cummin(0).values.flip(0)
        return Grouping.from_targets(target, layout, sizes_T, complete=True)
