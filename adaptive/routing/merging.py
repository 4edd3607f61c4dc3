"""Which tokens merge: similarity of a metric, sequence by sequence, to a Grouping.

Every function takes a metric (by custom the keys before their rotation, mean over heads: rotated
keys compare positions), chooses without a gradient, keeps the order of the pack, and lets a
protected token neither merge nor receive. How many merge is `amount`: a count a sequence (int), or
a share of its tokens (float below 1); `threshold` lets only pairs merge that are at least so
similar, of which at most `amount`. Amounts that a sequence cannot give are cut to what it can.

With sequences of one length, no mask and no threshold the number of groups is fixed, and nothing
synchronises with the host; otherwise each call does a few times.

Shape legend: B sequences, S longest sequence, T tokens, C width of the metric, A and Z the two
sides of a matching, r pairs merged a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.routing.grouping import Grouping
from adaptive.routing.layout import TokenLayout

Amount = int | float

# (metric, protected or None, everything else a token has) of some sequences of one length ->
# (target of every token within its sequence, tokens merged a sequence where that is fixed).
_Match = Callable[[Tensor, Tensor | None, list[Tensor]], tuple[Tensor, int | None]]


def amount_of(amount: Amount, tokens: int) -> int:
    """Tokens to merge of a sequence of `tokens`: a count, or a share rounded down.

    Raises:
        ValueError: if it is negative, or a share that is not below 1.
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise ValueError(f"amount={amount}: must be 0 or more tokens, or a share in [0, 1)")
        return amount
    if not 0 <= amount < 1:
        raise ValueError(f"amount={amount}: must be a count of tokens, or a share in [0, 1)")
    return math.floor(amount * tokens + 1e-9)


def bsm(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    amount: Amount | None = None,
    threshold: float | None = None,
    protected_T: Tensor | None = None,
) -> Grouping:
    """Bipartite soft matching: tokens at even places merge into the most similar at odd ones.

    Each even token has one candidate; the `amount` most similar pairs merge, ties by the earlier.

    Source: ToMe, arXiv 2210.09461, section 3 and appendix D.
    """
    _check_budget(amount, threshold)

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, _: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        tokens = metric_BSC.shape[1]
        place = torch.arange(tokens, device=metric_BSC.device).expand(metric_BSC.shape[:2])
        sides = place[:, 0::2], place[:, 1::2]
        return _merge_best(metric_BSC, *sides, protected_BS, amount, threshold)

    return _grouping(match, metric_TC, layout, sizes_T, protected_T)


def random_pairs(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    amount: Amount,
    draws_T: Tensor,
    protected_T: Tensor | None = None,
) -> Grouping:
    """The control of every matching: as many tokens merge, whichever chance names.

    Args:
        draws_T: uniform numbers in [0, 1), one a token.
    """

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, drawn: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        (draws_BS,) = drawn
        if protected_BS is not None:
            draws_BS = draws_BS.masked_fill(protected_BS, 2.0)
        order_BS = draws_BS.argsort(dim=-1, stable=True)
        tokens = order_BS.shape[1]
        pairs = min(amount_of(amount, tokens), tokens // 2)
        target_BS = _own_places(order_BS)
        sources, places = order_BS[:, :pairs], order_BS[:, pairs : 2 * pairs]
        if protected_BS is None:
            return target_BS.scatter(1, sources, places), pairs
        free = ~(protected_BS.gather(1, sources) | protected_BS.gather(1, places))
        return target_BS.scatter(1, sources, torch.where(free, places, sources)), None

    return _grouping(match, metric_TC, layout, sizes_T, protected_T, draws_T)


def pitome(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    amount: Amount,
    margin: float,
    form: Literal["image", "text"] = "image",
    protected_T: Tensor | None = None,
) -> Grouping:
    """Merge among the tokens of highest energy, which stand in crowds of like ones; keep the rest.

    `image`: E_i is the mean over j of f(cos(m_i, m_j)), f the identity above `margin` and
    `exp(x - margin) - 1` below; of the 2r tokens of highest energy, those at even ranks merge into
    the most similar at odd ranks. `text`: a Gaussian kernel of 1 - cos with σ = 1 - margin instead,
    and the higher half merges into the lower. All r merge, however dissimilar.

    Args:
        margin: below 1; by the authors 0.9 at the first layer, falling with depth.

    Source: PiToMe, arXiv 2405.16148, sections 3.2 and 3.3; the two forms are the authors' code's.
    """
    if form not in ("image", "text"):
        raise ValueError(f"form={form!r}: must be image or text")
    if not margin < 1:
        raise ValueError(f"margin={margin}: must be below 1")

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, _: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        tokens = metric_BSC.shape[1]
        pairs = min(amount_of(amount, tokens), tokens // 2)
        similar_BSS = metric_BSC @ metric_BSC.transpose(1, 2)
        energy_BS = _energy(similar_BSS, margin, form)
        if protected_BS is not None:
            energy_BS = energy_BS.masked_fill(protected_BS, -torch.inf)
        order_BS = energy_BS.argsort(dim=-1, descending=True, stable=True)[:, : 2 * pairs]
        if form == "image":
            sources, places = order_BS[:, 0::2], order_BS[:, 1::2]
        else:
            sources, places = order_BS[:, :pairs], order_BS[:, pairs:]
        target_BS = _own_places(energy_BS)
        if not pairs:
            return target_BS, 0
        pair_BAZ = sources[..., None] * tokens + places[:, None]
        similar_BAZ = similar_BSS.flatten(1).gather(1, pair_BAZ.flatten(1)).view_as(pair_BAZ)
        free = None
        if protected_BS is not None:
            similar_BAZ = similar_BAZ.masked_fill(
                protected_BS.gather(1, places)[:, None], -torch.inf
            )
            free = similar_BAZ.amax(-1).isfinite() & ~protected_BS.gather(1, sources)
        best_BA = places.gather(1, similar_BAZ.argmax(-1))
        if free is None:
            return target_BS.scatter(1, sources, best_BA), pairs
        return target_BS.scatter(1, sources, torch.where(free, best_BA, sources)), None

    return _grouping(match, metric_TC, layout, sizes_T, protected_T)


def adjacent(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    amount: Amount | None = None,
    threshold: float | None = None,
    protected_T: Tensor | None = None,
) -> Grouping:
    """Neighbours merge, chains to runs; a run stands at its last member's position.

    The one matching that a causal model can use: with a `threshold` alone, whether a token joins
    its predecessor depends on these two. (`amount` ranks the pairs of a whole sequence, which looks
    ahead.) Earlier members must not read the run: un-merge with a shift of one run.

    Source: A-ToMe, arXiv 2306.16009, section 2.
    """
    _check_budget(amount, threshold)

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, _: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        tokens = metric_BSC.shape[1]
        place_BS = _own_places(metric_BSC[..., 0])
        if tokens < 2:
            return place_BS, 0
        similar = (metric_BSC[:, :-1] * metric_BSC[:, 1:]).sum(-1)
        if protected_BS is not None:
            similar = similar.masked_fill(protected_BS[:, :-1] | protected_BS[:, 1:], -torch.inf)
        joined, fixed = _best(similar, amount, threshold, tokens, protected_BS is not None)
        # Every token goes to the last of its run: the next place that is not joined to another.
        last = F.pad(~joined, (0, 1), value=True)
        ends = torch.where(last, place_BS, tokens).flip(1).cummin(1).values.flip(1)
        return ends, fixed

    return _grouping(match, metric_TC, layout, sizes_T, protected_T)


def tomesd(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    grid: tuple[int, int],
    amount: Amount,
    cells_BC: Tensor | None = None,
    cell: tuple[int, int] = (2, 2),
) -> Grouping:
    """Tokens of an image merge into one token of a cell each: for blocks that un-merge right after.

    One token of every cell may receive, the others may merge; the `amount` most similar pairs do.

    Args:
        grid: rows and columns of every sequence; multiples of the cell's.
        cells_BC: int64 [B or 1, cells], which of a cell's tokens receives; None: its first. Samples
            that are guided together (with and without a class) must be given the same.
        cell: rows and columns of a cell.

    Source: ToMeSD, arXiv 2303.17604, section 3.
    """
    rows, columns = grid
    if not layout.uniform or layout.max_seqlen != rows * columns:
        raise ValueError(f"grid={list(grid)}: must be that of every sequence")
    if rows % cell[0] or columns % cell[1]:
        raise ValueError(f"grid={list(grid)}: must be multiples of the cell {list(cell)}")
    places = torch.arange(rows * columns, device=metric_TC.device).view(rows, columns)
    by_cell = places.unflatten(0, (-1, cell[0])).unflatten(2, (-1, cell[1]))
    by_cell = by_cell.transpose(1, 2).flatten(2).flatten(0, 1)  # [cells, tokens of a cell]
    if cells_BC is None:
        cells_BC = by_cell.new_zeros(1, len(by_cell))

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, _: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        batch = metric_BSC.shape[0]
        chosen = cells_BC.expand(batch, -1)
        receive = by_cell.expand(batch, -1, -1).gather(2, chosen[..., None]).squeeze(2)
        receive = receive.sort(-1).values
        others = torch.ones(batch, rows * columns, dtype=torch.bool, device=receive.device)
        others = others.scatter(1, receive, False)
        count = rows * columns - receive.shape[1]
        merge = others.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
        return _merge_best(metric_BSC, merge, receive, protected_BS, amount, None)

    return _grouping(match, metric_TC, layout, sizes_T, None)


def mctf(
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None = None,
    *,
    attention_T: Tensor,
    amount: Amount,
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0),
    protected_T: Tensor | None = None,
) -> Grouping:
    """Matching by similarity, low attention received and small size together; both ways.

    The score of a pair is `((cos + 1) / 2)^(1/τs)` times `1 / (a_i a_j)` and `1 / (s_i s_j)`, each
    divided by its greatest of the sequence, to the powers `1/τi` and `1/τz`. Half of the amount
    (rounded up) merges from even places to odd ones, the rest the other way among tokens that took
    no part. A member counts in its group's mean by size times attention (`Grouping.weights`).

    Args:
        attention_T: attention that each token receives, mean over heads and queries, above 0.
        temperatures: τs, τi, τz.

    Source: MCTF, arXiv 2403.10030, section 3.2. Who may still merge the other way is not said
    there; here nobody merges twice or into a token that is gone.
    """

    def match(
        metric_BSC: Tensor, protected_BS: Tensor | None, given: list[Tensor]
    ) -> tuple[Tensor, int | None]:
        tokens = metric_BSC.shape[1]
        attention_BS, size_BS = given
        place = _own_places(attention_BS)
        pairs = min(amount_of(amount, tokens), tokens // 2)
        # Every pair is of an even and an odd place: the second direction reads the transpose.
        score_BAZ = _mctf_scores(metric_BSC, attention_BS, size_BS, temperatures)
        out = torch.zeros_like(place, dtype=torch.bool) if protected_BS is None else protected_BS
        target = place
        for first, count in ((0, -(-pairs // 2)), (1, pairs // 2)):
            sources, places = place[:, first::2], place[:, 1 - first :: 2]
            if count == 0 or not places.shape[1]:
                continue
            score = score_BAZ.transpose(1, 2) if first else score_BAZ
            closed = out[:, first::2, None] | out[:, None, 1 - first :: 2]
            best, partner = score.masked_fill(closed, -torch.inf).max(-1)
            best_first = best.argsort(dim=-1, descending=True, stable=True)[:, :count]
            merging = sources.gather(1, best_first)
            into = places.gather(1, partner.gather(1, best_first))
            possible = best.gather(1, best_first).isfinite()
            target = target.scatter(1, merging, torch.where(possible, into, merging))
            gone = place != target
            received = torch.zeros_like(target).scatter_add(1, target, gone.long())
            out = out | gone | (received > 0)
        return target, None

    if sizes_T is None:
        sizes_T = torch.ones(layout.tokens, device=metric_TC.device)
    made = _grouping(match, metric_TC, layout, sizes_T, protected_T, attention_T, sizes_T)
    return replace(made, weights=attention_T)


def _mctf_scores(
    metric_BSC: Tensor, attention_BS: Tensor, size_BS: Tensor, temperatures: tuple[float, ...]
) -> Tensor:
    """[B, A, Z]: of tokens at even places and at odd ones.

    The greatest 1 / (v_i v_j) of a sequence is the square of its greatest 1 / v, so that what is
    divided by it is a product of a factor for each of the two.
    """
    factor_BS = torch.ones_like(metric_BSC[..., 0])
    for value_BS, temperature in zip((attention_BS, size_BS), temperatures[1:], strict=True):
        least_B1 = value_BS.amin(1, keepdim=True)
        factor_BS = factor_BS * (least_B1 / value_BS).to(factor_BS.dtype) ** (1 / temperature)
    even, odd = metric_BSC[:, 0::2], metric_BSC[:, 1::2]
    score = (even @ odd.transpose(1, 2)).add_(1).clamp_(min=0).div_(2)
    if temperatures[0] != 1:
        score.pow_(1 / temperatures[0])
    return score.mul_(factor_BS[:, 0::2, None]).mul_(factor_BS[:, None, 1::2])


def _energy(similar_BSS: Tensor, margin: float, form: str) -> Tensor:
    if form == "text":
        sigma = 1 - margin
        kernel = torch.exp(-0.5 * ((1 - similar_BSS) / sigma) ** 2)
        return kernel.mean(-1) / (sigma * math.sqrt(2 * math.pi))
    # elu(x - margin) lacks the margin itself above it: a count puts it back, in fewer passes.
    # (ge_ leaves numbers: summing booleans converts them first, which costs more than all else.)
    over_BSS = similar_BSS - margin
    bent_BS = F.elu(over_BSS).sum(-1)
    return (bent_BS + margin * over_BSS.ge_(0).sum(-1)) / similar_BSS.shape[-1]


def _merge_best(
    metric_BSC: Tensor,
    sources_BA: Tensor,
    places_BZ: Tensor,
    protected_BS: Tensor | None,
    amount: Amount | None,
    threshold: float | None,
) -> tuple[Tensor, int | None]:
    """Each source has its most similar place; of these pairs the best merge."""
    tokens, target = metric_BSC.shape[1], _own_places(metric_BSC[..., 0])
    if not sources_BA.shape[1] or not places_BZ.shape[1]:
        return target, 0
    width = metric_BSC.shape[2]
    a, z = (
        metric_BSC.gather(1, at[..., None].expand(-1, -1, width)) for at in (sources_BA, places_BZ)
    )
    similar_BAZ = a @ z.transpose(1, 2)
    if protected_BS is not None:
        closed = (
            protected_BS.gather(1, sources_BA)[..., None]
            | protected_BS.gather(1, places_BZ)[:, None]
        )
        similar_BAZ = similar_BAZ.masked_fill(closed, -torch.inf)
    best_BA, partner_BA = similar_BAZ.max(-1)
    merges, fixed = _best(best_BA, amount, threshold, tokens, protected_BS is not None)
    into_BA = places_BZ.gather(1, partner_BA)
    return target.scatter(1, sources_BA, torch.where(merges, into_BA, sources_BA)), fixed


def _best(
    score_BA: Tensor, amount: Amount | None, threshold: float | None, tokens: int, masked: bool
) -> tuple[Tensor, int | None]:
    """bool [B, A]: the `amount` highest scores at or above the threshold, ties by the earlier."""
    chosen = score_BA.isfinite() if masked else torch.ones_like(score_BA, dtype=torch.bool)
    if threshold is not None:
        chosen &= score_BA >= threshold
    if amount is None:
        return chosen, None
    pairs = min(amount_of(amount, tokens), score_BA.shape[1])
    top = score_BA.argsort(dim=-1, descending=True, stable=True)[:, :pairs]
    chosen &= torch.zeros_like(chosen).scatter(1, top, True)
    return chosen, None if masked or threshold is not None else pairs


def _own_places(like_BS: Tensor) -> Tensor:
    """int64 [B, S]: every token's place in its sequence."""
    return torch.arange(like_BS.shape[1], device=like_BS.device).expand(like_BS.shape).contiguous()


@torch.no_grad()
def _grouping(
    match: _Match,
    metric_TC: Tensor,
    layout: TokenLayout,
    sizes_T: Tensor | None,
    protected_T: Tensor | None,
    *more_T: Tensor,
) -> Grouping:
    """Match sequence by sequence, those of one length at once, and number the groups."""
    wide = torch.promote_types(metric_TC.dtype, torch.float32)
    metric_TC = F.normalize(metric_TC.detach().to(wide), dim=-1)
    if layout.uniform and layout.tokens:
        shape = layout.batch_size, layout.max_seqlen
        columns = [x.unflatten(0, shape) for x in more_T]
        protected = None if protected_T is None else protected_T.unflatten(0, shape)
        target_BS, merged = match(metric_TC.unflatten(0, shape), protected, columns)
        starts = layout.cu_seqlens[:-1].long()[:, None]
        counts = None
        if merged is not None:
            counts = layout.tokens - shape[0] * merged, shape[1] - merged
        target_T = (target_BS + starts).flatten()
        return Grouping.from_targets(target_T, layout, sizes_T, counts=counts, complete=True)
    targets, start = [torch.zeros(0, dtype=torch.int64, device=metric_TC.device)], 0
    for length in layout.cu_seqlens.diff().tolist():
        if length:
            rows = slice(start, start + length)
            protected = None if protected_T is None else protected_T[None, rows]
            more = [x[None, rows] for x in more_T]
            target, _ = match(metric_TC[None, rows], protected, more)
            targets.append(target[0] + start)
        start += length
    return Grouping.from_targets(torch.cat(targets), layout, sizes_T, complete=True)


def _check_budget(amount: Amount | None, threshold: float | None) -> None:
    if amount is None and threshold is None:
        raise ValueError("amount and threshold: give at least one of them")
