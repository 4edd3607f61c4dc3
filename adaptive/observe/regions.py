"""Regions: the parts of a step by name in torch's profiler, and what each costs.

    with torch.profiler.profile() as profiler, named_regions(model):
        for _ in range(5):
            ...                      # a step: forward, backward, optimizer
            profiler.step()
    costs = costs_by_region(profiler)

Modules, ops and collectives are named from outside while `named_regions` is entered: a model that
nobody profiles runs the code that it would run without this file. What else a loop does it names
by `with region("data"):`.

The backward of an operator belongs to the region of its forward. Autograd numbers its nodes in the
order in which operators made them, and says the number of the node that it evaluates: so whatever
a region's forward recorded is found again, in whichever order and thread the backward comes.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler as autograd_profiler
from torch.profiler import record_function

from adaptive.blocks.protocol import RoutedBlock
from adaptive.ops.backend import called_through

PREFIX = "adaptive/"
COMMUNICATION, OPTIMIZER, GRADIENTS, OTHER = "communication", "optimizer", "gradients", "other"

_NOTHING = nullcontext()
_STEP = "ProfilerStep#"
_BACKWARD = "autograd::engine::evaluate_function: "


def region(name: str) -> Any:
    """A part of a step, as a context; nothing where no profiler runs."""
    enabled = autograd_profiler._is_profiler_enabled
    return record_function(PREFIX + name) if enabled else _NOTHING


@contextmanager
def named_regions(model: nn.Module) -> Iterator[None]:
    """Name the modules of a model, the ops of this library and all collectives meanwhile.

    A module has the name by which its parent holds it (`attention`); one of a list the list's name
    and its number (`layers.3`), a routed one of a list its kind (`mixture_of_depths.3`). Modules
    whose children are layers of weights alone are not looked into, unless they route.
    """
    with ExitStack() as stack:
        for name, module in _parts(model):
            for handle in _hooked(module, name):
                stack.callback(handle.remove)
        stack.enter_context(called_through(_wrapped))
        if torch.distributed.is_available():
            _wrap_waiting(stack)
        yield


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        listed: list[tuple[str, nn.Module]] = [("", child)]
        if isinstance(child, nn.ModuleList):
            listed = list(child.named_children())
        for number, part in listed:
            kind = part.kind if isinstance(part, RoutedBlock) else ""
            yield f"{kind or name}.{number}" if number else name, part
            if isinstance(part, RoutedBlock) or _height(part) > 1:
                yield from _parts(part)


def _height(module: nn.Module) -> int:
    return max((1 + _height(child) for child in module.children()), default=0)


def _hooked(module: nn.Module, name: str) -> list[Any]:
    """Hooks, which also hold where a forward is left by an error, as recomputation leaves it."""
    opened = threading.local()

    def begin(*_: Any) -> None:
        opened.stack = [*getattr(opened, "stack", []), record_function(PREFIX + name)]
        opened.stack[-1].__enter__()

    def end(*_: Any) -> None:
        opened.stack.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end, always_call=True),
    ]


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return named


def _wrap_waiting(stack: ExitStack) -> None:
    """Collectives are operators that profilers see; that one waits for them is not."""
    from torch.distributed import Work

    wait = Work.wait
    stack.callback(setattr, Work, "wait", wait)
    setattr(Work, "wait", _wrapped(COMMUNICATION, wait))  # noqa: B010 -- a method, to mypy


Path = tuple[str, ...]


@dataclass
class Cost:
    """Of one region within all steps of a profile, those inside it excluded.

    Attributes:
        seconds: of the host.
        calls: how often it began (in the forward direction: nodes of a backward are not counted).
        device_seconds: of kernels that it started, on whichever device.
        kept: bytes that were allocated in it, less those freed: what a forward keeps for its
            backward.
    """

    seconds: float = 0.0
    calls: int = 0
    device_seconds: float = 0.0
    kept: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.calls + other.calls,
            self.device_seconds + other.device_seconds,
            self.kept + other.kept,
        )


@dataclass
class Costs:
    """What the steps of a profile cost.

    Attributes:
        paths: (region, the regions around it first; whether it is a backward) -> its cost. The
            empty path is what no region covers.
        steps: how many.
        seconds: from the first step's begin to the last one's end, on the host.
        peak: bytes that were held at most beyond those of the first step's begin.
    """

    paths: dict[tuple[Path, bool], Cost] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    peak: int = 0

    def by_name(self) -> dict[str, tuple[Cost, Cost]]:
        """region's own name, without its number in a list -> forward and all else, backward."""
        rows: dict[str, tuple[Cost, Cost]] = {}
        for (path, backward), cost in self.paths.items():
            name = row_of(path[-1]) if path else OTHER
            first, second = rows.get(name, (Cost(), Cost()))
            rows[name] = (first, second + cost) if backward else (first + cost, second)
        return rows


def row_of(name: str) -> str:
    """A region's name without its number in a list."""
    return re.sub(r"\.\d+$", "", name)


@dataclass
class _Span:
    """An interval of one thread.

    Attributes:
        name: None: an operator, which matters only as the maker of a node.
        node: (thread, number) of the node that it makes, or evaluates.
    """

    start: int
    end: int
    name: str | None
    node: tuple[int, int] | None = None
    device: int = 0


def costs_by_region(profiler: Any) -> Costs:
    """Read a finished torch.profiler.profile, whose steps `profiler.step()` has ended.

    The host's time is that of the thread that takes the steps; while it waits for a backward in
    other threads (on a GPU), theirs. On a GPU the host runs ahead, and `device_seconds` counts.

    Raises:
        ValueError: it has no step.
    """
    events = profiler.profiler.kineto_results.events()
    steps = [e for e in events if e.name().startswith(_STEP) and _on_host(e)]
    if not steps:
        raise ValueError("profiler: has no step, must be told of each by profiler.step()")
    begin, end = min(e.start_ns() for e in steps), max(e.end_ns() for e in steps)
    thread = steps[0].start_thread_id()
    backward = {e.start_thread_id() for e in events if e.name().startswith(_BACKWARD)}
    spans, allocated = [], []
    by_correlation: dict[int, int] = defaultdict(int)
    for event in events:
        # What a device shows of our own names is not work.
        if not _on_host(event) and not event.is_user_annotation():
            by_correlation[event.linked_correlation_id()] += event.duration_ns()
    for event in events:
        inside = begin <= event.start_ns() <= end
        if not inside or not _on_host(event):
            continue
        if event.name() == "[memory]":
            allocated.append((event.start_ns(), event.nbytes()))
        elif event.start_thread_id() in backward | {thread}:
            span = _span(event)
            if span is not None:
                span.device = by_correlation.get(event.correlation_id(), 0)
                spans.append(span)
    return _accounted(spans, sorted(allocated), (begin, end), len(steps))


def _on_host(event: Any) -> bool:
    return bool(event.device_type() == torch.autograd.DeviceType.CPU)


def _span(event: Any) -> _Span | None:
    name, number = event.name(), event.sequence_nr()
    span = _Span(event.start_ns(), event.end_ns(), None)
    if name.startswith(PREFIX):
        span.name = name.removeprefix(PREFIX)
    elif name.startswith("Optimizer."):
        span.name = OPTIMIZER
    elif name.startswith("c10d::"):
        span.name = COMMUNICATION
    elif name.startswith(_BACKWARD):
        span.name, span.node = name, (event.fwd_thread_id(), number)
    elif number >= 0 and event.scope() == 0:
        span.node = event.start_thread_id(), number
    return span


def _accounted(
    spans: list[_Span], allocated: list[tuple[int, int]], window: tuple[int, int], steps: int
) -> Costs:
    """Give every moment of the window to the innermost region that it lies in."""
    paths: dict[tuple[Path, bool], Cost] = defaultdict(Cost)
    made: dict[tuple[int, int], Path] = {}
    # Around each open region: when it ends, its path, whether it is a backward.
    around: list[tuple[float, Path, bool]] = [(float("inf"), (), False)]
    now, held, peak, memory = window[0], 0, 0, iter([*allocated, (window[1] + 1, 0)])
    moment, size = next(memory)

    def advance(until: int) -> None:
        """Let time pass inside the innermost region."""
        nonlocal now, held, peak, moment, size
        cost = paths[around[-1][1:]]
        while moment < until:
            cost.kept += size
            held += size
            peak = max(peak, held)
            moment, size = next(memory, (window[1] + 1, 0))
        cost.seconds += max(until - now, 0) / 1e9
        now = max(now, until)

    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while around[-1][0] <= span.start:
            advance(int(around[-1][0]))
            around.pop()
        _, path, backward = around[-1]
        if span.name is None:
            paths[path, backward].device_seconds += span.device / 1e9
            if span.node is not None:
                # Of operators that saw the same number, the last to begin made the node.
                made[span.node] = path
            continue
        advance(span.start)
        if span.name.startswith(_BACKWARD):
            of_forward = made.get(span.node) if span.node is not None else None
            if of_forward is not None:
                path = (*path, *_within_model(of_forward, path))
            elif "AccumulateGrad" in span.name:
                path = (*path, GRADIENTS)
            backward = True
        else:
            path = (*path, span.name)
            paths[path, backward].calls += 1
        # Threads overlap by a moment; a region ends no later than the one around it.
        around.append((min(span.end, around[-1][0]), path, backward))
    while len(around) > 1 and around[-1][0] <= window[1]:
        advance(int(around[-1][0]))
        around.pop()
    advance(window[1])
    return Costs(dict(paths), steps, (window[1] - window[0]) / 1e9, peak)


def _within_model(path: Path, around: Path) -> Path:
    """The path of a forward without the loop's own regions, which its backward has too."""
    return path[1:] if around and path[:1] == ("forward",) else path
