"""Representation collapse: how far routing has flattened or frozen the hidden states.

Shape legend: T tokens, D width, E experts, K experts a token, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.routing.assignment import Assignment
from adaptive.routing.tape import RoutingRecord


def representation_collapse(hidden_TD: Tensor, expert_T: Tensor, num_experts: int) -> Tensor:
    """RC = Tr(Σ_W Σ_B⁺) of router inputs, classes being experts; **smaller is more collapsed**.

    Σ_W is the scatter within the tokens of an expert, Σ_B that of the experts' means around the
    mean of all, both divided by the number of tokens. Collapse draws the tokens of an expert
    together (neural collapse, arXiv 2008.08186), and RC to 0.

    Args:
        hidden_TD: valid tokens, any float dtype.
        expert_T: int64 [T], the (first) expert of each, below `num_experts`.
        num_experts: E. Experts without a token are left out.

    Returns:
        float64 scalar; NaN with fewer than two experts in use.

    Source: X-MoE, arXiv 2204.09179, section 5.3.
    """
    hidden_TD = hidden_TD.double()
    counts_E = torch.bincount(expert_T, minlength=num_experts).double()
    if int((counts_E > 0).sum()) < 2:
        return hidden_TD.new_full((), torch.nan)
    sums_ED = hidden_TD.new_zeros(num_experts, hidden_TD.shape[1]).index_add_(
        0, expert_T, hidden_TD
    )
    means_ED = sums_ED / counts_E.clamp(min=1)[:, None]
    within_TD = hidden_TD - means_ED[expert_T]
    # Weighted by its tokens, as the mean of all is.
    between_ED = (means_ED - hidden_TD.mean(0)) * counts_E.sqrt()[:, None]
    # Σ_B has rank below E: its pseudo-inverse comes from the singular values of its E rows.
    _, singular, directions_ED = torch.linalg.svd(between_ED, full_matrices=False)
    kept = singular > singular.max() * max(between_ED.shape) * torch.finfo(torch.float64).eps
    projected_TE = within_TD @ directions_ED.t()
    return (projected_TE.pow(2).sum(0)[kept] / singular[kept].pow(2)).sum()


def cosine_spread(cosines_TE: Tensor) -> Tensor:
    """Standard deviation over tokens of the token-expert cosines, mean over experts."""
    return cosines_TE.double().std(0, correction=0).mean()


def routing_fluctuation(
    before_TK: Tensor, after_TK: Tensor, *, padding: int | None = None
) -> Tensor:
    """Share of tokens whose set of experts changed between two checkpoints.

    Args:
        before_TK, after_TK: int64 [T, K], chosen experts of the same tokens.
        padding: the number that stands for no expert; tokens that have only that are left out.

    Source: X-MoE, arXiv 2204.09179, section 5.4.
    """
    if before_TK.shape != after_TK.shape:
        raise ValueError(
            f"choices of shape {list(after_TK.shape)}: must be {list(before_TK.shape)}, "
            "those of the same tokens"
        )
    changed_T = (before_TK.sort(-1).values != after_TK.sort(-1).values).any(-1)
    if padding is not None:
        changed_T = changed_T[(before_TK != padding).any(-1)]
    return changed_T.double().mean()


def experts_of_all_tokens(records: Sequence[RoutingRecord]) -> list[RoutingRecord]:
    """Those records of experts that every token reached.

    Experts inside a layer that skips tokens see only some, and others the next time: their choices
    are no two choices for the same tokens.
    """
    decided = [(record, record.chosen) for record in records if record.chosen is not None]
    # The model itself has the empty path.
    skipping = {
        f"{r.name}." if r.name else "": len(taken) for r, taken in decided if taken.dim() == 1
    }
    return [
        record
        for record, chosen_TK in decided
        if record.load is not None and chosen_TK.dim() == 2
        if all(
            len(chosen_TK) == tokens
            for path, tokens in skipping.items()
            if record.name.startswith(path)
        )
    ]


class FluctuationProbe:
    """Adds `collapse/fluctuation` to the records of a text that is routed again and again.

    Keeps the choices of the time before, by layer: give it the records of the same tokens at every
    checkpoint or evaluation. Experts that not every token reached have none.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def update(self, records: Sequence[RoutingRecord]) -> None:
        """Compare with the last call; the first has nothing to compare with."""
        earlier, self._before = self._before, {}
        for record in experts_of_all_tokens(records):
            assert record.chosen is not None
            before = earlier.get(record.name)
            if before is not None:
                record.statistics["collapse/fluctuation"] = routing_fluctuation(
                    before, record.chosen
                )
            self._before[record.name] = record.chosen


def inter_run_consistency(loads: Sequence[Tensor]) -> Tensor:
    """Mean Pearson correlation between the expert loads of every two runs, over layers.

    Expert e of one run is compared with expert e of the other, so the runs must start from the
    same experts (fine-tuning with other seeds); between runs trained apart expect about 0.

    Args:
        loads: for each run float [L, E], tokens that each expert of each layer received.

    Returns:
        float64 scalar in [-1, 1]; NaN where no layer of any pair has an uneven load.

    Source: X-MoE, arXiv 2204.09179, section 5.4.
    """
    if len(loads) < 2:
        raise ValueError(f"runs={len(loads)}: consistency needs at least 2")
    shapes = {tuple(load.shape) for load in loads}
    if len(shapes) > 1:
        raise ValueError(f"loads of shapes {sorted(shapes)}: must be the same [layers, experts]")
    centred = [load.double() - load.double().mean(-1, keepdim=True) for load in loads]
    units = [load_LE / load_LE.norm(dim=-1, keepdim=True) for load_LE in centred]
    correlations = [(a * b).sum(-1) for i, a in enumerate(units) for b in units[:i]]
    return torch.cat(correlations).nanmean()


@contextmanager
def measuring_collapse(model: nn.Module) -> Iterator[None]:
    """Inside, the mixtures of experts of a model record `collapse_statistics`."""
    mixtures: list[Any] = [m for m in model.modules() if hasattr(m, "measures_collapse")]
    before = [mixture.measures_collapse for mixture in mixtures]
    for mixture in mixtures:
        mixture.measures_collapse = True
    try:
        yield
    finally:
        for mixture, measures in zip(mixtures, before, strict=True):
            mixture.measures_collapse = measures


def collapse_statistics(
    hidden_TD: Tensor, assignment: Assignment, router: nn.Module, valid_T: Tensor | None
) -> dict[str, Tensor]:
    """RC and the spread of token-expert cosines, for a RoutingRecord. Synchronises with the host.

    The cosines are the router's own (its method `cosines`), or those of hidden states with the rows
    of its `weight`, a linear router's; a router with neither has no spread.
    """
    expert_T = assignment.expert_index[:, 0]
    valid_T = torch.ones_like(expert_T, dtype=torch.bool) if valid_T is None else valid_T
    chosen_T = valid_T & (expert_T < assignment.num_experts)
    statistics = {
        "collapse/rc": representation_collapse(
            hidden_TD[chosen_T], expert_T[chosen_T], assignment.num_experts
        )
    }
    cosines = getattr(router, "cosines", None)
    if cosines is None and isinstance(getattr(router, "weight", None), Tensor):
        cosines = partial(_linear_cosines, router.weight)
    # Outside its forward, ZeRO 3 may have taken a router's weights away.
    if cosines is not None and all(weight.numel() for weight in router.parameters()):
        statistics["collapse/cosine_spread"] = cosine_spread(cosines(hidden_TD[valid_T]))
    return statistics


def _linear_cosines(weight: Any, hidden_TD: Tensor) -> Tensor:
    hidden_TD = F.normalize(hidden_TD.float(), dim=-1)
    return hidden_TD @ F.normalize(weight.detach().float(), dim=-1).t()
