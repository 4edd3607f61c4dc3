"""Adapted models of transformers in training: by launch, the Trainer, accelerate, DDP, FSDP2."""

from __future__ import annotations

import os
import re
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adaptive import BatchScope, RoutingTape, recompute_contexts
from launch.run.config import from_mapping
from launch.run.ranks import join_ranks
from launch.run.trust import trust
from launch.tasks import Batch
from launch.tasks.hub_language_model import HubLanguageModelTask
from parallel.mesh import Mesh
from tests.distributed.runs import assert_same_norms, make_loop, tiny_config, train_few, write_text
from tests.ranks import run_ranks

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
ROWS, LENGTH = 4, 16
SETTINGS = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
ADAPT = {"mixture_of_depths": {"layers": [1], "capacity": 0.5}}


def hub_config(folder: Path, **sections: Any) -> dict[str, Any]:
    model = {"settings": SETTINGS, "adapt": ADAPT} | sections.pop("model", {})
    return {**tiny_config(folder, **sections), "task": "hub_lm", "model": model}


def some_rows() -> Tensor:
    return torch.randint(1, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


class GivenRows(HubLanguageModelTask):
    """The launcher's task on rows that others take too: their last token is no target's place."""

    taken: ClassVar[list[float]] = []

    def batch(self, rows: range) -> Batch:
        ids = some_rows()[rows.start : rows.stop]
        targets = F.pad(ids[:, 1:], (0, 1), value=-1)
        return {"input_ids": ids, "targets": targets}

    def targets(self, rows: range) -> int:
        return len(rows) * (LENGTH - 1)


def adapted(folder: Path) -> Any:
    """The model that the launcher begins with."""
    config = from_mapping(hub_config(folder))
    torch.manual_seed(config.train.seed)
    task = HubLanguageModelTask(config, mesh=Mesh.single(), device=torch.device("cpu"))
    return task.build_model()


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def rows_of_some() -> list[dict[str, Tensor]]:
    return [batch_of(ids) for ids in some_rows()]


def norm_of(model: nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return float(torch.stack([g.double().square().sum() for g in whole]).sum().sqrt())


def one_step(model: nn.Module, ids: Tensor, *, wrapped: nn.Module | None = None) -> list[float]:
    """Loss and gradient norm of a step on these rows, of all ranks' rows where it is wrapped."""
    world = dist.get_world_size() if wrapped is not None else 1
    wrapped = model if wrapped is None else wrapped
    scope = BatchScope(ids.numel() * world, replicas=world)
    with RoutingTape(model, scope=scope) as tape:
        loss = wrapped(**batch_of(ids)).loss
    loss = loss + tape.loss()
    loss.backward()
    if world > 1:
        dist.all_reduce(loss := loss.detach() / world)
    return [float(loss.detach()), norm_of(model)]


def blocks_of_the_page() -> dict[str, Any]:
    """What the code of docs/hub.md defines for the Trainer and accelerate."""
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if "\nclass RoutedTrainer" in block or "\ndef train(" in block:
            exec(block, found)
    return found


def by_trainer(folder: Path, page: dict[str, Any], accumulation: int) -> list[float]:
    from transformers import TrainingArguments

    world = dist.get_world_size()
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=ROWS // world // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": recompute_contexts},
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = page["RoutedTrainer"](adapted(folder), arguments, train_dataset=rows_of_some())
    trainer.train()
    said = trainer.state.log_history[0]
    return [said["loss"], said["grad_norm"]]


def by_accelerate(folder: Path, page: dict[str, Any], accumulation: int) -> list[float]:
    model = adapted(folder)
    losses: list[float] = []
    norms: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            norms.append(norm_of(model))
            return super().step(*args, **kwargs)

    class Watching(page["Accelerator"]):  # type: ignore[misc]
        def backward(self, loss: Tensor, **kwargs: Any) -> None:
            losses.append(float(loss.detach()))
            super().backward(loss, **kwargs)

    world = dist.get_world_size()
    loader = DataLoader(rows_of_some(), batch_size=ROWS // world // accumulation)  # type: ignore[arg-type]
    train = types.FunctionType(page["train"].__code__, page | {"Accelerator": Watching})
    train(model, Watched(model.parameters(), lr=0.1), loader, 1, accumulation)
    dist.all_reduce(mean := torch.tensor(losses).sum() / accumulation / world)
    (norm,) = norms
    return [float(mean), norm]


def by_launch(folder: Path, stage: int) -> list[float]:
    tree = hub_config(folder, train={"batch_size": ROWS, "micro_batch_size": 1})
    tree |= {"task": f"{__name__}:GivenRows", "deepspeed": {"zero_optimization": {"stage": stage}}}
    trust([tree["task"]])
    loop = make_loop(from_mapping(tree))
    report = loop.step()
    norm = loop.engine.gradient_norm
    loop.engine.close()
    return [report.loss, norm or 0.0]


def everywhere(folder: Path) -> dict[str, list[float]]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    join_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    # Of launchers: accelerate asks for these, though the ranks have met.
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    own = some_rows().chunk(world)[rank]
    found = {f"launch {stage}": by_launch(folder, stage) for stage in (0, 3)}
    model = adapted(folder)
    found["DDP"] = one_step(model, own, wrapped=DistributedDataParallel(model))
    model = adapted(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    found["FSDP2"] = one_step(model, own, wrapped=fully_shard(model))
    page = blocks_of_the_page()
    found["accelerate"] = by_accelerate(folder, page, accumulation=2)
    found["trainer"] = by_trainer(folder, page, accumulation=2)
    return found


def test_one_step_is_the_same_whoever_takes_it(tmp_path: Path) -> None:
    """2 ranks and, but for DDP and FSDP2, 2 micro-batches; the Trainer recomputes activations."""
    write_text(tmp_path)
    loss, norm = one_step(adapted(tmp_path), some_rows())
    with torch.no_grad():
        text = float(adapted(tmp_path).train()(**batch_of(some_rows())).loss)
    assert loss > text + 0.01
    found = run_ranks(everywhere, 2, tmp_path, timeout=240)
    for said in found:
        for name, pair in said.items():
            # The launcher tells the loss of the text without the method's.
            wanted = text if name.startswith("launch") else loss
            assert pair == pytest.approx([wanted, norm], rel=1e-6), name


OPTIONS: dict[str, Any] = {
    "old_rate": 0.25,
    "distill": {"weight": 0.5, "temperature": 2.0},
    "adapt": {"mixture_of_depths": {"layers": [1, 2], "capacity": 0.5}},
}


@pytest.mark.parametrize("documents", [False, True])
def test_ranks_zero_stages_and_micro_batches_change_nothing(
    documents: bool, tmp_path: Path
) -> None:
    write_text(tmp_path)
    data = {"packing": "documents"} if documents else {}
    if documents:
        lines = "".join(f'{{"text": "{"ab c" * (n % 7 + 1)}"}}\n' for n in range(300))
        (tmp_path / "rows.jsonl").write_text(lines)
        data |= {"path": str(tmp_path / "rows.jsonl")}
    stages = (0,) if documents else (0, 1, 2, 3)
    tree = hub_config(tmp_path, model=OPTIONS, data=data)
    reference = run_ranks(train_few, 1, tree, (0,), timeout=120)[0][0]
    tree["train"] |= {"micro_batch_size": 2}
    for outcomes in run_ranks(train_few, 2, tree, stages, timeout=240):
        for outcome in outcomes.values():
            assert outcome.losses == pytest.approx(reference.losses, rel=1e-5)
            assert_same_norms(outcome, reference)
            assert outcome.validation == pytest.approx(reference.validation, rel=1e-5)
            for name, weight in outcome.weights.items():
                torch.testing.assert_close(weight, reference.weights[name], atol=2e-5, rtol=1e-4)
