"""Starting a run again that failed: on the ranks that are still there, from its newest checkpoint.

Hosts that do not answer and GPUs that are gone are left out; the batch must divide among the ranks
that remain. A run that was killed before its ranks began is started as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from launch.run.arguments import Parsed
from launch.run.errors import BadInput
from launch.run.launcher import host_slots
from launch.run.marks import this_host
from launch.run.preflight import check_run
from launch.run.supervisor import Start, uses_cuda

# What an answer over a network may take.
_SECONDS = 20
_GPUS = "import torch; print(torch.cuda.device_count())"


class Restarts:
    """How often a run may still be started again, and what is started then.

    Args:
        parsed: the command line.
        start: the launcher's command and supervision, of a command line.
    """

    def __init__(self, parsed: Parsed, start: Callable[[Parsed], tuple[int, Start]]) -> None:
        self._parsed, self._start = parsed, start
        self._left = self._total = parsed.options.restarts

    def __call__(self, code: int, begun: bool) -> Start | None:
        """What to start after exit code `code`; None: nothing, and why is said.

        Args:
            begun: whether the ranks had taken the run's folder: then it continues.
        """
        if not self._left:
            return None
        self._left -= 1
        number = self._total - self._left
        try:
            options = still_there(self._parsed.options, Path(self._parsed.config.output))
            parsed = dataclasses.replace(self._parsed, options=options)
            if begun and parsed.config.checkpoint.resume == "never":
                parsed = _continuing(parsed)
            self._parsed = parsed
            ranks, start = self._start(parsed)
            check_run(parsed.config, ranks=ranks)
        except BadInput as problem:
            print(f"error: no restart: {problem}", file=sys.stderr, flush=True)
            return None
        print(
            f"restart {number} of {self._total}, after exit code {code}, on {ranks} ranks: "
            "from the newest intact checkpoint",
            flush=True,
        )
        return start


def still_there(options: argparse.Namespace, output: Path) -> argparse.Namespace:
    """Options of a start on the hosts that answer and the GPUs that are there now.

    Args:
        options: of the last start.
        output: the run's folder, which gets a hostfile without those that do not.

    Raises:
        BadInput: none is.
    """
    options = argparse.Namespace(**vars(options))
    if options.hostfile is not None:
        slots = _slots(Path(options.hostfile))
        kept = {host: count for host, count in slots.items() if answers(host)}
        gone = [host for host in slots if host not in kept]
        if gone:
            print(f"left out, since they do not answer: {', '.join(gone)}", flush=True)
        if len(kept) == 1 and _is_this(next(iter(kept))):  # needs no ssh
            options.hostfile, options.ranks = None, next(iter(kept.values()))
        elif gone:
            path = output / "hosts"
            lines = [f"{host} slots={count}\n" for host, count in kept.items()]
            path.write_text("".join(lines), encoding="utf-8")
            options.hostfile = str(path)
    elif uses_cuda():
        # In a process of its own: a driver tells a process once.
        asked = subprocess.run(
            [sys.executable, "-c", _GPUS], capture_output=True, text=True, check=False
        )
        gpus = int(asked.stdout) if asked.stdout.strip().isdigit() else 0
        if not gpus:
            raise BadInput("no GPU of this node answers")
        options.ranks = min(options.ranks or gpus, gpus)
    return options


def answers(host: str) -> bool:
    """Whether a host can be reached as DeepSpeed's launcher reaches it; this one always."""
    if _is_this(host):
        return True
    words = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS // 2}", host, "true"]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _is_this(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", this_host())


def _slots(path: Path) -> dict[str, int]:
    """Ranks of each host, by name, of a hostfile that was checked before."""
    lines = (line.split("#")[0].split() for line in path.read_text("utf-8").splitlines())
    return dict(zip((words[0] for words in lines if words), host_slots(path), strict=True))


def _continuing(parsed: Parsed) -> Parsed:
    """The same run, which continues what it has begun instead of starting anew."""
    checkpoint = dataclasses.replace(parsed.config.checkpoint, resume="auto")
    config = dataclasses.replace(parsed.config, checkpoint=checkpoint)
    return dataclasses.replace(
        parsed, config=config, words=[*parsed.words, "checkpoint.resume=auto"]
    )
