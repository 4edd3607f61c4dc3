"""Activation recomputation that takes the same routing decisions twice.

A recomputed forward can differ from the first by a rounding error, which is enough to move a
token across the top-k boundary: the gradients then belong to another computation than the loss.
Decisions are therefore saved in the first pass and replayed in the second. They live in the
closure of the checkpointed call, so nothing stays on modules, and nested or repeated calls of one
module keep theirs apart.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

T = TypeVar("T")


class _Pass:
    """One pass through a checkpointed call, the first or a repetition; entered once a backward."""

    def __init__(self, taken: list[Any], *, repeats: bool) -> None:
        self.taken = taken  # the call's decisions, in the order in which they were taken
        self.repeats = repeats
        self.outer: _Pass | None = None
        self.next = 0
        self._tokens: list[Token[_Pass | None]] = []

    def __enter__(self) -> None:
        self.outer, self.next = _current.get(), 0
        self._tokens.append(_current.set(self))
        watch(1)

    def __exit__(self, *_: object) -> None:
        watch(-1)
        _current.reset(self._tokens.pop())

    def decide(self, make: Callable[[], T]) -> T:
        if self.repeats:
            self.next += 1
            return self.taken[self.next - 1]
        # The call around this one must repeat the decision too, and may be doing so.
        decision = _make(make) if self.outer is None else self.outer.decide(make)
        self.taken.append(decision)
        return decision


_current: ContextVar[_Pass | None] = ContextVar("pass", default=None)

# Recomputation contexts and tapes open in this process, in any thread. torch.compile cannot trace
# a ContextVar; while none is open it need not, and it compiles again when one is.
_open = 0


def watch(change: int) -> None:
    """Count (1) or uncount (-1) something that decisions are recorded for or replayed from."""
    global _open
    _open += change


def unwatched_compilation() -> bool:
    """True while torch.compile traces and nothing records, replays or listens."""
    return torch.compiler.is_dynamo_compiling() and _open == 0


def decide(make: Callable[[], T]) -> T:
    """`make()` in a first pass; in a recomputation, what it returned in the first pass.

    `make` must not be differentiated through: it returns indices and other detached values.
    """
    current = None if unwatched_compilation() else _current.get()
    return _make(make) if current is None else current.decide(make)


def _make(make: Callable[[], T]) -> T:
    with torch.no_grad():
        return make()


def recomputing() -> bool:
    """True inside a forward that only repeats an earlier one for its activations.

    Holds for `adaptive.checkpoint` and for any other recomputation that runs in a backward pass.
    """
    current = _current.get()
    while current is not None:
        if current.repeats:
            return True
        current = current.outer
    return torch._C._current_graph_task_id() != -1


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of `torch.utils.checkpoint`: records decisions, then replays them.

    For models that call `torch.utils.checkpoint` themselves, such as those of `transformers`:
    `model.gradient_checkpointing_enable(dict(use_reentrant=False, context_fn=recompute_contexts))`.
    """
    taken: list[Any] = []
    return _Pass(taken, repeats=False), _Pass(taken, repeats=True)


@torch._disable_dynamo(recursive=False)  # torch.compiler.disable would import the compiler here
def checkpoint(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `function` without keeping its activations; backward recomputes them.

    The same as `torch.utils.checkpoint.checkpoint(use_reentrant=False)`, except that every routing
    decision inside is taken once and replayed. Calls may be nested, and differentiated again
    (`retain_graph`). Compilers break the graph here, and compile what is inside.
    """
    return torch_checkpoint(
        function, *args, use_reentrant=False, context_fn=recompute_contexts, **kwargs
    )
