"""Parts of DeepSpeed that a compiler makes when they are first used.

Torch has one process build and lets the others wait for a file, `lock`, to vanish. A builder that
was killed leaves it behind, and whoever comes later waits for ever.
"""

from __future__ import annotations

from pathlib import Path

from torch.utils.file_baton import FileBaton


def build_no_collectives() -> None:
    """Keep DeepSpeed, in this process, from building its collectives through shared memory.

    They need a compiler and a minute, and gain nothing at this project's CPU sizes. What it builds
    all the same, an optimizer of its own, is waited for with a word.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils import cpp_extension

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    cpp_extension.FileBaton = _Baton


class _Baton(FileBaton):
    """Torch's lock of a build, which says that it waits."""

    def wait(self) -> None:
        lock = Path(self.lock_file_path)
        print(
            f"waiting until another process has built {lock.parent.name}; when none does, since "
            f"one was killed while it built, remove {lock}",
            flush=True,
        )
        super().wait()
