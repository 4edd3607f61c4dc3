"""A compiler that was killed leaves torch's lock behind: nobody waits for it unknowingly."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
from torch.utils import cpp_extension

from launch.run.builds import build_no_collectives
from tests.ranks import run_ranks


def shared_memory_op(extensions: str) -> object:
    """What DeepSpeed has for a CPU's collectives after the programs' preparation."""
    import os

    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = True
    build_no_collectives()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed.comm.comm.cdb.shm_comm_op


def test_a_lock_left_behind_holds_up_no_rank(tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    (folder / "lock").touch()
    assert run_ranks(shared_memory_op, 1, str(tmp_path), timeout=40) == [None]


def test_who_waits_for_a_build_names_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)  # to be put back
    build_no_collectives()
    (tmp_path / "fused_adam").mkdir()
    lock = tmp_path / "fused_adam" / "lock"
    lock.touch()
    waiting = cpp_extension.FileBaton(str(lock))
    assert not waiting.try_acquire()
    thread = Thread(target=waiting.wait)
    thread.start()
    lock.unlink()
    thread.join()
    (said,) = capsys.readouterr().out.splitlines()
    assert "until another process has built fused_adam" in said
    assert said.endswith(f"remove {lock}")
