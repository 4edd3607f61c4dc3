"""Plain data to dataclasses, and one line for the first thing that is wrong with it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptive.blocks.method import methods
from launch.run.errors import BadInput


def validated(kind: Any, value: Any, section: str) -> Any:
    """Plain data as the dataclass `kind`.

    Raises:
        BadInput: one line that names the value and the rule.
    """
    _refuse_odd_numbers(kind, value, section)
    try:
        with as_too_large(section):
            return _adapter(kind, methods()).validate_python(value)
    except ValidationError as error:
        raise BadInput(_first_line(error, kind, section)) from None


@contextmanager
def as_too_large(section: str) -> Iterator[None]:
    """Turn what torch says of sizes that it cannot hold into BadInput."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise BadInput(
            f"{section}: is too large to be written down: some size, or the product of two, is "
            "above the 64 bits that a tensor is measured by"
        ) from None


@cache
def _adapter(kind: Any, _: tuple[type, ...]) -> TypeAdapter[Any]:
    """What checks `kind`, made once: a registered method changes what the section `model` holds."""
    return TypeAdapter(kind)


def _refuse_odd_numbers(kind: Any, value: Any, path: str) -> None:
    """Refuse what pydantic takes for a number: `true` where one is wanted, and .nan anywhere."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{path}={value}: must be a finite number")
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if isinstance(value, bool) and bool not in options and {int, float} & set(options):
        what = "a whole number" if float not in options else "a number"
        raise BadInput(f"{path}={str(value).lower()}: must be {what}")
    if isinstance(value, dict):
        known = _field_names(kind)
        for key, inner in value.items():
            inner_kind = _field_type(kind, key) if key in known else None
            _refuse_odd_numbers(inner_kind, inner, f"{path}.{key}")
    elif isinstance(value, list):
        lists = [o for o in options if typing.get_origin(o) is list]
        inner_kind = _item_type(lists[0]) if lists else None
        for index, inner in enumerate(value):
            _refuse_odd_numbers(inner_kind, inner, f"{path}[{index}]")


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _first_line(error: ValidationError, kind: Any, section: str) -> str:
    # An unknown key explains a missing one, so it is said first.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _UNKNOWN)
    problem = problems[0]
    path, owner = section, kind
    for part in problem["loc"]:
        names = _field_names(owner)
        if isinstance(part, int):
            path, owner = f"{path}[{part}]", _item_type(owner)
        elif part in names:
            path, owner = f"{path}.{part}", _field_type(owner, str(part))
        elif problem["type"] in _UNKNOWN:
            path = f"{path}.{part}"
            return f"{path}: unknown key{suggestion(str(part), names)}"
    if problem["type"] == "value_error":
        return f"{path}.{problem['ctx']['error']}" if _field_names(owner) else problem["msg"]
    if problem["type"] == "missing":
        return f"{path}.{problem['loc'][-1]}: required"
    alike = [p for p in problems if p["loc"][:1] == problem["loc"][:1]]
    rules = dict.fromkeys(_rule(p) for p in alike)
    return f"{path}={_shown(problem['input'])}: must be {' or '.join(rules)}"


_RULES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping of keys",
    "dataclass": "a mapping of keys",
}


def _rule(problem: Mapping[str, Any]) -> str:
    """What pydantic asks for, in this project's words."""
    if problem["type"] == "literal_error":
        return f"one of {problem['ctx']['expected'].replace(' or ', ', ')}"
    return _RULES.get(problem["type"].split("_")[0], f"such that: {problem['msg']}")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def suggestion(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def dataclass_in(kind: Any) -> type | None:
    """The dataclass in `X`, `X | None`; None when there is none."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    found = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    return found[0] if found else None


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _item_type(kind: Any) -> Any:
    arguments = [part for part in typing.get_args(kind) if part is not ...]
    return arguments[-1] if arguments else None


def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _field_names(kind: Any) -> list[str]:
    owner = dataclass_in(kind)
    return [] if owner is None else [f.name for f in dataclasses.fields(owner)]


def _field_type(kind: Any, name: str) -> Any:
    owner = dataclass_in(kind)
    assert owner is not None
    return _hints(owner)[name]
