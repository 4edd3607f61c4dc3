"""What a run of recipe adapt_lm came to, beside the pretrained model and the untrained adapted one.

Of the run's held-out rows: the loss of the dense model as it came, of the adapted one before
training (its predictors calibrated as the run's are), and at each evaluation of the run; the share
of tokens computed in routed layers; what both write; tokens a second of CPU of sampling, one row
with a cache, in turn, by transformers and (--ours) by our decoder with the same weights. Writes
docs/results/adapt_lm.json and .png; a dense control (model.adapt empty) is a run like another.

    python benchmarks/adapt_lm.py runs/adapt_lm/adapted [--name adapt_lm] [--tokens 32] [--rounds 3]
        [--ours DENSE ADAPTED]  (runs of launch.convert transformers)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine
from torch import nn

from adaptive import RoutingTape
from adaptive.blocks.calibration import calibrate
from adaptive.flops import Work, executed_flops, nominal_flops, planned_flops
from adaptive.hub.flops import count_rules
from adaptive.models.decoder.generate import Sampling, generate
from launch.checkpoint.files import find_checkpoint, load_model
from launch.data.tokenizer import Tokenizer
from launch.generation.hub import continued
from launch.run.sizes import without_memory
from launch.tasks.hub_language_model import HubLanguageModelTask
from launch.tasks.registry import make_task

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PROMPTS = ("The capital of France is", "def read_lines(path):\n    ", '"""Return the')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--name", default="adapt_lm", help="of the files in docs/results")
    parser.add_argument("--tokens", type=int, default=32, help="sampled behind each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=Path, nargs=2, help="dense and adapted, as our decoder")
    options = parser.parse_args()

    trained, config = load_model(find_checkpoint(options.run, checksums=False))
    task = make_task(config)
    assert isinstance(task, HubLanguageModelTask)
    model, train = config.model, config.train
    dense = model.teacher(train.seed)
    weights = task.first_weights()
    assert weights is not None
    with without_memory():
        shapes = task.build_model()
    untrained = model.adapted(model.dense())
    untrained.load_state_dict(weights, strict=False)
    rows = range(min(train.calibrate_rows, task.validation_rows))
    calibrating = [task.validation_batch(range(n, n + 1)) for n in rows]
    if model.adapt:
        calibrate(untrained, calibrating, forward=lambda b: task.validation_sums(untrained, b))

    batch_work = Work.dense(train.batch_size, config.data.seq_len)
    planned = planned_flops(shapes, batch_work, backward=True)
    logged = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    stages = [line for line in logged if "validation/loss" in line]
    tokenizer = Tokenizer(config.data.tokenizer, config.data.end_of_text)
    found: dict[str, Any] = {
        **machine(),
        "model": model.pretrained and Path(model.pretrained).name,
        "adapt": model.adapt,
        "distill": model.distill and vars(model.distill),
        "old_rate": model.old_rate,
        "learning_rate": train.learning_rate,
        "tokens_per_step": train.batch_size * config.data.seq_len,
        "held_out_tokens": task.validation_rows * config.data.seq_len,
        "operations_per_step": planned,
        "operations_per_step_of_dense": nominal_flops(shapes, batch_work, backward=True),
        "dense": measured(dense, task),
        "untrained": measured(untrained, task),
        "trained": measured(trained, task),
        "stages": [
            {
                "step": line["step"],
                "loss": line["validation/loss"],
                "operations": line["progress/executed_flops"],
            }
            for line in stages
        ],
        "training": [
            [line["step"], line["loss/train/text"], line["loss/train/distillation"]]
            for line in logged
            if "loss/train/distillation" in line
        ],
    }

    def sampled(of: nn.Module, prompt: str) -> str:
        ids = tokenizer.encode_prompt(prompt.encode())
        made = continued(
            of,
            ids,
            Sampling(temperature=0),
            None,
            vocab_size=tokenizer.vocab_size,
            count=options.tokens,
        )
        return tokenizer.decode(list(made))

    models = {"dense": dense, "untrained": untrained, "trained": trained}
    found["texts"] = {
        prompt: {name: sampled(of, prompt) for name, of in models.items()} for prompt in PROMPTS
    }
    cases: dict[str, Callable[[], Any]] = {
        name: lambda of=models[name]: sampled(of, PROMPTS[0]) for name in ("dense", "trained")
    }
    ids = tokenizer.encode_prompt(PROMPTS[0].encode())
    for name, folder in zip(("dense", "trained"), options.ours or (), strict=False):
        ours, _ = load_model(find_checkpoint(folder, checksums=False))
        cases[f"{name}, our decoder"] = lambda of=ours: list(
            generate(of, [ids], max_new_tokens=options.tokens, sampling=Sampling(temperature=0))
        )
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(options.rounds + 1):
        for name, run in cases.items():
            begun = time.process_time()
            run()
            seconds[name] += [time.process_time() - begun] if turn else []
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    found["tokens_per_second_of_cpu"] = {n: options.tokens / s for n, s in middle.items()}
    found["speed_over_dense"] = {n: middle["dense"] / s for n, s in middle.items()}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "training"}, indent=1))
    plot(found, RESULTS / f"{options.name}.png")


@torch.no_grad()
def measured(model: nn.Module, task: HubLanguageModelTask) -> dict[str, float]:
    """Loss on the held-out rows, one at a time, and the executed share of a dense model."""
    model.eval()
    count_rules(model)  # type: ignore[arg-type]
    loss = count = executed = nominal = 0.0
    tokens = computed = 0
    for row in range(task.validation_rows):
        batch = task.validation_batch(range(row, row + 1))
        with RoutingTape(model) as tape:
            value, targets = task.validation_sums(model, batch)["loss"]
        loss, count = loss + float(value), count + targets
        work = Work.dense(1, batch["input_ids"].shape[1])
        executed += float(executed_flops(model, tape.records, work))
        nominal += nominal_flops(model, work)
        tokens += sum(int(record.tokens) for record in tape.records)
        computed += sum(int(record.executed) for record in tape.records)
    return {
        "loss": loss / count,
        "share_of_operations": executed / nominal,
        "tokens_in_routed_layers": computed / tokens if tokens else 1.0,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Losses against steps and the operations that they took."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    stages = [(0, found["untrained"]["loss"])]
    stages += [(stage["step"], stage["loss"]) for stage in found["stages"]]
    steps, losses = zip(*stages, strict=True)
    left.plot(steps, losses, marker="o", label="adapted")
    left.axhline(found["dense"]["loss"], color="black", ls="--", label="dense, as it came")
    per_step = found["stages"][-1]["operations"] / steps[-1] / 1e12
    above = left.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda f: f / per_step))
    above.set_xlabel("executed TFLOP of training")
    left.set(xlabel="steps", ylabel="held-out loss, nats a token")
    left.legend()
    if found["training"]:
        steps, text, apart = zip(*found["training"], strict=True)
        right.plot(steps, text, label="of the text", alpha=0.8)
        right.plot(steps, apart, label="distance to the dense model", alpha=0.8)
        right.set(xlabel="steps", ylabel="loss of training rows", yscale="log")
        right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
