"""Recipes by their names: those of a checkout, and those that an installed package brings."""

from __future__ import annotations

from pathlib import Path

from launch.run.errors import BadInput

_LAUNCH = Path(__file__).parents[1]
# Installed they lie inside this package; in a checkout beside it.
_INSTALLED = _LAUNCH / "recipes"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _LAUNCH.parent / "recipes"


def recipe_file(given: str | Path) -> Path:
    """The YAML file that a path or a recipe's name means; a file of that path wins.

    Raises:
        BadInput: a name that is neither; lists the recipes.
    """
    return _named(Path(given), RECIPES, "*.yaml", "recipe")


def deepspeed_file(given: str | Path) -> Path:
    """The same for DeepSpeed's JSON files, of recipes/deepspeed.

    Raises:
        BadInput: a name that is neither; lists the files.
    """
    return _named(Path(given), RECIPES / "deepspeed", "*.json", "DeepSpeed configuration")


def _named(given: Path, folder: Path, pattern: str, kind: str) -> Path:
    if given.is_file() or given.suffix or len(given.parts) != 1:
        return given
    files = {path.stem: path for path in sorted(folder.glob(pattern))}
    if given.name not in files:
        raise BadInput(f"{given}: no such file, and no {kind}; there are {', '.join(files)}")
    return files[given.name]
