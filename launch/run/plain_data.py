"""JSON and YAML as plain data, whoever wrote it: what is too deep or too large is a ValueError.

Nothing of this machine comes in by them: `${section.key}` stands for another key of the same file,
`${oc.env:…}` and every other of OmegaConf's resolvers is refused.
"""

from __future__ import annotations

import json
import stat
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

_DEPTH = 50
_NODES = 100_000
_BYTES = 1 << 24


def json_value(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, or nested deeper than any parser needs to follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """A JSON file of a few kilobytes: a manifest, a state, settings.

    Raises:
        OSError: it cannot be read.
        ValueError: what is wrong with it.
    """
    value = json_value(_text(path))
    _check_depth(value)
    return value


def read_yaml(path: Path, *, interpolate: bool) -> Any:
    """A YAML file.

    Args:
        path: the file.
        interpolate: put the value for `${section.key}`; else it stays as it is written.

    Raises:
        OSError: it cannot be read.
        ValueError: what is wrong with it.
    """
    try:
        text = _text(path)
        _check_events(text)
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        return plain(config) if interpolate else OmegaConf.to_container(config)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(str(error)) from None


def plain(config: Any) -> Any:
    """An OmegaConf container as plain data, its interpolations put in.

    Raises:
        ValueError: one of them asks a resolver.
        OmegaConfBaseException: one of them names nothing.
    """
    pending = [OmegaConf.to_container(config)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and "${" in value and _calls_resolver(parse(value)):
            raise ValueError(f"{value!r}: must be a value or ${{section.key}}, not a resolver")
    return OmegaConf.to_container(config, resolve=True)


def _calls_resolver(tree: Any) -> bool:
    """Whether a parsed string calls a resolver anywhere."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        return True
    return any(map(_calls_resolver, getattr(tree, "children", None) or ()))


def _text(path: Path) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe answers when it likes
        raise ValueError("is no regular file")
    if status.st_size > _BYTES:
        raise ValueError(f"has {status.st_size:,} bytes, must have at most {_BYTES:,}")
    return path.read_text(encoding="utf-8")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"nested deeper than {_DEPTH} levels")


def _check_events(text: str) -> None:
    """Count depth and nodes before anything is built: an alias stands for all that it repeats."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    nodes, sizes = 0, dict[str, int]()
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ValueError(f"*{event.anchor} holds itself")
            nodes += sizes.get(typing.cast(str, event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
        if len(opened) > _DEPTH:
            raise ValueError(f"nested deeper than {_DEPTH} levels")
        if nodes > _NODES:
            raise ValueError(f"holds more than {_NODES:,} values")
