"""What a causal model of transformers loses without each of its layers, one at a time.

A hint at which layers to adapt: tokens that skip a layer lose at most about that. Rows are those of
recipe adapt_lm's held-out text.

    python benchmarks/layers_left_out.py FOLDER [--rows 0,5] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from measure import machine
from torch import Tensor

from adaptive.hub.placing import layer_stack
from launch.run.config import load_config
from launch.tasks.hub_language_model import HubLanguageModelTask
from launch.tasks.registry import make_task

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "adapt_lm.yaml"


def passed_by(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="as save_pretrained leaves it")
    parser.add_argument("--rows", default="0,5", help="held-out rows of 256 tokens")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    words = [f"model.pretrained={options.folder}", f"data.tokenizer={options.folder}"]
    task = make_task(load_config(RECIPE, words))
    assert isinstance(task, HubLanguageModelTask)
    model = task.config.model.teacher(0)
    batches = [task.validation_batch(range(n, n + 1)) for n in map(int, options.rows.split(","))]

    def loss() -> float:
        sums = [task.validation_sums(model, batch)["loss"] for batch in batches]
        return sum(float(value) for value, _ in sums) / sum(count for _, count in sums)

    found: dict[str, Any] = {**machine(), "rows": options.rows, "dense": loss(), "without": []}
    for index, layer in enumerate(layer_stack(model)):
        layer.forward = passed_by
        found["without"].append(loss())
        del layer.forward
        print(f"layer {index:2d}  {found['without'][-1]:.3f}  dense {found['dense']:.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
