"""Conversations in packed documents: one curve, whatever splits them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import load_model
from launch.run.config import from_mapping
from launch.run.ranks import is_first
from launch.run.training import run
from launch.tasks.registry import task_class
from parallel.mesh import Mesh
from tests.distributed.runs import (
    Outcome,
    assert_same_norms,
    tiny_config,
    train_few,
    write_text,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of very different lengths: a mean of each rank's or micro-batch's mean is another."""
    folder = tmp_path_factory.mktemp("documents")
    rows = [
        {"prompt": f"{n} plus {n % 7}?", "response": str(n + n % 7) * (1 + n * n % 5)}
        for n in range(200)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "chat.jsonl"), "packing": "documents", "conversations": True}
    tree = tiny_config(folder, data={**data, "seq_len": 64, "validation_fraction": 0.2})
    tree["model"] |= {"max_seq_len": 64}
    return tree


@pytest.fixture(scope="module")
def reference(tree: dict[str, Any]) -> Outcome:
    return run_ranks(train_few, 1, tree, (0,), timeout=120)[0][0]


@pytest.mark.parametrize(
    ("ranks", "stages", "sections"),
    [
        (1, (0,), {"train": {"micro_batch_size": 2}}),
        (2, (1, 2, 3), {"train": {"micro_batch_size": 2}}),
        (2, (0,), {"parallel": {"tensor": 2, "sequence_parallel": True}}),
        (2, (0,), {"parallel": {"context": 2}}),
        (2, (0,), {"parallel": {"context": 2, "context_attention": "ring"}}),
    ],
    ids=["accumulated", "data and ZeRO", "tensor and sequence", "context", "ring"],
)
def test_ranks_and_accumulation_give_one_curve(
    ranks: int,
    stages: tuple[int, ...],
    sections: dict[str, Any],
    tree: dict[str, Any],
    reference: Outcome,
) -> None:
    split = {k: {**tree.get(k, {}), **v} for k, v in sections.items()}
    outcomes = run_ranks(train_few, ranks, {**tree, **split}, stages, timeout=150)[0]
    assert tuple(outcomes) == stages
    for outcome in outcomes.values():
        assert outcome.losses == pytest.approx(reference.losses, abs=1e-5)
        assert outcome.validation == pytest.approx(reference.validation, abs=1e-5)
        assert_same_norms(outcome, reference)
        assert outcome.state.tokens == reference.state.tokens < 3 * 8 * 64
    assert reference.losses[-1] < reference.losses[0]
    # Of 256 equally likely: the mean is over what is learnt, a third of the tokens.
    assert reference.losses[0] == pytest.approx(5.55, abs=0.2)


def fine_tune(pretraining: dict[str, Any], tuning: dict[str, Any]) -> None:
    """Learn text, then conversations; then again from the middle of these."""
    run(from_mapping(pretraining))
    run(from_mapping(tuning))
    if is_first():
        output = Path(tuning["output"])
        shutil.copy(output / "metrics.jsonl", output.with_suffix(".whole"))
        shutil.rmtree(output / "checkpoints" / "step-00000004")
    dist.barrier()
    run(from_mapping(tuning))


def test_fine_tuning_begins_with_pretrained_weights_learns_answers_and_resumes(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    write_text(tmp_path)
    model = {"mixture_of_depths": None, "max_seq_len": 64}
    steps = {"steps": 4, "log_every": 1}
    pretraining = tiny_config(tmp_path, model=model, train={**steps, "learning_rate": 1e-2})
    tuning = {**tree, "output": str(tmp_path / "tuned")}
    tuning["model"] = pretraining["model"]
    tuning["train"] = {**tree["train"], **steps}
    tuning["monitor"] = {"every": 1, "tensorboard": False}
    tuning["checkpoint"] = {"every": 2, "weights": pretraining["output"]}
    run_ranks(fine_tune, 2, pretraining, tuning, timeout=150)

    begun, resumed = (
        {line["step"]: line["loss/train"] for line in read_metrics(file) if "loss/train" in line}
        for file in (tmp_path / "tuned.whole", tmp_path / "tuned" / "metrics.jsonl")
    )
    assert list(begun) == [1, 2, 3, 4]
    assert resumed == begun  # to the last digit
    # The first loss is that of the pretrained weights, of each document by itself, over answers.
    pretrained, _ = load_model(pretraining["output"])
    config = from_mapping(tuning)
    task = task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))
    losses = []
    answers = bytearray()
    for row in range(config.train.batch_size):
        batch = task.batch(range(row, row + 1))
        ids, targets, of = (batch[name][0] for name in ("input_ids", "targets", "documents"))
        for number in range(int(of.max()) + 1):
            own = of == number
            with torch.no_grad():
                logits = pretrained(ids[own][None])[0]
            learnt = targets[own] >= 0
            losses.append(F.cross_entropy(logits[learnt], targets[own][learnt], reduction="none"))
            answers += bytes(targets[own][learnt].tolist())
    assert begun[1] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert begun[1] < 5.4, "as an untrained model"
    assert set(answers) <= set(b"0123456789\0"), "of what the user says too"
