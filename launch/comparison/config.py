"""What a comparison of runs is, and its YAML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from launch.run.errors import BadInput
from launch.run.options import refuse_empty_values
from launch.run.plain_data import read_yaml
from launch.run.validation import validated
from launch.run.writable import check_folder


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        title: of the table and the plot.
        recipe: the YAML that every run starts from, relative to the comparison's own file.
        operations: executed floating-point operations of every run, forward and backward.
        arms: name -> overrides of the recipe.
        seeds: of the runs of each arm.
        common: overrides of every run.
        points: evaluations of each run, evenly spread.
        about: text below the title of the results.
        output: folder of the runs.
        results: where the table, the plot and the numbers go, without an ending.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    title: str
    recipe: str
    operations: float
    arms: dict[str, list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    common: list[str] = field(default_factory=list)
    points: int = 8
    about: str = ""
    output: str = "runs/comparison"
    results: str = "runs/comparison/results"

    def __post_init__(self) -> None:
        if not 0 < self.operations < math.inf:
            raise ValueError(f"operations={self.operations}: must be a number above 0")
        if self.points < 1:
            raise ValueError(f"points={self.points}: must be at least 1")
        if not self.arms:
            raise ValueError("arms={}: must name at least one arm")
        if not self.seeds:
            raise ValueError("seeds=[]: must hold at least one seed")
        # Runs have a folder by arm and seed: two of one name would write into each other's.
        for seed in self.seeds:
            if self.seeds.count(seed) > 1:
                raise ValueError(f"seeds={self.seeds}: must hold {seed} once")
        folders = [folder_name(arm) for arm in self.arms]
        for arm, name in zip(self.arms, folders, strict=True):
            if folders.count(name) > 1:
                raise ValueError(f"arms: {arm!r}: {name} must be the folder of one arm only")


def load_comparison(path: Path, overrides: list[str]) -> Comparison:
    """Read a comparison.

    Raises:
        BadInput: one line that names the value and the rule.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        tree = read_yaml(path, interpolate=False)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from None
    if not tree or not isinstance(tree, dict):
        raise BadInput(f"{path}: must be a mapping of keys")
    refuse_empty_values(overrides)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise BadInput(f"{override!r}: must be key=value")
        try:
            tree[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"{override}: not valid YAML: {error}") from None
    comparison: Comparison = validated(Comparison, tree, path.stem)
    check_folder("results", Path(comparison.results).parent)
    return comparison


def folder_name(arm: str) -> str:
    return arm.replace(" ", "_")
