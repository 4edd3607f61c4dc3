"""DeepSpeed's shards: data only, whoever reads them; read-only checkpoints; empty parameters."""

from __future__ import annotations

import os
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.checkpoint.files import find_checkpoint, read_state, read_whole
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.preflight import check_run
from launch.run.trust import trust
from launch.tasks.language_model import LanguageModelTask
from parallel.checkpoint import MANIFEST
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.launch.test_strangers import Payload, sign
from tests.ranks import run_ranks

EMPTY = "tests.distributed.test_strangers:EmptyTask"
Trees = list[tuple[dict[str, Any], str | None]]


class EmptyTask(LanguageModelTask):
    """A model of one's own in which a size happens to be zero."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.nothing = nn.Linear(8, 0)
        return model


def train(trees: Trees, steps: int) -> list[tuple[list[float], str]]:
    """Losses of some steps of each run, from a checkpoint or from nothing; what they end with."""
    trust([EMPTY])
    ends = []
    for tree, checkpoint in trees:
        config = from_mapping(tree)
        loop = make_loop(config, None if checkpoint is None else read_state(Path(checkpoint)))
        if checkpoint is not None:
            loop.load(Path(checkpoint))
        losses = []
        for _ in range(steps):
            losses.append(loop.step().loss)
            loop.check_moved()
        ends.append((losses, str(loop.save())))
        loop.engine.close()
        torch.manual_seed(0)
    return ends


def tree_of(folder: Path, name: str, stage: int, **sections: Any) -> dict[str, Any]:
    zero = {"zero_optimization": {"stage": stage}}
    train = {"steps": 9, "warmup_steps": 1, "move_within": 2}
    return tiny_config(folder, output=str(folder / name), train=train, deepspeed=zero, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[int, Path]:
    """A checkpoint of two ranks at each ZeRO stage."""
    trees: Trees = [(tree_of(folder, f"zero{stage}", stage), None) for stage in range(4)]
    ends = run_ranks(train, 2, trees, 2, timeout=150)[0]
    return {stage: Path(path) for stage, (_, path) in enumerate(ends)}


def refusals(trees: Trees) -> list[str]:
    """What resuming says of each, where no earlier check was made."""
    said = []
    for tree, checkpoint in trees:
        loop = make_loop(from_mapping(tree))
        try:
            loop.load(Path(str(checkpoint)))
            said.append("loaded")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        loop.engine.close()
    return said


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_loader_runs_what_a_shard_pickles(
    ranks: int, folder: Path, shards: dict[int, Path], tmp_path: Path
) -> None:
    mark, trees = tmp_path / "mark", list[Any]()
    for stage, checkpoint in shards.items():
        for pattern in ("*model_states.pt", "*optim_states.pt"):
            poisoned = tmp_path / f"{stage}{pattern[1:6]}" / checkpoint.name
            shutil.copytree(checkpoint, poisoned)
            for shard in (poisoned / "engine").glob(pattern):
                torch.save(Payload(mark), shard)
            sign(poisoned)
            if stage == 0 and "optim" in pattern:
                continue
            with pytest.raises(BadInput, match=r"holds posix.mkdir, which is not data"):
                find_checkpoint(poisoned)
            # Two ranks: DeepSpeed's own way back. One: its conversion to whole tensors.
            trees.append((tree_of(folder, "poisoned", stage), str(poisoned)))
    for said in run_ranks(refusals, ranks, trees, timeout=150):
        assert all(one.startswith("BadInput: ") for one in said), said
    assert not mark.exists()


def test_a_checkpoint_is_read_where_nothing_can_be_written(
    shards: dict[int, Path], tmp_path: Path
) -> None:
    mine = tmp_path / "run"
    for stage in (0, 2):
        root = shutil.copytree(shards[stage].parent, mine / str(stage))
        # All that is imported is imported now: the other user may not see this one's Python.
        read_whole(find_checkpoint(root))
        os.chmod(root, 0o555)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            if os.getuid() == 0:
                for folder in (tmp_path, *list(tmp_path.parents)[:-1]):
                    os.chmod(folder, os.stat(folder).st_mode | 0o005)
                os.setgid(65534)
                os.setuid(65534)
            with pytest.raises(PermissionError):
                (mine / "2" / "x").write_text("")
            for stage in (0, 2):
                assert read_whole(find_checkpoint(mine / str(stage))).exp_avg
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def whole(checkpoint: str) -> dict[str, Tensor]:
    held = read_whole(Path(checkpoint))
    assert held.weights["nothing.weight"].shape == (0, 8)
    assert held.exp_avg["nothing.weight"].shape == (0, 8)
    return held.weights


def test_a_parameter_of_no_elements_trains_and_continues_at_any_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTIVE_TRUSTED_CODE", EMPTY)
    with pytest.raises(BadInput, match=r"stage=3: cannot shard nothing.weight \[0, 8\]"):
        check_run(from_mapping(tree_of(folder, "empty3", 3, task=EMPTY)), ranks=2)
    starts: Trees = [(tree_of(folder, f"empty{s}", s, task=EMPTY), None) for s in (0, 1, 2)]
    ends = run_ranks(train, 2, starts, 3, timeout=150)[0]
    paths = [path for _, path in ends]
    for path in paths:
        whole(path)
    pairs = [(0, 0), (0, 1), (1, 2), (2, 0), (2, 2)]
    resumed: Trees = [(tree_of(folder, f"empty{a}{b}", b, task=EMPTY), paths[a]) for a, b in pairs]
    after = run_ranks(train, 2, resumed, 2, timeout=150)[0]
    alone = run_ranks(train, 1, [resumed[1], resumed[3]], 2, timeout=150)[0]
    reference = after[0][0]
    for losses, path in [*after, *alone]:
        assert losses == pytest.approx(reference, abs=2e-5)
        whole(path)
    assert (Path(paths[0]) / MANIFEST).is_file()
