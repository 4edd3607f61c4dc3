"""A run's configuration: YAML and `section.key=value` overrides, checked before anything starts.

Sections `model` and `data` are the task's own dataclasses, so every option of the library is an
option of the command line without a second definition. Each dataclass documents its fields under
"Attributes:" in its docstring; `--help` prints those lines.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.run.errors import BadInput
from launch.run.growth_phases import growth_phases
from launch.run.older import refuse_older_keys, with_todays_keys
from launch.run.plain_data import plain, read_yaml
from launch.run.recipes import recipe_file
from launch.run.sections import (
    OF_SOME_TASKS,
    CheckpointConfig,
    MonitorConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)
from launch.run.trust import imported, trust
from launch.run.validation import suggestion, validated
from launch.run.writable import write_text_whole
from launch.tasks import Task
from launch.tasks.registry import task_class

SECTIONS: dict[str, Any] = {
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "monitor": MonitorConfig,
    "checkpoint": CheckpointConfig,
    "deepspeed": dict[str, Any],
    "phases": list[PhaseConfig],
}


def section_types(task: type[Task]) -> dict[str, Any]:
    """The dataclass of every section that runs of a task have."""
    return {"model": task.model_config, "data": task.data_config, **SECTIONS, **task.sections}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply overrides, check everything that can be checked without data.

    The code that a recipe names is imported. Of a run.yaml that a run left behind, only what the
    overrides name as well (`launch.run.trust`).

    Args:
        path: a YAML file, or the name of a recipe; None: the defaults.
        overrides: `section.key=value` or `phases[0].section.key=value`, values in YAML notation.

    Raises:
        BadInput: one line that names the value and the rule; also for an override that no phase
            leaves in force.
    """
    path = None if path is None else recipe_file(path)
    tree = {} if path is None else with_todays_keys(_read_yaml(path))
    if path is None or not _is_in_run_folder(path):
        trust(_named_code(tree))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise BadInput(f"{override!r}: must be section.key=value")
        tree = _override(tree, override)
        if key in _CODE:
            trust(_named_code({key: tree.get(key)}))
    refuse_older_keys(str(tree.get("task")), list(overrides))
    _check_in_force(tree, overrides)
    tree.setdefault("output", f"runs/{path.stem if path is not None else 'default'}")
    return from_mapping(tree)


def from_mapping(tree: dict[str, Any]) -> RunConfig:
    """Check plain data and make it a RunConfig. Code that it names must be trusted by now.

    Raises:
        BadInput: one line that names the value and the rule.
    """
    name = tree.get("task", "language_model")
    output = tree.get("output", "runs/default")
    for key, value in (("task", name), ("output", output)):
        if not isinstance(value, str):
            raise BadInput(f"{key}={value!r}: must be a string")
        if re.search(r"[\x00-\x1f\x7f]", value):
            raise BadInput(f"{key}={value!r}: must hold no control character, as a line's end")
    plugins = validated(list[str], tree.get("plugins") or [], "plugins")
    for plugin in plugins:
        imported("plugins", plugin)
    task = task_class(name)
    types_ = section_types(task)
    of_others = set(OF_SOME_TASKS) - task.sections.keys()
    known = [f.name for f in dataclasses.fields(RunConfig) if f.name not in of_others]
    for key in tree:
        if key not in known:
            raise BadInput(f"{key}: unknown key{suggestion(key, known)}")
    sections = {}
    for section, kind in types_.items():
        empty: Any = [] if section == "phases" else {}
        value = tree.get(section)
        sections[section] = validated(kind, empty if value is None else value, section)
    config = _with_growth(RunConfig(task=name, output=output, plugins=plugins, **sections))
    names = [phase.name for phase in config.phases]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"phases: two are called {name!r}, must have names of their own")
    config.phase_configs()
    return config


def _with_growth(config: RunConfig) -> RunConfig:
    """A run whose `train.growth` has become phases.

    Raises:
        BadInput: it has phases of its own, or what `growth_phases` refuses.
    """
    train = config.train
    if not train.growth:
        return config
    if config.phases:
        raise BadInput("train.growth and phases: give one of them")
    pattention = getattr(config.model, "pattention", None)
    try:
        phases = growth_phases(train.growth, steps=train.steps, pattention=pattention)
    except ValueError as error:
        raise BadInput(f"train.{error}") from None
    train = dataclasses.replace(train, growth=[])
    return dataclasses.replace(
        config, train=train, phases=[PhaseConfig(**phase) for phase in phases]
    )


def load_saved(path: Path) -> RunConfig:
    """The configuration that a checkpoint or run folder holds in run.yaml.

    Raises:
        UntrustedCode: it names a task or a plugin that the user does not.
        BadInput: it is of no version that this one reads.
    """
    return from_mapping(with_todays_keys(_read_yaml(path / "run.yaml", interpolate=False)))


def is_same(recorded: Any, config: RunConfig) -> bool:
    """Whether plain data that were written down, maybe by an older version, are this config."""
    try:
        return isinstance(recorded, dict) and from_mapping(with_todays_keys(recorded)) == config
    except BadInput:
        return False


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every key with its value."""
    write_text_whole(path, yaml.safe_dump(config.resolved(), sort_keys=False))


def _read_yaml(path: Path, *, interpolate: bool = True) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path}: no such configuration file")
    try:
        tree = read_yaml(path, interpolate=interpolate)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: must be a mapping of sections")
    return typing.cast(dict[str, Any], tree)


# Keys that name code.
_CODE = ("task", "plugins")


def _named_code(tree: dict[str, Any]) -> list[str]:
    task, plugins = (tree.get(key) for key in _CODE)
    named = [task, *(plugins if isinstance(plugins, list) else ())]
    return [name for name in named if isinstance(name, str)]


def _is_in_run_folder(path: Path) -> bool:
    """Whether a configuration lies in a checkpoint or in a run's folder."""
    beside = ("state.json", "origin.json", "manifest.json", "checkpoints", "model.safetensors")
    return any((path.parent / name).exists() for name in beside)


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, _, value = override.partition("=")
    try:
        merged = OmegaConf.create(tree)
        if re.search(r"\[|\.\d", key):
            # Merging knows no place in a list.
            _check_phase_index(tree, key)
            entry = OmegaConf.from_dotlist([f"value={value}"]).value
            OmegaConf.update(merged, key, entry, merge=True)
        else:
            merged.merge_with(OmegaConf.from_dotlist([override]))
        return typing.cast(dict[str, Any], plain(merged))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise BadInput(f"{override}: {error}") from None


def _check_phase_index(tree: dict[str, Any], key: str) -> None:
    found = re.match(r"phases(?:\[|\.)(\d+)", key)
    count = len(tree.get("phases") or [])
    if found is not None and int(found[1]) >= count:
        there = f"0 to {count - 1}" if count else "none"
        raise ValueError(f"phases of this run: {there}")


def _check_in_force(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Refuse an override that says something else than the phases, which win."""
    phases = tree.get("phases") or []
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        return  # said when it is validated
    for override in overrides:
        given = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        for path in _leaves(given):
            setting = [n for n, phase in enumerate(phases) if _at(phase, path) is not _ABSENT]
            # What the first phase sets carries over to the others.
            if not setting or setting[0] != 0 or _at(phases[0], path) == _at(tree, path):
                continue
            key = ".".join(path)
            values = ", ".join(
                f"{_at(phases[n], path)} in phases[{n}] {phases[n].get('name', '')}"
                for n in setting
            )
            raise BadInput(
                f"{key}={_at(tree, path)}: has no effect, phases set it themselves ({values}); "
                f"give phases[0].{key}=…"
            )


_ABSENT = object()


def _at(tree: Any, path: Sequence[str]) -> Any:
    """The value at a path, or what stands in its way; _ABSENT when there is none."""
    for part in path:
        if not isinstance(tree, dict):
            return tree
        if part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(tree, dict) or not tree:
        yield path
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))
