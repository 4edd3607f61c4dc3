"""What was tried and what became of it: a line a try, so that a soak goes on where it was."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

SURVIVED, LOST = "survived", "lost"


@dataclass(frozen=True)
class Try:
    """One try.

    Attributes:
        part: kills, signals, disk, checkpoints or configurations.
        kind: what was done.
        number: of the try in its part.
        verdict: SURVIVED, or LOST.
        said: what was seen, in a line.
        seconds: from the deed to the end.
    """

    part: str
    kind: str
    number: int
    verdict: str
    said: str
    seconds: float


class Record:
    """Tries of a soak, in a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._lock = folder / "tries.jsonl", threading.Lock()
        self.tries: list[Try] = []
        if self.path.is_file():
            lines = self.path.read_bytes().splitlines(keepends=True)
            self.tries = [Try(**json.loads(line)) for line in lines if line.endswith(b"\n")]

    def add(self, found: Try) -> None:
        with self._lock:
            self.tries.append(found)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found)) + "\n")
        print(
            f"{found.part} {found.number} {found.kind}: {found.verdict}, {found.said}", flush=True
        )

    def has(self, part: str, number: int) -> bool:
        return any((one.part, one.number) == (part, number) for one in self.tries)

    def count(self, part: str) -> int:
        return sum(one.part == part for one in self.tries)

    def table(self) -> str:
        """Markdown: tries, survived and lost, by part and kind."""
        rows = ["| part | what was done | tries | survived | lost |", "|---|---|---|---|---|"]
        counts = Counter((one.part, one.kind) for one in self.tries)
        lost = Counter((one.part, one.kind) for one in self.tries if one.verdict == LOST)
        for (part, kind), tries in sorted(counts.items()):
            bad = lost[part, kind]
            rows.append(f"| {part} | {kind} | {tries} | {tries - bad} | {bad} |")
        total, bad = len(self.tries), sum(lost.values())
        rows.append(f"| all | | {total} | {total - bad} | {bad} |")
        return "\n".join(rows)
