"""A checkpoint is whole or it is not one."""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import MANIFEST, newest_intact, problem_with, save_atomically, step_of
from tests.ranks import RankError, run_ranks


def write(folder: Path) -> None:
    (folder / "part").mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "part" / "other.bin").write_bytes(b"other")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        save_atomically(tmp_path, step, write)
    return tmp_path


def test_the_newest_is_found_and_old_ones_go(root: Path) -> None:
    newest = newest_intact(root)
    assert newest is not None
    assert step_of(newest) == 3
    save_atomically(root, 12, write, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000003", "step-00000012"]


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_wins_over_higher_steps(root: Path, keep: int) -> None:
    save_atomically(root, 12, write)
    os.truncate(root / "step-00000012" / "weights.bin", 5)
    assert save_atomically(root, 2, write, keep=keep) == root / "step-00000002"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_intact(root) == root / "step-00000002"
    # Of another line, or damaged: nothing reads them unasked, nothing is lost.
    below = ["step-00000001"] if keep == 2 else []
    stale = ["stale-step-00000003", "stale-step-00000012"]
    assert names(root) == [*stale, *below, "step-00000002"]
    assert problem_with(root / stale[0]) is None


def test_writing_one_more_without_pruning_leaves_all(root: Path) -> None:
    save_atomically(root, 0, write)
    assert names(root) == [f"step-0000000{step}" for step in range(4)]


@pytest.mark.parametrize(
    "damage", ["truncated", "altered", "missing", "no manifest", "cut manifest"]
)
def test_a_damaged_newest_is_passed_over_with_a_warning(root: Path, damage: str) -> None:
    newest = root / "step-00000003"
    weights, manifest = newest / "weights.bin", newest / MANIFEST
    if damage == "truncated":
        os.truncate(weights, 100)
    elif damage == "altered":
        content = bytearray(weights.read_bytes())
        content[5000] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "missing":
        (newest / "part" / "other.bin").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        os.truncate(manifest, 20)
    with pytest.warns(UserWarning, match="step-00000003: skipped"):
        found = newest_intact(root)
    assert found == root / "step-00000002"


class Killed(BaseException):
    pass


def test_a_run_killed_while_writing_leaves_the_checkpoints_before(root: Path) -> None:
    def write_half(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        save_atomically(root, 4, write_half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_intact(root) == root / "step-00000003"
    assert problem_with(save_atomically(root, 4, write)) is None


def save_shared(root: Path) -> str:
    import torch.distributed as dist

    rank = dist.get_rank()
    return str(save_atomically(root, 7, lambda folder: _write_own(folder, rank)))


def _write_own(folder: Path, rank: int) -> None:
    (folder / f"rank-{rank}.bin").write_bytes(b"x" * (rank + 1))


def test_ranks_write_one_checkpoint_together(tmp_path: Path) -> None:
    folders = run_ranks(save_shared, 3, tmp_path)
    assert len(set(folders)) == 1
    files = json.loads((Path(folders[0]) / MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        "rank-0.bin": 1,
        "rank-1.bin": 2,
        "rank-2.bin": 3,
    }
    assert newest_intact(tmp_path) == Path(folders[0])


def fail_on(rank: int, where: str, root: Path) -> tuple[str, str, float, list[str]]:
    """What each rank met when one of them could not write, and how long it took."""
    import torch.distributed as dist

    own = dist.get_rank()
    save_atomically(root, 2, lambda folder: _write_own(folder, own), keep=1)

    def write_half(folder: Path) -> None:
        _write_own(folder, own)
        if own == rank and where == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        if own == rank and where == "manifest":
            # A folder stands where the manifest goes.
            (folder / MANIFEST).mkdir()

    begun = time.monotonic()
    with pytest.raises((OSError, RuntimeError)) as met:
        save_atomically(root, 4, write_half, keep=1)
    seconds = time.monotonic() - begun
    dist.barrier()
    return type(met.value).__name__, str(met.value), seconds, names(root)


@pytest.mark.parametrize(("rank", "where"), [(0, "write"), (1, "write"), (0, "manifest")])
def test_a_rank_that_cannot_write_ends_the_save_on_all(
    rank: int, where: str, tmp_path: Path
) -> None:
    outcomes = run_ranks(fail_on, 2, rank, where, tmp_path)
    kind, said, _, left = outcomes[rank]
    assert kind == {"write": "OSError", "manifest": "IsADirectoryError"}[where]
    assert outcomes[1 - rank][:2] == ("FailedElsewhere", f"rank {rank}: {said}")
    # None waits for a process group to time out.
    assert max(outcome[2] for outcome in outcomes) < 10
    assert left == ["step-00000002"]
    assert newest_intact(tmp_path) == tmp_path / "step-00000002"


def fail_beside_a_collective(root: Path) -> None:
    import torch.distributed as dist

    import parallel.checkpoint

    parallel.checkpoint._PATIENCE = timedelta(seconds=1)

    def write_half(folder: Path) -> None:
        if dist.get_rank() == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        dist.broadcast(torch.zeros(1000), src=0)

    save_atomically(root, 4, write_half)


def test_a_rank_does_not_wait_long_with_its_own_error(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(RankError, match="No space left on device"):
        run_ranks(fail_beside_a_collective, 2, tmp_path, timeout=60)
    # The other is in a collective of its own until the launcher ends it.
    assert time.monotonic() - begun < 30
