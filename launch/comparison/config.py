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
        operations: executed floating-point operations of every run, forward and backward; a list
            gives every arm and size a run at each.
        arms: name -> overrides of the recipe.
        sizes: name -> overrides of the recipe, smallest first; every arm is trained at each.
        seeds: of the runs of each arm.
        optimum_seeds: further seeds of an arm's best size and of the sizes beside it.
        common: overrides of every run.
        points: evaluations of each run, evenly spread.
        about: text below the title of the results.
        output: folder of the runs.
        results: where the table, the plot and the numbers go, without an ending.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    title: str
    recipe: str
    operations: float | list[float]
    arms: dict[str, list[str]]
    sizes: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    optimum_seeds: list[int] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    points: int = 8
    about: str = ""
    output: str = "runs/comparison"
    results: str = "runs/comparison/results"

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < budget < math.inf for budget in self.budgets):
            raise ValueError(f"operations={self.operations}: must be a number above 0")
        if self.optimum_seeds and not self.sizes:
            raise ValueError(f"optimum_seeds={self.optimum_seeds}: needs sizes")
        if self.points < 1:
            raise ValueError(f"points={self.points}: must be at least 1")
        if not self.arms:
            raise ValueError("arms={}: must name at least one arm")
        if not self.seeds:
            raise ValueError("seeds=[]: must hold at least one seed")
        # Runs have a folder by arm and seed: two of one name would write into each other's.
        seeds = [*self.seeds, *self.optimum_seeds]
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise ValueError(f"seeds={seeds}: must hold {seed} once")
        for key in ("arms", "sizes"):
            names = [folder_name(name) for name in getattr(self, key)]
            for name, folder in zip(getattr(self, key), names, strict=True):
                if Path(folder).name != folder:
                    raise ValueError(f"{key}: {name!r}: must name a folder: no / in it")
                if names.count(folder) > 1:
                    raise ValueError(
                        f"{key}: {name!r}: {folder} must be the folder of one {key[:-1]} only"
                    )

    @property
    def budgets(self) -> list[float]:
        return self.operations if isinstance(self.operations, list) else [self.operations]


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
