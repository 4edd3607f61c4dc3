"""Configurations that are wrong in one place, made from the schema, and what `launch.start` says.

`fuzz(folder, seed=…, count=…)` is what the suite runs a little of, and `make soak` a lot.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import random
import signal
import time
import traceback
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.run.config import SECTIONS
from launch.run.deepspeed_section import check_deepspeed
from launch.start import main
from launch.tasks.registry import task_class
from tests.distributed.runs import tiny_config, write_text

LONGEST = 5.0
"""Seconds that an answer may take."""

# What each section of methods is tried with, beside the model's own keys.
_METHODS: list[dict[str, Any]] = [
    {"mixture_of_depths": {"capacity": 0.5}},
    {"skip_layer": {"density": 0.5}},
    {"mixture_of_experts": {"num_experts": 4}},
    {"sized_feed_forward": {}},
    {"adaptive_computation": {}},
    {"pattention": {}},
]


@dataclass(frozen=True)
class Attempt:
    """One configuration with one thing wrong, or strange, in it.

    Attributes:
        key: what was changed.
        value: to what.
        may_pass: why it may be accepted; empty: it must be refused.
    """

    key: str
    value: Any
    may_pass: str
    tree: dict[str, Any]


@dataclass
class Figures:
    """What came of them."""

    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    faults: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.refused} refused in one line, {self.accepted} accepted for a reason, "
            f"{len(self.faults)} faults, slowest answer {self.slowest:.1f} s"
        )


def fuzz(folder: Path, *, seed: int = 0, count: int = 500) -> Figures:
    """Try `count` configurations, in this process, without starting a rank.

    Args:
        folder: an empty one; the text that they name is written there.
        seed: of the choice.
        count: configurations.
    """
    write_text(folder)
    draw = random.Random(seed)
    made = list(attempts(folder))
    chosen = [made[i] for i in draw.sample(range(len(made)), min(count, len(made)))]
    figures = Figures()
    # DeepSpeed is imported at the first check; how long that takes is no configuration's fault.
    check_deepspeed({})
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _inside(folder):
        for number, attempt in enumerate(chosen):
            _try(attempt, folder / f"config-{number % 4}.yaml", figures)
    return figures


def attempts(folder: Path) -> Iterator[Attempt]:
    """Every key of every section, with every wrong value, in an order that is always the same."""
    for method in _METHODS:
        base = tiny_config(folder)
        del base["model"]["mixture_of_depths"]
        base["model"] |= method
        base["phases"] = [{"name": "one"}]
        task = task_class("language_model")
        kinds = {"model": task.model_config, "data": task.data_config, **SECTIONS}
        (only,) = method
        for section, kind in kinds.items():
            if section == "model":
                for path, hint in _leaves(kind, ("model",)):
                    # Sections of other methods are tried where they stand.
                    if len(path) == 2 or path[1] == only:
                        yield from _attempts(base, path, hint)
            elif method is _METHODS[0]:
                yield from _attempts(base, (section,), kind)
                for path, hint in _leaves(kind, (section,)):
                    yield from _attempts(base, path, hint)
        if method is _METHODS[0]:
            for key in ("task", "output"):
                yield from _attempts(base, (key,), str)


def _leaves(kind: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(item):
            yield from _leaves(item, (*path, 0))
        return
    if not dataclasses.is_dataclass(kind):
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        yield (*path, field.name), hint
        for option in _options(hint):
            if dataclasses.is_dataclass(option):
                yield from _leaves(option, (*path, field.name))


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


_NESTED: Any = 1
for _ in range(60):
    _NESTED = {"a": _NESTED}

_STRANGE = ["", "\u202eoops", "\U0001f600", "a\nb", "x" * 5000, "~", "/", "..", "${output}", ":x"]
_NUMBERS: list[Any] = [0, -1, 1, 2**31, 10**12, 2**63, 10**30, 1e-300, 1e300, 0.5]


def _values(hint: Any) -> Iterator[tuple[Any, str]]:
    """(value, why it may be accepted or "") for a key of that type."""
    options = _options(hint)
    plain = {o for o in options if isinstance(o, type)}
    names = [o for o in options if typing.get_origin(o) is typing.Literal]
    holds_list = any(typing.get_origin(o) is list for o in options)
    holds_mapping = any(
        typing.get_origin(o) is dict or dataclasses.is_dataclass(o) for o in options
    )
    yield float("nan"), ""
    yield float("inf"), ""
    yield None, "null where a key may be without a value"
    yield _NESTED, "what is in deepspeed is DeepSpeed's" if holds_mapping and dict in plain else ""
    yield [[1]], ""
    yield ["a", {"b": []}], ""
    if not holds_mapping:
        yield {"capacity": 1}, ""
    if not holds_list:
        yield [1], ""
        yield [], ""
    if not (plain & {int, float}):
        yield 3, "one of the names" if names and any(3 in typing.get_args(n) for n in names) else ""
    if plain & {int, float}:
        for number in _NUMBERS:
            yield number, "a number in its range"
    if bool not in plain:
        yield True, ""
    if str in plain:
        for text in _STRANGE:
            yield text, "text that names something that is there, or can be made"
    else:
        yield "perhaps", ""
        yield "\u00b2", ""


def _attempts(base: dict[str, Any], path: tuple[Any, ...], hint: Any) -> Iterator[Attempt]:
    for value, may_pass in _values(hint):
        tree = copy.deepcopy(base)
        place: Any = tree
        for part in path[:-1]:
            if isinstance(part, str):
                # A section that was null stands with its defaults.
                place[part] = place.get(part) or {}
            place = place[part] if not isinstance(place, list) or place else place
        place[path[-1]] = value
        yield Attempt(".".join(map(str, path)), value, may_pass, tree)
    if dataclasses.is_dataclass(hint):
        yield Attempt(".".join(map(str, path)) + ".nonsense", 1, "", _with(base, path))


def _with(base: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    tree = copy.deepcopy(base)
    place: Any = tree
    for part in path:
        place[part] = place.get(part) or {}
        place = place[part]
    place["nonsense"] = 1
    return tree


def _try(attempt: Attempt, file: Path, figures: Figures) -> None:
    file.write_text(yaml.safe_dump(attempt.tree), encoding="utf-8")
    out, err, begun = io.StringIO(), io.StringIO(), time.perf_counter()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _ended_after(8.0):
            main(["--config", str(file), "--ranks", "2", "--dry-run"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        code = traceback.format_exc().strip().splitlines()[-1]
    seconds = time.perf_counter() - begun
    figures.slowest = max(figures.slowest, seconds)
    said = f"{attempt.key}={str(attempt.value)[:60]!r} ({type(attempt.value).__name__})"
    lines = err.getvalue().splitlines()
    if seconds > LONGEST:
        figures.faults.append(f"{said}: took {seconds:.1f} s")
    elif code == 2 and len(lines) == 1 and lines[0].startswith("error: "):
        figures.refused += 1
    elif code == 0 and attempt.may_pass:
        figures.accepted += 1
    else:
        what = "accepted" if code == 0 else f"ended with {str(code)[:200]}"
        figures.faults.append(f"{said}: {what} {lines[:2]}")


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """What does not answer is a fault of one configuration, not the end of the others."""

    def end(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
