"""What routers chose, on one rank and on a mesh: was another token chosen, and was it a tie?

A token that another one beats by less than a rounding error is chosen on one mesh and not on
another. From there on both runs are right and differ, which no tolerance of gradients tells from a
fault. So choices are compared first. Shape legend: T tokens of a batch, C choices of each (1: to
take part), K of them taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


class Choice(NamedTuple):
    """Of one router in one forward.

    Attributes:
        chosen: bool [T, C].
        scores: float [T, C], the larger ones are chosen; None: nothing was compared, or not told.
    """

    chosen: Tensor
    scores: Tensor | None

    @classmethod
    def of(cls, chosen: Tensor, scores: Tensor | None) -> Choice:
        """Of what a record of the batch holds.

        Args:
            chosen: bool [T], who takes part; or int64 [T, K], what each takes, anything beyond
                the choices (or below 0) being none.
            scores: [T], or [T, C]; with bool `chosen` and C = 2, of not taking part and of it.
        """
        scores = None if scores is None else scores.detach().float().cpu()
        chosen = chosen.detach().cpu()
        if chosen.dtype == torch.bool:
            two = scores is not None and scores.dim() == 2
            taken_TC = torch.stack([~chosen, chosen], 1) if two else chosen[:, None]
        else:
            known = 0 if scores is None else scores.shape[1]
            choices = max(known, int(chosen.max()) + 1 if chosen.numel() else 0)
            column_TK = torch.where(chosen < 0, choices, chosen)
            taken_TC = torch.zeros(chosen.shape[0], choices + 1, dtype=torch.bool)
            taken_TC = taken_TC.scatter(1, column_TK, True)[:, : known or choices]
        if scores is not None and scores.dim() == 1:
            scores = scores[:, None]
        return cls(
            taken_TC, scores if scores is not None and scores.shape == taken_TC.shape else None
        )


Choices = dict[str, Choice]


class Difference(NamedTuple):
    """The first choice on which two runs differ.

    Attributes:
        step, name: when, and the router.
        tied: every one of them is between scores that are equal within rounding, and alike in
            both runs.
        text: one line for people.
    """

    step: int
    name: str
    tied: bool
    text: str


class Notes:
    """The choices of one step on this rank, by micro-batch; a subject's `losses` fills it."""

    def __init__(self) -> None:
        self._parts: list[Choices] = [{}]

    def add(self, name: str, chosen: Tensor, scores: Tensor | None) -> None:
        """Note a router's choices in the forward of this micro-batch: see `Choice.of`."""
        part, number = self._parts[-1], 1
        while (key := name if number == 1 else f"{name} (call {number})") in part:
            number += 1
        part[key] = Choice.of(chosen, scores)

    def next(self) -> None:
        """The next micro-batch begins."""
        self._parts.append({})

    def whole(self, mesh: Mesh) -> Choices:
        """Of the whole batch, rows in order. A collective over the mesh."""
        mine = (mesh.data_rank, mesh.shard_rank, [part for part in self._parts if part])
        found = [mine]
        if mesh.replicas * mesh.tensor > 1:
            found = [mine] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        # Tensor ranks that hold the same tokens made the same choices.
        parts = {(data, shard): listed for data, shard, listed in found}
        order = sorted(
            (data, number, shard)
            for (data, shard), listed in parts.items()
            for number in range(len(listed))
        )
        joined: dict[str, list[Choice]] = {}
        for data, number, shard in order:
            for name, choice in parts[data, shard][number].items():
                joined.setdefault(name, []).append(choice)
        return {name: _joined(choices) for name, choices in joined.items()}


def _joined(choices: Sequence[Choice]) -> Choice:
    chosen = [choice.chosen for choice in choices]
    scores = [choice.scores for choice in choices if choice.scores is not None]
    whole = len(scores) == len(chosen)
    return Choice(torch.cat(chosen), torch.cat(scores) if whole else None)


def first_difference(
    expected: Sequence[Mapping[str, Choice]],
    found: Sequence[Mapping[str, Choice]],
    *,
    tolerance: float,
) -> Difference | None:
    """Where two runs first chose otherwise: the earliest step, and its earliest router.

    Args:
        expected, found: choices of every step, routers in the order in which they chose.
        tolerance: scores that differ by this share of their router's largest one are equal.
    """
    for step, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        for name, a in ours.items():
            b = theirs.get(name)
            # A router that saw other tokens does not tell what was chosen before it.
            if b is None or a.chosen.shape != b.chosen.shape:
                continue
            if not torch.equal(a.chosen, b.chosen):
                return _difference(step, name, a, b, tolerance)
    return None


def _difference(step: int, name: str, a: Choice, b: Choice, tolerance: float) -> Difference:
    gone, new = a.chosen & ~b.chosen, b.chosen & ~a.chosen
    place = f"step {step}, {name}: "
    if a.scores is None or b.scores is None:
        token = int((gone | new).any(1).nonzero()[0])
        text = f"{place}token {token} was chosen for on one side only; its scores are not known"
        return Difference(step, name, False, text)
    limit = tolerance * max(float(s.abs().max()) for s in (a.scores, b.scores))
    worst: tuple[Tensor, Tensor | None] = ((gone | new).nonzero()[0], None)
    gap = -1.0
    for one, others in [*((x, new) for x in gone.nonzero()), *((x, gone) for x in new.nonzero())]:
        apart, other = _closest(one, others.nonzero(), a.scores, b.scores)
        if apart > gap:
            worst, gap = (one, other), apart
        if gap > limit:
            break
    sides = [("one rank", a.scores), ("the mesh", b.scores)]
    had = ", ".join(f"{_scores(scores, *worst)} on {where}" for where, scores in sides)
    verdict = "a tie within rounding" if gap <= limit else f"no tie: rounding is {limit:.1e}"
    count = int((gone | new).any(1).sum())
    text = f"{place}{_named(a, *worst)} (scores {had}): {verdict}; {count} tokens differ"
    return Difference(step, name, gap <= limit, text)


def _closest(
    one: Tensor, others: Tensor, a_TC: Tensor, b_TC: Tensor
) -> tuple[float, Tensor | None]:
    """How far apart, at most, the scores of `one` are from those it stands in for, and which."""
    row, column = one.tolist()
    moved = abs(float(a_TC[row, column] - b_TC[row, column]))
    rivals = others[(others[:, 0] == row) | (others[:, 1] == column)]
    if not len(rivals):
        return float("inf"), None
    gaps = torch.stack(
        [(s[row, column] - s[rivals[:, 0], rivals[:, 1]]).abs() for s in (a_TC, b_TC)]
    ).amax(0)
    best = int(gaps.argmin())
    return max(moved, float(gaps[best])), rivals[best]


def _named(choice: Choice, one: Tensor, other: Tensor | None) -> str:
    several = choice.chosen.shape[1] > 1
    places = [f"{t}'s choice {c}" if several else f"{t}" for t, c in [one.tolist()]]
    if other is None:
        return f"token {places[0]} was taken on one side only"
    token, column = other.tolist()
    return f"token {places[0]} took the place of {token}" + (f"'s {column}" if several else "")


def _scores(scores: Tensor, one: Tensor, other: Tensor | None) -> str:
    places = [one] if other is None else [one, other]
    return " and ".join(f"{float(scores[tuple(place.tolist())]):.9g}" for place in places)
