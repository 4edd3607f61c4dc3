"""What a run starts from, and what becomes of a run that its folder held before."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from adaptive.observe.metric_log import read_metrics
from launch.checkpoint.files import find_checkpoint, read_state
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.folder import how_to_continue, only_run_in, where_to_start
from launch.run.training import run
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_text(folder)
    return folder


def tree_of(folder: Path, name: str, steps: int, **checkpoint: Any) -> dict[str, Any]:
    return tiny_config(
        folder,
        output=str(folder / name),
        train={"steps": steps, "warmup_steps": 1},
        checkpoint={"every": 2, **checkpoint},
        monitor={"every": 1},
    )


def run_trees(*trees: dict[str, Any]) -> None:
    for tree in trees:
        run(from_mapping(tree))


def run_until(tree: dict[str, Any], step: int) -> None:
    """What a run leaves that was stopped at a step."""
    config = from_mapping(tree)
    with only_run_in(Path(config.output)):
        where_to_start(config)
        loop = make_loop(config)
        while loop.state.step < step:
            loop.step()
        loop.save()
        loop.engine.close()


def steps_in(output: Path) -> list[int]:
    return [int(p.name[-8:]) for p in sorted((output / "checkpoints").glob("step-*"))]


def logged(output: Path) -> list[int]:
    return [line["step"] for line in read_metrics(output / "metrics.jsonl") if "loss/train" in line]


def test_a_run_started_anew_leaves_the_earlier_one_whole_beside_it(folder: Path) -> None:
    old = tree_of(folder, "anew", 6)
    new = tree_of(folder, "anew", 4, resume="never")
    run_ranks(run_trees, 1, old, new, timeout=90)
    output = folder / "anew"
    assert steps_in(output) == [2, 4]
    assert read_state(find_checkpoint(output)).step == 4
    assert logged(output) == [1, 2, 3, 4]
    # The earlier run can be sampled, continued and plotted as before.
    assert steps_in(output / "earlier-1") == [4, 6]
    assert logged(output / "earlier-1") == [1, 2, 3, 4, 5, 6]
    assert (output / "earlier-1" / "run.yaml").is_file()


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """A run of two steps that others start from."""
    run_ranks(run_trees, 1, tree_of(folder, "other", 2), timeout=60)
    return folder / "other"


def test_the_command_that_started_from_a_path_continues_its_own_run(
    folder: Path, other: Path
) -> None:
    tree = tree_of(folder, "from path", 6, resume=str(other))
    run_ranks(run_until, 1, tree, 4, timeout=60)
    config, output = from_mapping(tree), folder / "from path"
    own = output / "checkpoints" / "step-00000004"
    assert where_to_start(config) == own
    assert how_to_continue(config) == "the same command continues"
    # With any other key it is another run, which starts where it was told to.
    changed = from_mapping({**tree, "train": {**tree["train"], "seed": 1}})
    assert where_to_start(changed) == find_checkpoint(other)
    assert steps_in(output / "earlier-1") == [4]
    assert not steps_in(output)


def test_a_path_that_holds_another_checkpoint_than_before_is_started_from_again(
    folder: Path,
) -> None:
    source = tree_of(folder, "moving", 2)
    tree = tree_of(folder, "from moving", 6, resume=str(folder / "moving"))
    run_ranks(run_trees, 1, source, timeout=60)
    run_ranks(run_until, 1, tree, 4, timeout=60)
    longer = tree_of(folder, "moving", 4)
    run_ranks(run_trees, 1, longer, timeout=60)
    start = where_to_start(from_mapping(tree))
    assert start == folder / "moving" / "checkpoints" / "step-00000004"


def test_going_back_to_an_own_checkpoint_sets_later_ones_aside(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(run_trees, 1, tree_of(folder, "back", 4), timeout=60)
    output = folder / "back"
    first = output / "checkpoints" / "step-00000002"
    config = from_mapping(tree_of(folder, "back", 4, resume=str(first)))
    assert where_to_start(config) == first
    assert f"set aside, the run goes back to {first}" in capsys.readouterr().out
    assert find_checkpoint(output) == first
    assert (output / "checkpoints" / "stale-step-00000004").is_dir()
    # The path may be pruned by then.
    assert "checkpoint.resume=auto instead of" in how_to_continue(config)


def test_a_run_started_anew_says_what_continues_it(folder: Path) -> None:
    config = from_mapping(tree_of(folder, "never", 4, resume="never"))
    said = "the same command with checkpoint.resume=auto instead of never continues"
    assert how_to_continue(config) == said


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as met:
        run(from_mapping(tree))
    return str(met.value)


def test_a_second_run_in_the_same_folder_ends_in_one_line(folder: Path) -> None:
    tree = tree_of(folder, "shared", 2)
    output = folder / "shared"
    with only_run_in(output):
        said = run_ranks(refused, 2, tree, timeout=60)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
    line = f"output={output}: {owner} trains in it; wait for it or give another output="
    # Both ranks end; the folder is as it was.
    assert said == [line] * 2
    assert [p.name for p in output.iterdir()] == [".lock"]
    run_ranks(run_trees, 1, tree, timeout=60)
    assert steps_in(output) == [2]


def test_a_file_system_without_locks_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), only_run_in(tmp_path):
        pass
