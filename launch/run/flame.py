"""A flame picture of a profile: regions as wide as they took long, those inside below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaptive.observe.regions import OTHER, Costs, row_of

Tree = dict[str, "tuple[float, Tree]"]

# Of the picture's width, at the size of its text.
_LETTER = 0.0056
_IN_KEY = 10


def draw_flame(costs: Costs, path: Path) -> None:
    """Write a picture of one step; a key names the colours of the dearest regions."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = {name: a.seconds + b.seconds for name, (a, b) in costs.by_name().items()}
    dearest = sorted(rows, key=lambda name: -rows[name])[:_IN_KEY]
    colours = {name: colormaps["tab20"](2 * n % 20 + n // 10) for n, name in enumerate(dearest)}
    tree = _tree(costs)
    total = 1e3 * sum(seconds for seconds, _ in tree.values())
    depth = _depth(tree)
    figure = Figure(figsize=(14, 1.6 + 0.38 * depth), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, total), ylim=(depth, 0), yticks=[], xlabel="ms of a step")
    axes.spines[["left", "right", "top"]].set_visible(False)
    _draw(axes, tree, colours, left=0.0, level=0)
    key = [
        Patch(color=colours[n], label=f"{n} {rows[n] / sum(rows.values()):.0%}") for n in dearest
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=_IN_KEY, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _tree(costs: Costs) -> Tree:
    """Seconds of a step with what is inside."""
    tree: Tree = {}
    for (names, _), cost in costs.paths.items():
        seconds, level = cost.seconds / costs.steps, tree
        for name in names or (OTHER,):
            before, inside = level.get(name, (0.0, {}))
            level[name] = (before + seconds, inside)
            level = inside
    return tree


def _depth(tree: Tree) -> int:
    return max((1 + _depth(inside) for _, inside in tree.values()), default=0)


def _draw(axes: Any, tree: Tree, colours: dict[str, Any], *, left: float, level: int) -> None:
    """Bars in milliseconds; a name where it fits."""
    for name, (seconds, inside) in tree.items():
        width = 1e3 * seconds
        colour = colours.get(row_of(name), "0.85")
        axes.barh(level, width, left=left, height=0.94, align="edge", color=colour, edgecolor="w")
        if len(name) * _LETTER < width / axes.get_xlim()[1]:
            axes.text(left + width / 2, level + 0.47, name, ha="center", va="center", size=8)
        _draw(axes, inside, colours, left=left, level=level + 1)
        left += width
