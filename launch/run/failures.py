"""What is said when a rank fails: first the one that failed first, and every rank's in a file.

    OUTPUT/errors/rank-1.txt    traceback of rank 1, or its stack when it hung

A rank that fails ends the others: their collectives break, and their tracebacks tell nothing.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
import traceback
from pathlib import Path

from launch.run.marks import Mark

ERRORS = "errors"
# What a collective raises when another rank is gone: gloo's pairs, nccl's, the store's.
_OF_A_PEER = re.compile(
    r"Connection (closed|reset)|Broken pipe|Socket closed|gloo/transport|"
    r"recvValue|sendBytes|remote process exited|communicator was aborted|Timed? ?out"
)
# Long enough for a rank that failed by itself to write its traceback.
_PATIENCE = 3.0


def is_of_a_peer(error: BaseException) -> bool:
    """Whether a rank failed only because another one did."""
    return isinstance(error, RuntimeError) and bool(_OF_A_PEER.search(str(error)))


def report(error: BaseException, *, output: Path, rank: int, mark: Mark) -> None:
    """Keep this rank's traceback; show it, unless another rank's tells more."""
    peer = is_of_a_peer(error)
    text = "".join(traceback.format_exception(error))
    head = f"rank {rank}, step {mark.step}, {mark.at}{PEER if peer else ''}\n"
    path = error_file(output, rank)
    if (
        not peer
    ):  # before the file: once it is there other ranks end, and the launcher ends this one
        _say(f"{head}{text}")
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
    except OSError as problem:  # perhaps it is the full disk that is to be told
        _say(f"{path}: {problem.strerror}\n")
    if peer:
        others = _others(output, rank)
        why = f"rank {others[0]} failed" if others else "another rank did"
        _say(f"rank {rank}: ends because {why}; its own traceback is in {path}\n")


def _say(text: str) -> None:
    # One write: lines of several ranks do not mix.
    sys.stderr.write(text)
    sys.stderr.flush()


PEER = " (a collective with a rank that was gone)"


def _others(output: Path, rank: int) -> list[int]:
    """Other ranks that failed by themselves, as soon as there is one."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = [number for number, said in read_errors(output) if PEER not in said.split("\n")[0]]
        if found or time.monotonic() > deadline:
            return [number for number in found if number != rank]
        time.sleep(0.1)


def read_errors(output: Path) -> list[tuple[int, str]]:
    """Rank and text of each error that was kept, the first first."""
    found = []
    for path in (output / ERRORS).glob("rank-*.txt"):
        number = path.stem.removeprefix("rank-")
        if number.isdigit():
            try:
                found.append((path.stat().st_mtime_ns, int(number), path.read_text("utf-8")))
            except OSError:
                continue
    return [(number, said) for _, number, said in sorted(found)]


def error_file(output: Path, rank: int) -> Path:
    return output / ERRORS / f"rank-{rank}.txt"


def clear(output: Path) -> None:
    """Remove what an earlier run left. For the rank that holds the folder's lock."""
    shutil.rmtree(output / ERRORS, ignore_errors=True)
