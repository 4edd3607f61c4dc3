"""The loop: phases, accumulation, and parameters that nothing moves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive.flops import Work
from launch.checkpoint.files import WEIGHTS, find_checkpoint, read_state
from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from launch.run.errors import Failed
from launch.run.preflight import check_run
from launch.run.training import run
from launch.run.trust import trust
from launch.tasks import Batch, row_generator
from launch.tasks.language_model import LanguageModelTask
from tests.distributed.runs import make_loop, tiny_config, train_few, write_text
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    write_text(folder)
    return folder


class UnusedModel(nn.Module):
    """A decoder beside a parameter that takes part in every forward, multiplied by zero."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.forgotten = nn.Parameter(torch.ones(3, 3))


class UnusedTask(LanguageModelTask):
    """What a user's own task looks like: named by `task: module:Class`."""

    def build_model(self) -> nn.Module:
        return UnusedModel(super().build_model())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, UnusedModel)
        return super().loss_sum(model.decoder, batch) + 0 * model.forgotten.sum()

    def work(self, batch: Batch) -> None:
        return None


class IdleTask(UnusedTask):
    """The parameter is in no forward at all, which only ZeRO 0 accepts."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, UnusedModel)
        return LanguageModelTask.loss_sum(self, model.decoder, batch)


def fail(tree: dict[str, Any], rate: float | None = None) -> str:
    """Why a run fails; at a learning rate that no configuration allows, where one is given."""
    trust([tree.get("task", "language_model")])
    config = from_mapping(tree)
    if rate is not None:
        object.__setattr__(config.train, "learning_rate", rate)
    with pytest.raises(Failed) as failure:
        run(config)
    return str(failure.value)


@pytest.mark.parametrize(
    ("task", "stage"), [("UnusedTask", 0), ("UnusedTask", 1), ("UnusedTask", 3), ("IdleTask", 0)]
)
def test_a_parameter_that_nothing_moves_ends_the_run_by_name(
    task: str, stage: int, folder: Path
) -> None:
    tree = tiny_config(
        folder,
        task=f"tests.launch.test_loop:{task}",
        output=str(folder / f"{task}-{stage}"),
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    # Weight decay alone does not count as moving.
    message = run_ranks(fail, 2, tree, timeout=60)[0]
    assert message == "forgotten: had no gradient within train.move_within=1 steps"


class UncountedTask(UnusedTask):
    """Its model has a matrix that moves, and says nothing of its operations."""

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, UnusedModel)
        return LanguageModelTask.loss_sum(self, model.decoder, batch) + model.forgotten.sum()

    def work(self, batch: Batch) -> Work:
        return LanguageModelTask.work(self, batch)


def uncounted(tree: dict[str, Any]) -> tuple[float, str | None]:
    trust([tree["task"]])
    loop = make_loop(from_mapping(tree))
    return loop.step().executed_flops, loop.uncounted


def test_a_model_that_says_no_operations_trains_and_they_are_not_counted(folder: Path) -> None:
    tree = tiny_config(folder, task="tests.launch.test_loop:UncountedTask")
    executed, why = run_ranks(uncounted, 1, tree, timeout=60)[0]
    assert executed == 0
    assert why is not None
    assert why.startswith("UnusedModel: has a weight matrix and says no FLOPs")


def test_it_is_said_before_ranks_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, said in (("UncountedTask", True), (None, False)):
        tree = tiny_config(folder, output=str(folder / "unsaid"))
        if task is not None:
            tree["task"] = f"tests.launch.test_loop:{task}"
            trust([tree["task"]])
        check_run(from_mapping(tree), ranks=1, speak=True)
        lines = [x for x in capsys.readouterr().out.splitlines() if not x.endswith(" …")]
        why = "operations will not be counted: UnusedModel: has a weight matrix and says no FLOPs"
        assert [line.startswith(why) for line in lines] == [True] * said


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(folder: Path) -> None:
    tree = tiny_config(
        folder,
        output=str(folder / "infinite"),
        train={"steps": 50, "gradient_clip": 0},
        checkpoint={"every": 1},
    )
    said = run_ranks(fail, 2, tree, 1e30, timeout=60)
    assert said == ["the loss is not finite: training stopped"] * 2
    # Its configuration says a rate that none may: read the weights alone.
    (saved,) = (folder / "infinite" / "checkpoints").iterdir()
    weights = load_file(saved / WEIGHTS)
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_that_are_not_finite_are_not_saved(stage: int, folder: Path) -> None:
    output = folder / f"weights-{stage}"
    tree = tiny_config(
        folder,
        output=str(output),
        train={"steps": 1, "gradient_clip": 0},
        checkpoint={"every": 1},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    said = run_ranks(fail, 2, tree, float("inf"), timeout=60)
    assert said[0] == (
        f"{output}: weights are not finite, first of embedding.weight "
        "(checkpoint of step 1 not written; there is none)"
    )
    assert not list((output / "checkpoints").iterdir())


def fill_disk(tree: dict[str, Any], what: str) -> str:
    """A run whose disk is full from its second checkpoint on, for one rank's files."""
    import deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine as shards
    import torch.distributed as dist

    import launch.run.loop

    def full(write: Any, rank: int) -> Any:
        def attempt(content: Any, path: Any) -> None:
            if dist.get_rank() == rank and "step-00000004" in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(content, path)

        return attempt

    if what == "weights":
        launch.run.loop.save_tensors = full(launch.run.loop.save_tensors, 0)
    else:
        engine = shards.TorchCheckpointEngine
        whole = engine.save
        engine.save = lambda self, state_dict, path: full(  # type: ignore[method-assign]
            lambda content, at: whole(self, content, at), 1
        )(state_dict, path)
    return fail(tree)


@pytest.mark.parametrize("what", ["weights", "shards"])
def test_a_full_disk_ends_the_run_in_one_line_with_the_checkpoint_before(
    what: str, folder: Path
) -> None:
    output = folder / f"full-{what}"
    tree = tiny_config(
        folder,
        output=str(output),
        train={"steps": 6},
        checkpoint={"every": 2, "keep": 1},
        deepspeed={"zero_optimization": {"stage": 1}},
    )
    said = run_ranks(fill_disk, 2, tree, what, timeout=40)
    line = f"{output}: no space left (checkpoint of step 4 not written; newest is step 2)"
    assert said == [line] * 2
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000002"]
    assert read_state(find_checkpoint(output)).step == 2


def states(tree: dict[str, Any]) -> RunState:
    run(from_mapping(tree))
    return read_state(find_checkpoint(tree["output"]))


def test_phases_continue_rows_and_steps_and_restart_moments_where_asked(folder: Path) -> None:
    phases = [
        {"name": "short", "train": {"steps": 3}},
        {"name": "wide", "train": {"steps": 2, "batch_size": 16}},
        {"name": "anew", "train": {"steps": 4}, "optimizer": "restart"},
    ]
    tree = tiny_config(folder, output=str(folder / "phases"), phases=phases)
    state = run_ranks(states, 1, tree, timeout=60)[0]
    assert (state.step, state.phase, state.phase_step) == (9, 2, 4)
    assert state.rows == 3 * 8 + 2 * 16 + 4 * 16
    assert state.tokens == state.rows * 32
    assert state.optimizer_steps == 4


def stop_in_second_phase(tree: dict[str, Any]) -> list[float]:
    """Run the phases by hand to the middle of the second, save, and let `run` finish."""
    config = from_mapping(tree)
    first, second = config.phase_configs()
    loop = make_loop(first)
    for _ in range(first.train.steps):
        loop.step()
    loop.save()
    loop.engine.close()
    state = RunState(**{**vars(loop.state), "phase": 1, "phase_step": 0})
    loop = make_loop(second, state)
    loop.load(find_checkpoint(config.output))
    loop.step()
    loop.save()
    loop.engine.close()
    run(config)
    return final_weights(config.output)


def whole_run(tree: dict[str, Any]) -> list[float]:
    run(from_mapping(tree))
    return final_weights(tree["output"])


def final_weights(output: str) -> list[float]:
    from safetensors.torch import load_file

    weights = load_file(find_checkpoint(output) / "model.safetensors")
    return [float(tensor.double().sum()) for _, tensor in sorted(weights.items())]


def test_a_run_stopped_in_its_second_phase_ends_as_one_that_was_not(folder: Path) -> None:
    phases = [
        {"name": "first", "train": {"steps": 2}},
        {"name": "second", "train": {"steps": 3, "learning_rate": 1e-3}},
    ]
    tree = tiny_config(folder, phases=phases, deepspeed={"zero_optimization": {"stage": 1}})
    stopped = run_ranks(
        stop_in_second_phase, 2, {**tree, "output": str(folder / "stopped")}, timeout=60
    )
    undisturbed = run_ranks(whole_run, 2, {**tree, "output": str(folder / "through")}, timeout=60)
    assert stopped == undisturbed


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_that_are_not_linear_in_tokens_do_not_depend_on_accumulation(
    ranks: int, folder: Path
) -> None:
    experts = {"mixture_of_depths": None, "mixture_of_experts": {"num_experts": 4, "ffn_dim": 16}}
    experts["mixture_of_experts"]["balance_coefficient"] = 1.0  # type: ignore[index]
    whole = tiny_config(folder, model=experts, train={"move_within": 0})
    split = tiny_config(folder, model=experts, train={"move_within": 0, "micro_batch_size": 2})
    expected = run_ranks(train_few, 1, whole, (0,), timeout=60)[0][0]
    found = run_ranks(train_few, ranks, split, (1,), timeout=60)[0][1]
    # 1e-5: sums in another order.
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-5)


def test_random_numbers_of_a_row_do_not_depend_on_the_rows_around_it() -> None:
    alone = row_generator(3, 17).standard_normal(4)
    assert (alone == row_generator(3, 17).standard_normal(4)).all()
    others = [row_generator(3, 18), row_generator(4, 17), row_generator(3, 17, stream=1)]
    assert all((alone != other.standard_normal(4)).all() for other in others)


def resumed_and_not(tree: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses after a checkpoint: of the run that wrote it, and of one that goes on from it."""
    config = from_mapping(tree)
    loop = make_loop(config)
    loop.step()
    checkpoint = loop.save()
    undisturbed = [loop.step().loss for _ in range(2)]
    loop.engine.close()
    loop = make_loop(config, read_state(checkpoint))
    loop.load(checkpoint)
    return undisturbed, [loop.step().loss for _ in range(2)]


def test_random_draws_of_a_step_are_the_same_after_a_resume(folder: Path) -> None:
    """Which tokens SkipLayer keeps is drawn: one token otherwise is another loss."""
    skip = {"density": 0.5, "layers": [0, 1], "schedule": {"noise": 1.0}}
    tree = tiny_config(
        folder,
        output=str(folder / "draws"),
        model={"mixture_of_depths": None, "skip_layer": skip},
        train={"micro_batch_size": 2, "move_within": 0},
    )
    for undisturbed, again in run_ranks(resumed_and_not, 1, tree, timeout=60):
        assert again == undisturbed
