"""Oracle: for single tokens, the path through a routed decoder that predicts them best.

What a router could reach at most. A path names one choice for every routed module:
SizedFeedForward (bypass, small, big), AdaptiveComputationModule (how many learners), SkipLayer
(skip, execute).

Source: Duo-LLM, arXiv 2410.10846, section 3.

Shape legend: B rows (copies of one text, each with a path of its own), S tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.protocol import RoutedBlock
from adaptive.models.decoder.model import Decoder
from adaptive.routing.forced import force_choices
from adaptive.routing.tape import RoutingTape

Path = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """The best path of one token within a budget.

    Attributes:
        path: a choice for each routed module, in the model's order.
        cost: mean over the modules of the choices' costs.
        loss: of predicting the next token, nats.
    """

    path: Path
    cost: float
    loss: float


@dataclass
class OracleReport:
    """What a search found.

    Attributes:
        modules: names of the routed modules, the order of every path.
        costs: of each module's choices, as shares of its full compute.
        positions: of the tokens that were searched.
        best: for each budget, the best path of each of these tokens.
        router: what the model's own routers chose for each of them.
        full: the loss of each with every module at full cost.
        evaluated: (token, path) pairs that were computed.
    """

    modules: list[str]
    costs: list[tuple[float, ...]]
    positions: list[int]
    best: dict[float, list[Found]] = field(default_factory=dict)
    router: list[Found] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    evaluated: int = 0

    def usage(self, budget: float) -> list[list[float]]:
        """Share of tokens for which each module's best choice is each of its choices."""
        found = self.best[budget]
        return [
            [sum(f.path[m] == c for f in found) / len(found) for c in range(len(costs))]
            for m, costs in enumerate(self.costs)
        ]


def routed_modules(model: Decoder) -> dict[str, RoutedBlock]:
    """The modules whose choices a path names, by name, in the model's order."""
    routed = ((n, m) for n, m in model.named_modules() if isinstance(m, RoutedBlock))
    return {name: module for name, module in routed if module.path_costs}


@torch.no_grad()
def search(
    model: Decoder,
    ids_S: Tensor,
    positions: Sequence[int],
    budgets: Sequence[float],
    *,
    beam: int = 8,
    exhaustive_up_to: int = 729,
    rows: int = 64,
) -> OracleReport:
    """Find the best path of single tokens within each budget.

    One token at a time leaves the model's own routing: it takes the path on trial, every earlier
    token stays as the routers have it, and the loss is that of the token's own prediction. With at
    most `exhaustive_up_to` paths all are tried. Otherwise a beam climbs from the cheapest path,
    raising one module by one choice at a time, and keeps at each step the `beam` best paths; it may
    miss the best.

    Args:
        model: in evaluation mode.
        ids_S: int64 [S], a text; the token after each position must be in it.
        positions: tokens to search for, each in 0…S-2.
        budgets: largest mean costs, in [0, 1].
        beam: paths kept at each step of the climb.
        exhaustive_up_to: most paths of an exhaustive search.
        rows: most copies of the text in one forward.

    Raises:
        ValueError: no routed module, one inside a layer that not every token reaches, or a
            position or budget out of range.
    """
    modules = routed_modules(model)
    if not modules:
        raise ValueError("the model has no module that a path could name")
    for position in positions:
        if not 0 <= position < ids_S.shape[0] - 1:
            raise ValueError(f"position={position}: must be between 0 and {ids_S.shape[0] - 2}")
    for budget in budgets:
        if not 0 <= budget <= 1:
            raise ValueError(f"budget={budget}: must be in [0, 1]")
    costs = [module.path_costs for module in modules.values()]
    report = OracleReport(list(modules), costs, list(positions))
    trial = _Trial(model, list(modules.values()), ids_S, rows)
    for position in positions:
        own = tuple(int(choice_S[position]) for choice_S in trial.own)
        tried = trial.losses(position, [own, tuple(len(c) - 1 for c in costs)])
        paths = 1
        for choices in costs:
            paths *= len(choices)
        if paths <= exhaustive_up_to:
            every = list(itertools.product(*(range(len(choices)) for choices in costs)))
            tried |= trial.losses(position, [path for path in every if path not in tried])
        else:
            for step in _climb(costs, tried, beam):
                tried |= trial.losses(position, step)
        report.evaluated += len(tried)
        found = [Found(path, _cost(path, costs), loss) for path, loss in tried.items()]
        report.router.append(Found(own, _cost(own, costs), tried[own]))
        report.full.append(tried[tuple(len(c) - 1 for c in costs)])
        for budget in budgets:
            # A rounding error must not exclude a path that costs exactly the budget.
            within = [f for f in found if f.cost <= budget + 1e-9]
            best = min(within, key=lambda f: (f.loss, f.cost, f.path))
            report.best.setdefault(budget, []).append(best)
    return report


def _cost(path: Path, costs: Sequence[tuple[float, ...]]) -> float:
    return sum(c[choice] for choice, c in zip(path, costs, strict=True)) / len(costs)


def _climb(
    costs: Sequence[tuple[float, ...]], tried: dict[Path, float], beam: int
) -> Iterator[list[Path]]:
    """Paths to try next, until every module is at its last choice. Reads `tried` as it grows."""
    level: list[Path] = [tuple(0 for _ in costs)]
    while level:
        yield [path for path in level if path not in tried]
        kept = sorted(level, key=lambda path: tried[path])[:beam]
        raised = {
            (*path[:m], path[m] + 1, *path[m + 1 :])
            for path in kept
            for m, choices in enumerate(costs)
            if path[m] + 1 < len(choices)
        }
        level = sorted(raised)


class _Trial:
    """Runs copies of a text in which one token of each takes a path of its own."""

    def __init__(
        self, model: Decoder, modules: list[RoutedBlock], ids_S: Tensor, rows: int
    ) -> None:
        self._model, self._modules, self._ids_S, self._rows = model, modules, ids_S, rows
        with RoutingTape(model) as tape:
            model(ids_S[None])
        chosen = {record.name: record.chosen for record in tape.records}
        names = {id(module): name for name, module in model.named_modules()}
        self.own = [_choices(chosen[names[id(module)]]) for module in modules]
        for module, own_S in zip(modules, self.own, strict=True):
            if own_S.shape != ids_S.shape:
                raise ValueError(
                    f"{names[id(module)]}: is inside a routed layer that not every token reaches"
                )

    def losses(self, position: int, paths: list[Path]) -> dict[Path, float]:
        """The loss of predicting the token after `position` with each of the paths."""
        out: dict[Path, float] = {}
        prefix_S = self._ids_S[: position + 1]
        target = self._ids_S[position + 1]
        for start in range(0, len(paths), self._rows):
            part = paths[start : start + self._rows]
            choices: dict[nn.Module, Tensor] = {}
            for index, (module, own_S) in enumerate(zip(self._modules, self.own, strict=True)):
                forced_BS = own_S[: position + 1].repeat(len(part), 1)
                forced_BS[:, -1] = torch.tensor([path[index] for path in part])
                choices[module] = forced_BS.flatten()
            with force_choices(choices):
                logits_BSV = self._model(prefix_S.expand(len(part), -1))
            loss_B = F.cross_entropy(
                logits_BSV[:, -1].float(), target.expand(len(part)), reduction="none"
            )
            out |= dict(zip(part, loss_B.tolist(), strict=True))
        return out


def _choices(chosen: Tensor | None) -> Tensor:
    """A record's choices as int64 [S]: depth routers record booleans."""
    assert chosen is not None
    return chosen.flatten().long()
