"""Trees of drafts: how they grow, and which path of one is taken.

Shape legend: N nodes of a tree, V vocabulary.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from adaptive.models.decoder.speculation.verification import (
    Verdict,
    recursive_rejection,
    sequential_rejection,
)

Distribution = Callable[[list[int]], Tensor]
"""The drafted tokens of a path -> what a draft draws the next one from, float [V]."""
_ROOT = -1


@dataclass
class Tree:
    """Drafted tokens, each behind its parent; a parent comes before its children.

    Attributes:
        tokens: of each node.
        parents: its parent; -1: the text.
        drawn: what the children of a node were drawn from, float [V]; a node that is not here has
            children that were chosen, not drawn, and differ.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def add(self, parent: int, token: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def children(self, node: int) -> list[int]:
        """In the order in which they were drawn."""
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def path(self, node: int) -> list[int]:
        """Nodes from the first behind the text to this one."""
        nodes: list[int] = []
        while node != _ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def depths(self) -> list[int]:
        """Of each node; 1 behind the text."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent == _ROOT else found[parent] + 1)
        return found

    def ancestors(self) -> Tensor:
        """bool [N + 1, N + 1]: what the text's last token and each node see, and themselves."""
        seen = torch.eye(len(self.tokens) + 1, dtype=torch.bool)
        seen[:, 0] = True
        for node, parent in enumerate(self.parents):
            seen[node + 1] |= seen[parent + 1]
        return seen


class Shape(Protocol):
    """How a tree grows from a draft's distributions.

    Attributes:
        limit: the most nodes of a tree.
    """

    @property
    def limit(self) -> int: ...

    def grow(self, distribution: Distribution, generator: torch.Generator | None) -> Tree: ...

    def judge(self, p_V: Tensor, q_V: Tensor, drafts: Tensor) -> Verdict:
        """The rule by which siblings that were drawn from p are taken."""
        ...


class Budgeted:
    """The nodes that are likeliest to be taken, by the draft's own probabilities.

    A heap holds places where a token may be drawn, by the probability that verification comes
    there. The best place draws x from what is left of its distribution R: its child's place is
    worth R(x) of it, its sibling's 1 - R(x). Siblings differ: recursive rejection without
    replacement.

    Args:
        budget: nodes.
        threshold: places worth less are left.

    Source: DySpec, arXiv 2410.11744, section 4.
    """

    def __init__(self, budget: int = 16, threshold: float = 0.0) -> None:
        if budget < 1:
            raise ValueError(f"budget={budget}: must be at least 1")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold}: must be in [0, 1)")
        self.limit, self.threshold = budget, threshold

    def grow(self, distribution: Distribution, generator: torch.Generator | None) -> Tree:
        tree, numbers = Tree(), itertools.count()
        heap: list[tuple[float, int, int, Tensor | None]] = [(-1.0, next(numbers), _ROOT, None)]
        while heap and len(tree.tokens) < self.limit:
            worth, _, parent, left_V = heapq.heappop(heap)
            if -worth <= self.threshold:
                break
            if left_V is None:
                tokens = [tree.tokens[node] for node in tree.path(parent)]
                left_V = distribution(tokens).double()
                tree.drawn[parent] = left_V
            if not float(left_V.sum()) > 0:
                continue  # it has no proposal
            token = int(torch.multinomial(left_V, 1, generator=generator))
            taken = float(left_V[token] / left_V.sum())
            node = tree.add(parent, token)
            heapq.heappush(heap, (worth * taken, next(numbers), node, None))
            left_V = left_V.clone()
            left_V[token] = 0
            heapq.heappush(heap, (worth * (1 - taken), next(numbers), parent, left_V))
        return tree

    def judge(self, p_V: Tensor, q_V: Tensor, drafts: Tensor) -> Verdict:
        return recursive_rejection(p_V, q_V, drafts, replacement=False)


class Independent:
    """Several drafts of the next token, each with a chain behind it, drawn independently.

    Args:
        count: chains.
        length: tokens of each.
        rule: "k_seq" or "recursive" rejection, with replacement.

    Sources: SpecTr, arXiv 2310.15141; SpecInfer, arXiv 2305.09781.
    """

    def __init__(self, count: int = 4, length: int = 3, *, rule: str = "k_seq") -> None:
        for name, value in (("count", count), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if rule not in ("k_seq", "recursive"):
            raise ValueError(f"rule={rule}: must be k_seq or recursive")
        self.count, self.length, self.rule = count, length, rule

    @property
    def limit(self) -> int:
        return self.count * self.length

    def grow(self, distribution: Distribution, generator: torch.Generator | None) -> Tree:
        tree = Tree()
        for _ in range(self.count):
            node, tokens = _ROOT, list[int]()
            for _ in range(self.length):
                if node not in tree.drawn:
                    tree.drawn[node] = distribution(tokens).double()
                if not float(tree.drawn[node].sum()) > 0:
                    break
                tokens.append(int(torch.multinomial(tree.drawn[node], 1, generator=generator)))
                node = tree.add(node, tokens[-1])
        return tree

    def judge(self, p_V: Tensor, q_V: Tensor, drafts: Tensor) -> Verdict:
        if self.rule == "k_seq":
            return sequential_rejection(p_V, q_V, drafts)
        return recursive_rejection(p_V, q_V, drafts)


def template(budget: int) -> list[tuple[int, ...]]:
    """Paths of ranks, the first of those whose ranks, counted from one, add up to least.

    A candidate of rank r is right less often the larger r, and a path only if all of it is.
    """
    found: list[tuple[int, ...]] = []
    total = 1
    while len(found) < budget:
        found += sorted(_compositions(total), key=len)
        total += 1
    return found[:budget]


def _compositions(total: int) -> list[tuple[int, ...]]:
    if not total:
        return [()]
    return [(rank, *rest) for rank in range(total) for rest in _compositions(total - rank - 1)]


def chosen_tree(candidates: Callable[[int], Sequence[int]], last: int, budget: int) -> Tree:
    """A template filled with each token's candidates, the likeliest first (Token Recycling).

    Source: arXiv 2408.08696, section 3; its template is another, found by search.
    """
    tree = Tree()
    nodes: dict[tuple[int, ...], int] = {(): _ROOT}
    for ranks in template(budget):
        parent = nodes.get(ranks[:-1])
        if parent is None:
            continue
        known = candidates(last if parent == _ROOT else tree.tokens[parent])
        if ranks[-1] < len(known):
            nodes[ranks] = tree.add(parent, known[ranks[-1]])
    return tree


def taken_path(
    tree: Tree,
    q_NV: Tensor,
    judge: Callable[[Tensor, Tensor, Tensor], Verdict],
    generator: torch.Generator | None,
) -> tuple[list[int], int]:
    """The nodes that verification takes, and the token that follows them.

    From the text on: of a node's children in turn, each is taken by the rule; where none is, the
    token comes from what is left. Children that were chosen are met by a token drawn from q, which
    is exact whatever chose them.

    Args:
        tree: of drafts.
        q_NV: float64 [N + 1, V], the model's distribution behind the text and behind each node.
        judge: the rule of drawn siblings.
        generator: of the draws.
    """
    node, path = _ROOT, list[int]()
    while True:
        q_V, children = q_NV[node + 1], tree.children(node)
        p_V = tree.drawn.get(node)
        if children and p_V is not None:
            tokens = torch.tensor([tree.tokens[child] for child in children]).to(q_V.device)
            verdict = judge(p_V, q_V, tokens)
            dice = torch.rand(
                len(children), dtype=q_V.dtype, device=q_V.device, generator=generator
            )
            taken = (dice < verdict.accept).tolist()
            if True in taken:
                node = children[taken.index(True)]
                path.append(node)
                continue
            return path, int(torch.multinomial(verdict.residual, 1, generator=generator))
        token = int(torch.multinomial(q_V, 1, generator=generator))
        met = [child for child in children if tree.tokens[child] == token]
        if not met:
            return path, token
        node = met[0]
        path.append(node)
