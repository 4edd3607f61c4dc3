"""How fast text becomes tokens: `python benchmarks/data.py [--megabytes 200] [--quick]`

`launch.encode` in a process of its own against `tokenizers.encode_batch` alone on the same
documents, in turn; memory is the largest that the process ever held, its imports included. Bytes
against nothing. Then how long packing takes, and the share of padding that it leaves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import save
from launch.data.packing import packed_rows
from launch.data.sources import find_files
from launch.data.token_files import read_own

_ENCODE = """
import re, sys, time
from launch.encode import main
begun = time.perf_counter(), time.process_time()
main(sys.argv[1:])
seconds, computed = time.perf_counter() - begun[0], time.process_time() - begun[1]
# Not ru_maxrss, which a process inherits from the one that started it.
held = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(seconds, computed, held, file=sys.stderr)
"""


class Rates:
    """MB/s of several runs, by the clock and by the processor's time, which others' work spares."""

    def __init__(self, megabytes: float) -> None:
        self._megabytes = megabytes
        self.clock: list[float] = []
        self.processor: list[float] = []

    def add(self, seconds: float, computed: float) -> None:
        self.clock.append(self._megabytes / seconds)
        self.processor.append(self._megabytes / computed)

    def medians(self) -> dict[str, float]:
        return {
            "mb_s": statistics.median(self.clock),
            "mb_per_processor_second": statistics.median(self.processor),
        }

    def of(self, other: Rates) -> dict[str, float]:
        pairs = {"clock": (self.clock, other.clock), "processor": (self.processor, other.processor)}
        return {
            name: statistics.median(a / b for a, b in zip(*both, strict=True))
            for name, both in pairs.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="nothing is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = write_corpus(folder / "corpus.jsonl", options.megabytes * 10**6)
        tokenizer = train_tokenizer(folder, corpus)
        found = measure(folder, tokenizer, options.repeats)
    found |= {"megabytes": options.megabytes, "load": os.getloadavg()}
    print(json.dumps(found, indent=1))
    if not options.quick:
        save("data", found)


def write_corpus(file: Path, size: int) -> Path:
    """The standard library's sources, in documents of about 4 kB, as .jsonl and as .txt."""
    text = b"".join(one.path.read_bytes() for one in find_files(None)).decode("utf-8", "replace")
    written, place, random = 0, 0, np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out, file.with_suffix(".txt").open("w") as plain:
        while written < size:
            length = int(random.exponential(4000)) + 50
            part = text[place : place + length]
            place = (place + length) % (len(text) - 50_000)
            out.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
            plain.write(part)
            written += len(part)
    return file


def train_tokenizer(folder: Path, corpus: Path) -> Path:
    """A byte-level BPE of 8,192 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    with corpus.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(2000), lines, strict=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def measure(folder: Path, tokenizer: Path, repeats: int) -> dict[str, Any]:
    """Medians of runs taken in turn."""
    size, memory = (folder / "corpus.jsonl").stat().st_size / 1e6, 0.0
    alone, ours, rows, plain = (Rates(size) for _ in range(4))
    for number in range(repeats):
        alone.add(*encode_alone(folder / "corpus.jsonl", tokenizer))
        *taken, held = encode(folder, f"tokens-{number}", "--tokenizer", str(tokenizer))
        ours.add(*taken)
        memory = max(memory, held)
        *taken, held = encode(folder, f"rows-{number}")
        rows.add(*taken)
        memory = max(memory, held)
        *taken, held = encode(folder, f"plain-{number}", source="corpus.txt")
        plain.add(*taken)
        memory = max(memory, held)
    tokens = read_own(folder / "tokens-0" / "train")
    begun = time.perf_counter()
    packed = packed_rows(tokens, 2048, long="split")
    return {
        "encode_batch_alone": alone.medians(),
        "launch_encode": ours.medians(),
        "launch_encode_of_encode_batch": ours.of(alone),
        "bytes_of_jsonl": rows.medians(),
        "bytes_of_text": plain.medians(),
        "memory_mb": memory,
        "packing_seconds": time.perf_counter() - begun,
        "packed_documents": len(tokens.ends),
        "padding_of_rows_of_2048": packed.padding(2048),
    }


def encode_alone(corpus: Path, tokenizer: Path) -> tuple[float, float]:
    """(seconds, of the processor) in `encode_batch`, of batches of 256 documents in memory."""
    from tokenizers import Tokenizer

    library, seconds, computed = Tokenizer.from_file(str(tokenizer)), 0.0, 0.0
    with corpus.open(encoding="utf-8") as lines:
        while texts := [json.loads(line)["text"] for line in itertools.islice(lines, 256)]:
            begun = time.perf_counter(), time.process_time()
            library.encode_batch(texts)
            seconds += time.perf_counter() - begun[0]
            computed += time.process_time() - begun[1]
    return seconds, computed


def encode(folder: Path, name: str, *options: str, source: str = "corpus.jsonl") -> list[float]:
    """[seconds, of the processor, largest memory in MB] of launch.encode; imports are not timed."""
    words = [str(folder / source), "--output", str(folder / name), *options]
    done = subprocess.run(
        [sys.executable, "-c", _ENCODE, *words], check=True, capture_output=True, text=True
    )
    return [float(number) for number in done.stderr.splitlines()[-1].split()]


if __name__ == "__main__":
    main()
