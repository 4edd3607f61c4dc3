"""A run that is killed, stopped or moved to other ranks ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import find_checkpoint, load_model, read_state
from launch.run.config import from_mapping
from launch.run.sections import RunConfig
from launch.run.training import run
from launch.run.trust import trust
from parallel.checkpoint import newest_intact
from tests.distributed.runs import make_loop, tiny_config, train_few, write_text
from tests.distributed.started import Started, first_row
from tests.ranks import run_ranks

STEPS, EVERY = 24, 4
TASK = "tests.distributed.failing:FailingTask"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    write_text(folder)
    return folder


def configured(tree: dict[str, Any]) -> RunConfig:
    trust([TASK])
    return from_mapping(tree)


def run_tree(tree: dict[str, Any]) -> None:
    run(configured(tree))


def losses(output: Path) -> dict[int, float]:
    lines = read_metrics(output / "metrics.jsonl")
    return {line["step"]: line["loss/train"] for line in lines if "loss/train" in line}


def long_run(folder: Path, name: str, **train: Any) -> dict[str, Any]:
    return tiny_config(
        folder,
        task=TASK,
        output=str(folder / name),
        train={"steps": STEPS, "log_every": 1, **train},
        checkpoint={"every": EVERY, "keep": 3},
        monitor={"every": 1},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[int, float]:
    tree = long_run(folder, "undisturbed")
    run_ranks(run_tree, 2, tree, timeout=120)
    curve = losses(folder / "undisturbed")
    assert list(curve) == list(range(1, STEPS + 1))
    return curve


def interrupted(
    tree: dict[str, Any],
    folder: Path,
    interrupt: Callable[[Started], None],
    **at: tuple[int, int],
) -> tuple[int, str]:
    """Exit code and words of a run that something ends after a step; nothing is left of it."""
    started = Started(tree, folder, **at)
    ((_, step),) = at.values()
    try:
        started.wait_for(f"step {step:>2}/{STEPS}")
        if "holds" in at:
            started.wait_until_held()
        everyone = started.descendants()
        interrupt(started)
        code, said = started.end()
    finally:
        started.close()
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not alive
    return code, said


@pytest.mark.timeout(300)
def test_what_is_killed_leaves_the_loss_curve_as_it_would_have_been(
    folder: Path, undisturbed: dict[int, float]
) -> None:
    """Rank 0 writes the log: no step of it is missing and none is there twice."""
    tree = long_run(folder, "killed")
    checkpoints = folder / "killed" / "checkpoints"
    # So soon that nothing but a flush writes the log: not its buffer, not the clock.
    step = EVERY + 1
    code, said = interrupted(tree, folder, lambda run: run.rank(0).kill(), holds=(0, step))
    assert code not in (0, 2), said
    killed = rf"error: rank 0 \(process \d+\) was killed, or ended without a word, at step {step} "
    assert re.search(killed, said), said
    assert "Traceback" not in said
    left = (folder / "killed" / "errors" / "rank-1.txt").read_text()
    assert "(a collective with a rank that was gone)\nTraceback" in left
    assert "all_reduce" in left
    reached = newest_intact(checkpoints)
    assert reached is not None
    assert read_state(reached).step == step // EVERY * EVERY

    # DeepSpeed's own exit code would be 0.
    code, said = interrupted(tree, folder, lambda run: run.launcher().kill(), holds=(0, 14))
    assert code not in (0, 2), said
    assert "error: the launcher of the ranks ended before the run did" in said

    # Asked to end: it saves where it is, and nothing is wrong.
    def ask(run: Started) -> None:
        run.process.send_signal(signal.SIGTERM)

    code, said = interrupted(tree, folder, ask, holds=(0, 18))
    assert code == 0, said
    assert "as asked" in said
    reached = newest_intact(checkpoints)
    assert reached is not None
    assert read_state(reached).step in (18, 19)

    run_ranks(run_tree, 2, tree, timeout=120)
    # Not one digit differs: the same operations in the same order.
    lines = read_metrics(folder / "killed" / "metrics.jsonl")
    trained = [line["step"] for line in lines if "loss/train" in line]
    assert trained == list(range(1, STEPS + 1))
    assert losses(folder / "killed") == undisturbed


@pytest.mark.timeout(300)
def test_the_rank_at_fault_is_named(folder: Path) -> None:
    tree = long_run(folder, "faulty", hang_seconds=6.0)
    errors = folder / "faulty" / "errors"
    code, said = interrupted(tree, folder, lambda _: None, fails=(1, 6))
    assert code not in (0, 2), said
    # Of rank 1 alone: rank 0's collective broke when rank 1 was gone.
    assert said.count("Traceback") == 1
    assert "rank 1, step 6, batch\nTraceback" in said
    assert f"ValueError: row {first_row(1, 6)} has no text" in said
    assert f"error: rank 1 failed first, at step 6; tracebacks of the ranks: {errors}" in said
    assert "ValueError" in (errors / "rank-1.txt").read_text()
    assert "a collective with a rank that was gone" in (errors / "rank-0.txt").read_text()

    code, said = interrupted(tree, folder, lambda run: run.rank(1).suspend(), holds=(1, 9))
    assert code not in (0, 2), said
    assert "for train.hang_seconds=6: hanging: rank 1" in said
    assert re.search(r"rank 0: step 9, .*, waits in all_reduce\n", said), said
    assert re.search(r"rank 1: step 9, batch .*, is stopped \(SIGSTOP\)\n", said), said
    assert re.search(r'File ".*", line \d+ in main', said)
    assert all((errors / f"rank-{rank}.txt").read_text().count("in step") for rank in (0, 1))


def resume_and_list(tree: dict[str, Any]) -> tuple[list[str], dict[int, float]]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(configured(tree))
    return [str(w.message) for w in caught], losses(Path(tree["output"]))


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(
    folder: Path, undisturbed: dict[int, float]
) -> None:
    tree = long_run(folder, "truncated")
    run_ranks(run_part, 2, tree, 2 * EVERY, timeout=120)
    root = folder / "truncated" / "checkpoints"
    newest = newest_intact(root)
    assert newest is not None
    assert read_state(newest).step == 2 * EVERY
    shard = next((newest / "engine").glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    results = run_ranks(resume_and_list, 2, tree, timeout=120)
    assert any(f"step-{2 * EVERY:08}" in w and "bytes" in w for w in results[0][0])
    # It went on from the checkpoint before.
    assert results[0][1] == {step: undisturbed[step] for step in range(EVERY + 1, STEPS + 1)}


def run_part(tree: dict[str, Any], steps: int) -> None:
    """Train `steps` steps of a longer run, saving as often as it would."""
    loop = make_loop(configured(tree))
    for number in range(1, steps + 1):
        loop.step()
        if number % EVERY == 0:
            loop.save()
    loop.engine.close()


def save_after(tree: dict[str, Any], steps: int) -> None:
    loop = make_loop(from_mapping(tree))
    for _ in range(steps):
        loop.step()
    loop.save()
    loop.engine.close()


def continue_from(tree: dict[str, Any], checkpoint: str, stages: tuple[int, ...]) -> Any:
    """Losses and weights of three more steps, at several ZeRO stages."""
    out = {}
    for stage in stages:
        config = from_mapping({**tree, "deepspeed": {"zero_optimization": {"stage": stage}}})
        loop = make_loop(config, read_state(Path(checkpoint)))
        loop.load(Path(checkpoint))
        steps = [loop.step().loss for _ in range(3)]
        out[stage] = (steps, loop.engine.full_weights())
        loop.engine.close()
    return out


def assert_continues(
    folder: Path, *, ranks: int, stage: int, others: int, stages: tuple[int, ...]
) -> None:
    """Three steps at one split, three more at another: as six steps on one rank."""
    tree = tiny_config(
        folder,
        train={"steps": 6, "micro_batch_size": 2},
        output=str(folder / f"from-{ranks}-{stage}-{others}"),
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    run_ranks(save_after, ranks, tree, 3, timeout=120)
    checkpoint = str(find_checkpoint(tree["output"]))
    whole = run_ranks(train_few, 1, tree, (0,), timeout=120)[0][0]
    continued = run_ranks(continue_from, others, tree, checkpoint, stages, timeout=150)[0]
    for other, (steps, weights) in continued.items():
        place = f"{ranks} ranks ZeRO {stage} -> {others} ranks ZeRO {other}"
        # 1e-5: sums in another order.
        assert steps == pytest.approx(whole.losses[3:], abs=1e-5), place
        for name, weight in whole.weights.items():
            difference = (weights[name] - weight).abs().max()
            assert difference <= 1e-5, f"{place}: {name}"


def test_a_checkpoint_of_whole_state_is_cut_into_shards(folder: Path) -> None:
    assert_continues(folder, ranks=1, stage=0, others=2, stages=(1, 3))


def test_a_checkpoint_of_shards_continues_as_other_shards(folder: Path) -> None:
    assert_continues(folder, ranks=2, stage=2, others=1, stages=(0, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("others", [1, 2, 4])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 1), (2, 2), (4, 3)])
def test_a_checkpoint_continues_on_any_ranks_and_zero_stage(
    ranks: int, stage: int, others: int, folder: Path
) -> None:
    assert_continues(folder, ranks=ranks, stage=stage, others=others, stages=(0, 1, 2, 3))


def test_load_model_rebuilds_the_trained_model(folder: Path) -> None:
    tree = tiny_config(
        folder,
        output=str(folder / "reload"),
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    trained = run_ranks(save_and_gather, 2, tree, timeout=120)[0]
    model, config = load_model(folder / "reload")
    assert config.model.dim == 32
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def save_and_gather(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    loop = make_loop(from_mapping(tree))
    loop.step()
    loop.save()
    return loop.engine.full_weights()
