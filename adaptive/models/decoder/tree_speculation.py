"""Speculation with trees: several drafts of a place, all verified in one pass.

Shape legend: B sequences, N nodes of a tree, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch

from adaptive.models.decoder.decode_depth import refuse_non_causal
from adaptive.models.decoder.generate import Sampling, check_prompts, check_whole
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.controllers import Controller, Fixed
from adaptive.models.decoder.speculation.drafts import Draft, TreeRun
from adaptive.models.decoder.speculation.trees import (
    Budgeted,
    Shape,
    Tree,
    chosen_tree,
    taken_path,
)
from adaptive.models.decoder.speculative import Speculation


@torch.no_grad()
def speculate_trees(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    *,
    max_new_tokens: int,
    shape: Shape | None = None,
    controller: Controller | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    end: int | None = None,
    inference: Inference | None = None,
) -> Iterator[Speculation]:
    """Continue prompts of any lengths together; yields after every round, the same object.

    As `speculate`: tokens are distributed as those of `generate`, and are the same at temperature
    0. A tree goes through the model in one pass, each node at the position of its depth, seeing
    the text and its ancestors; caches then keep the path that was taken.

    Args:
        model: in evaluation mode, routed causally.
        prompts: token ids, at least one each.
        draft: what drafts. Recycled candidates make a tree of their own, of `shape.limit` nodes.
        max_new_tokens: tokens to make for each sequence; fewer where it reaches the model's
            `max_seq_len`.
        shape: how trees grow; by default `Budgeted(16)`.
        controller: whether to draft: 0 tokens are no tree. It learns of a tree's longest path.
        sampling: of the model and of the draft alike; by default the model's own distribution.
        generator: of the draws, on the model's device.
        vocab_size: ids from here on are never made.
        end: the token that ends a text; None: none does.
        inference: of the model, made before; None: made here.

    Raises:
        ValueError: a draft that makes no trees; a model that looks at later tokens, is shared by
            ranks, or has layers that see no tree; a prompt that is empty or too long.
    """
    sampling = Sampling() if sampling is None else sampling
    check_whole(model)
    refuse_non_causal(model)
    check_prompts(model, prompts)
    controller = Fixed() if controller is None else controller
    shape = Budgeted() if shape is None else shape
    if inference is None:
        inference = Inference(model, rows=len(prompts) * (shape.limit + 1))
    run: TreeRun = draft.begin(inference, len(prompts))  # type: ignore[assignment]
    if not hasattr(run, "verify_trees"):
        raise ValueError(f"{type(draft).__name__}: drafts chains only; use speculate")
    growth = _Growth(run, len(prompts), shape, sampling, generator, vocab_size)
    made = Speculation([[] for _ in prompts])
    limits = [min(max_new_tokens, model.config.max_seq_len - len(p) + 1) for p in prompts]
    while True:
        rows = [
            [*prompt, *tokens]
            if len(tokens) < limit and (end is None or tokens[-1:] != [end])
            else []
            for prompt, tokens, limit in zip(prompts, made.tokens, limits, strict=True)
        ]
        going = [index for index, row in enumerate(rows) if row]
        if not going:
            return
        begun = time.perf_counter()
        trees = [Tree() for _ in rows]
        for index in going:
            room = limits[index] - len(made.tokens[index]) - 1
            if controller.most() and room:
                trees[index] = _within(growth.tree(index, rows[index]), room)
        drafted_at = time.perf_counter()
        logits_TV, starts = run.verify_trees(rows, trees)
        q_TV = sampling.probabilities(logits_TV[:, :vocab_size]).double()
        paths: list[list[int]] = [[] for _ in rows]
        for index in going:
            tree, start = trees[index], starts[index]
            q_NV = q_TV[start : start + len(tree.tokens) + 1]
            path, token = taken_path(tree, q_NV, shape.judge, generator)
            new = [*(tree.tokens[node] for node in path), token]
            if end is not None and end in new:
                new = new[: new.index(end) + 1]
            made.tokens[index] += new
            made.drafted += len(tree.tokens)
            made.accepted += len(path)
            made.rounds += 1
            paths[index] = [0, *(node + 1 for node in path)]
        run.keep_paths(paths)
        controller.learn(
            [max(trees[index].depths(), default=0) for index in going],
            [len(paths[index]) - 1 for index in going],
            draft_seconds=drafted_at - begun,
            verify_seconds=time.perf_counter() - drafted_at,
        )
        yield made


class _Growth:
    """Makes trees with a draft that continues rows: it goes from path to path."""

    def __init__(
        self,
        run: TreeRun,
        batch_size: int,
        shape: Shape,
        sampling: Sampling,
        generator: torch.Generator | None,
        vocab_size: int | None,
    ) -> None:
        self._run, self._shape, self._sampling = run, shape, sampling
        self._generator, self._vocab_size = generator, vocab_size
        self._read: list[list[int]] = [[] for _ in range(batch_size)]

    def tree(self, index: int, row: list[int]) -> Tree:
        candidates = getattr(self._run, "candidates_of", None)
        if candidates is not None:
            return chosen_tree(candidates, row[-1], self._shape.limit)
        return self._shape.grow(lambda path: self._behind(index, [*row, *path]), self._generator)

    def _behind(self, index: int, row: list[int]) -> torch.Tensor:
        """What the draft draws from behind a row; its caches forget another path."""
        pairs = zip(self._read[index], row, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        counts = [len(read) for read in self._read]
        counts[index] = min(common, len(row) - 1)
        self._run.retract(counts)
        self._read[index] = row
        rows: list[list[int]] = [[] for _ in self._read]
        rows[index] = row
        logits_1V = self._run.propose(rows)[:, : self._vocab_size]
        if not bool(logits_1V.isfinite().any()):
            return torch.zeros_like(logits_1V[0])
        return self._sampling.probabilities(logits_1V)[0]


def _within(tree: Tree, depth: int) -> Tree:
    """The nodes up to a depth: the model's own token follows the last."""
    depths = tree.depths()
    if max(depths, default=0) <= depth:
        return tree
    kept = [node for node, found in enumerate(depths) if found <= depth]
    place = {node: index for index, node in enumerate(kept)} | {-1: -1}
    parents = [place[tree.parents[node]] for node in kept]
    drawn = {place[node]: p_V for node, p_V in tree.drawn.items() if node in place}
    return Tree([tree.tokens[node] for node in kept], parents, drawn)
