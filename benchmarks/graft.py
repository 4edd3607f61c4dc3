"""Does a learned choice earn its operations where skipping has something to lose?

A dense byte decoder (width 128, 6 layers) is trained; then its layers are routed, and every arm is
trained on with the same executed operations: learned, random and fixed choices of a quarter of the
tokens in layers 1 to 4, by what is routed and what chosen tokens attend to, and dense models of as
many operations a token, made of some of its layers (the best of all that keep the first and the
last). Three seeds: of the routers, the order of the text and the draws.

    python benchmarks/graft.py [--folder runs/graft] [--operations 1e12] [--jobs N] [--search]

`--search` trains many settings of a learned choice with one seed instead: is one of them better
than dense models of as many operations a token? Finished runs are kept and not repeated. Writes
docs/results/graft.{md,png,json}, or graft_search.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.compare import main as compare
from launch.convert import main as convert
from launch.start import main as start

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "mod_lm.yaml"
SMALL = ["model.dim=128", "model.num_heads=4"]
KEY = "model.mixture_of_depths."
ROUTED = [f"{KEY}weight=tanh_norm", f"{KEY}capacity=0.25", f"{KEY}schedule=[1,2,3,4]"]
REACHES = {
    "feed-forward": [f"{KEY}granularity=ffn"],
    "block, keys of all": [f"{KEY}keys=all"],
    "block, keys of chosen": [],
}
CHOICES = {
    "learned": [],
    "random": [f"{KEY}choice=random", f"{KEY}predictor=none"],
    "fixed": [f"{KEY}choice=fixed", f"{KEY}predictor=none"],
}
DENSE = "model.mixture_of_depths=null"


def settings() -> dict[str, list[str]]:
    """What the search tries: reach, share of tokens, layers, form of the weight, learning rate."""
    tried = {
        f"{reach}, {capacity:.3g} in {layers}": [
            f"{KEY}weight=tanh_norm",
            f"{KEY}capacity={capacity}",
            f"{KEY}schedule=[{layers}]",
            *REACHES[reach],
        ]
        for reach, capacities in (
            ("feed-forward", (0.125, 0.25, 0.5, 0.75)),
            ("block, keys of all", (0.25, 0.5, 0.75)),
            ("block, keys of chosen", (0.5, 0.75)),
        )
        for capacity in capacities
        for layers in (("1,2,3,4", "1,3") if capacity < 0.75 else ("1,2,3,4",))
    }
    for reach in ("feed-forward", "block, keys of all"):
        half = f"{reach}, 0.5 in 1,2,3,4"
        for weight in ("raw", "sigmoid"):
            tried[f"{half}, {weight}"] = [*tried[half], f"{KEY}weight={weight}"]
        for rate in (5e-4, 2e-3):
            tried[f"{half}, rate {rate:g}"] = [*tried[half], f"train.learning_rate={rate}"]
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/graft"))
    parser.add_argument("--operations", type=float, default=1e12)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="many settings, one seed")
    options = parser.parse_args()
    folder: Path = options.folder
    dense = folder / "dense"
    if not (dense / "checkpoints").is_dir():
        words = [*SMALL, DENSE, "train.steps=900", "checkpoint.keep=1", f"output={dense}"]
        start(["--config", str(RECIPE), "--ranks", "1", *words])

    def arms(given: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Each begins with weights made of the dense run's."""
        for name, words in given.items():
            if not weights(name).is_dir():
                of_model = [word for word in words if not word.startswith("train.")]
                convert(["adapt", str(dense), str(weights(name)), *of_model])
        return {
            name: [f"checkpoint.weights={weights(name)}", *trained_with(words)]
            for name, words in given.items()
        }

    def weights(name: str) -> Path:
        return folder / "weights" / name.replace(" ", "_")

    def run(name: str, results: Path, given: Mapping[str, list[str]], **keys: Any) -> Any:
        comparison = {
            "recipe": str(RECIPE),
            "operations": options.operations,
            "common": [
                *SMALL,
                "train.batch_size=8",
                "train.warmup_steps=10",
                "train.learning_rate=1.0e-3",
                "train.calibrate_rows=0",
                "monitor.tensorboard=false",
                "monitor.every=20",
                "checkpoint.every=0",
                "checkpoint.keep=1",
                "deepspeed.zero_optimization.stage=0",
            ],
            "arms": arms(given),
            "points": 4,
            "output": str(folder / "runs"),
            "results": str(results),
            **keys,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(comparison, sort_keys=False), encoding="utf-8")
        compare([str(path), "--jobs", str(options.jobs)])
        return json.loads(results.with_suffix(".json").read_text(encoding="utf-8"))["runs"]

    best = {}
    for size in (3, 4, 5):
        found = run(
            f"layers{size}",
            folder / f"layers{size}",
            {
                f"layers 0,{','.join(map(str, inner))},5": [
                    "--layers",
                    f"0,{','.join(map(str, inner))},5",
                ]
                for inner in itertools.combinations(range(1, 5), size - 2)
            },
            title=f"Dense models of {size} of the layers",
            seeds=[0],
        )
        best[size] = min(found, key=lambda outcome: outcome["validation_loss"])["arm"]
    smaller = {best[size]: ["--layers", best[size].removeprefix("layers ")] for size in best}
    if options.search:
        run(
            "search",
            ROOT / "docs" / "results" / "graft_search",
            settings() | smaller | {"layers 0,1,2,3,4,5": ["--layers", "0,1,2,3,4,5"]},
            title="Settings of a learned choice in a trained decoder, at equal executed FLOPs",
            seeds=[0],
            about=(
                "The same decoder and budget as [graft](graft.md), one seed: what is routed, the "
                "share of tokens, in which layers, the form of the weight (tanh_norm where none is "
                "named), the learning rate (1e-3). `python benchmarks/graft.py --search` repeats."
            ),
        )
        return
    run(
        "graft",
        ROOT / "docs" / "results" / "graft",
        {
            f"{choice}, {reach}": [*ROUTED, *what, *how]
            for reach, what in REACHES.items()
            for choice, how in CHOICES.items()
        }
        | smaller,
        title="Routed layers in a trained decoder, at equal executed FLOPs",
        seeds=[0, 1, 2],
        about=(
            "A dense byte decoder (width 128, 6 layers), trained for 900 steps, goes on with a "
            "quarter of the tokens in layers 1 to 4: of their feed-forwards, of whole layers whose "
            "chosen tokens attend to all, or of whole layers among the chosen. Dense models are "
            "some of its layers, the first and the last among them: the best of 3, 4 and 5 by "
            "seed 0. Routed feed-forwards execute 0.75 of the dense decoder's operations a token, "
            "whole layers 0.58 and 0.49; 3, 4 and 5 layers about 0.50, 0.67 and 0.83. "
            "`python benchmarks/graft.py` repeats it."
        ),
    )


def trained_with(words: list[str]) -> list[str]:
    """The overrides of the run that begins with what `launch.convert adapt` made of these."""
    if words[0] != "--layers":
        return words
    return [DENSE, f"model.num_layers={len(words[1].split(','))}"]


if __name__ == "__main__":
    main()
