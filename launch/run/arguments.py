"""The command line that `launch.start` and `launch.train` share, and its --help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run.config import load_config, section_types
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import refuse_empty_values
from launch.run.plain_data import read_json
from launch.run.recipes import deepspeed_file, recipe_file
from launch.run.sections import RunConfig
from launch.run.trust import add_trust_option
from launch.run.validation import dataclass_in
from launch.tasks.registry import task_class


@dataclass(frozen=True)
class Parsed:
    """A checked configuration, the launcher's options, and the words that make it again."""

    config: RunConfig
    options: argparse.Namespace
    words: list[str]


def parse(
    arguments: list[str] | None, *, program: str, launcher: argparse.ArgumentParser | None = None
) -> Parsed:
    """Read the command line; prints the help and ends where asked to.

    Args:
        arguments: words after the program's name; None: those of this process.
        program: its name, for the help.
        launcher: a parser (without help) of further options.

    Raises:
        BadInput: one line that names the value and the rule.
    """
    parents = [] if launcher is None else [launcher]
    parser = OneLineParser(prog=program, parents=parents, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument(
        "--config", metavar="YAML", help="what to train: a file, or the name of a recipe"
    )
    parser.add_argument(
        "--deepspeed-config",
        metavar="JSON",
        help="laid over section deepspeed: a file, or a name of recipes/deepspeed",
    )
    add_trust_option(parser)
    # What launchers add to every rank's command line.
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="[recipe] section.key=value",
        help="--config, if not given; keys of the configuration to set",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.config is None and options.overrides and "=" not in options.overrides[0]:
        options.config = options.overrides.pop(0)
    if options.help:
        print(parser.format_help() + "\n" + describe(options.config, options.overrides))
        raise SystemExit(0)
    refuse_empty_values(options.overrides)
    # Ranks are told files: a name may mean another one where they stand.
    words = [] if options.config is None else ["--config", str(recipe_file(options.config))]
    words += options.overrides
    words += ["--trust-code"] if options.trust_code else []
    config = load_config(options.config, options.overrides)
    if options.deepspeed_config is not None:
        file = deepspeed_file(options.deepspeed_config)
        config = dataclasses.replace(config, deepspeed=_merged(config.deepspeed, _read_json(file)))
        words += ["--deepspeed-config", str(file)]
    return Parsed(config, options, words)


def describe(path: str | None, overrides: list[str]) -> str:
    """Every key of a configuration, with its value here and what it means."""
    with exit_on_bad_input():
        config = load_config(path, overrides)
    task = task_class(config.task)
    source = "the defaults" if path is None else path
    names = [f"phases[{n}] {phase.name}" for n, phase in enumerate(config.phases)] or [""]
    # What holds: a phase may set a key otherwise than the run's own section.
    configs = config.phase_configs()
    lines = [
        f"Keys, with their values in {source} (task: {config.task}).",
        "Set any of them as section.key=value, e.g. train.steps=50 model.num_layers=4.",
        "",
        *_top_level(config),
    ]
    for section, kind in section_types(task).items():
        if section == "deepspeed":
            value = json.dumps(config.deepspeed)
            lines += ["", f"deepspeed.* = {value}", "    DeepSpeed's own configuration, untouched."]
        elif section != "phases":
            values = [getattr(phase, section) for phase in configs]
            lines += ["", *_keys(kind, dict(zip(names, values, strict=True)), section)]
    return "\n".join(lines)


def _top_level(config: RunConfig) -> list[str]:
    docs = documentation(RunConfig)
    return [
        line
        for key in ("task", "output", "plugins", "phases")
        for line in (f"{key} = {_shown(getattr(config, key))}", f"    {docs[key]}")
    ]


def _keys(kind: Any, values: dict[str, Any], path: str) -> list[str]:
    """The lines of a section that has these values in the phases of these names."""
    docs = documentation(kind)
    lines = []
    for field in dataclasses.fields(kind):
        inner = {name: getattr(value, field.name, None) for name, value in values.items()}
        section = dataclass_in(typing.get_type_hints(kind)[field.name])
        key = f"{path}.{field.name}"
        there = next((value for value in inner.values() if value is not None), None)
        shown = _shown_in_phases(inner)
        if section is not None:
            shown = "…" if there is not None else f"null, or keys of {section.__name__}"
        lines += [f"{key} = {shown}", f"    {docs.get(field.name, '')}"]
        if section is not None and there is not None:
            lines += _keys(type(there), inner, key)
    return lines


def _shown_in_phases(values: dict[str, Any]) -> str:
    first = next(iter(values.values()))
    if all(value == first for value in values.values()):
        return _shown(first)
    return ", ".join(f"{_shown(value)} in {name}" for name, value in values.items())


def documentation(kind: type) -> dict[str, str]:
    """field -> its line under "Attributes:" of a dataclass's docstring.

    A line for several fields serves each, or is cut at its semicolons into a part for each.
    """
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        docs.update(_documented(inspect.cleandoc(owner.__doc__ or "")))
    return docs


def _documented(text: str) -> dict[str, str]:
    _, _, block = text.partition("Attributes:\n")
    entries: list[tuple[list[str], str]] = []
    for line in block.splitlines():
        if line and not line.startswith("    "):
            break
        start = re.match(r"    (\w+(?:,\s+\w+)*)(,|: .*)$", line)
        if entries and entries[-1][1] == ",":
            # The names went on to this line.
            more, _, said = line.strip().partition(": ")
            entries[-1] = (entries[-1][0] + more.rstrip(",").split(", "), said or ",")
        elif start is not None:
            said = "," if start[2] == "," else start[2][2:]
            entries.append((start[1].split(", "), said))
        elif line.strip() and entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
    docs: dict[str, str] = {}
    for names, said in entries:
        parts = said.split("; ")
        if len(parts) != len(names) or any(part.startswith("None:") for part in parts):
            parts = [said] * len(names)
        docs.update(zip(names, parts, strict=True))
    return docs


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value, default=dataclasses.asdict)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise BadInput(f"--deepspeed-config={path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"--deepspeed-config={path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"--deepspeed-config={path}: must be a JSON object")
    return found


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for key, value in new.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if nested else value
    return out
