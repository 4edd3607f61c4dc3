"""A file of prompts, continued together; a line of JSON for each as it ends, resumable."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptive.models.decoder.continuous import generate_all
from adaptive.models.decoder.generate import Sampling, check_prompts
from launch.checkpoint.models import SavedDecoder
from launch.data.prompts import first_tokens
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput
from launch.run.options import check_counts

_OPTIONS = ("max_tokens", "ignore_end", "temperature", "top_k", "top_p", "seed", "calibrate")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this file."""
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='continue every prompt of a file: .jsonl with {"prompt": …}, or a prompt a line',
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of --prompts: a line of JSON for each as it ends; one that exists is gone on with",
    )
    group.add_argument("--batch-size", type=int, default=16, help="prompts in one pass at most")


def wanted(options: argparse.Namespace) -> bool:
    """Whether a file of prompts is given.

    Raises:
        BadInput: without a file to write, or with options for one prompt.
    """
    if (options.prompts is None) != (options.output is None):
        raise BadInput("--prompts and --output: give both or neither")
    if options.prompts is None:
        return False
    check_counts(options, "batch_size")
    for name in ("show_routing", "allow_non_causal", "draft", "skip_decode"):
        if getattr(options, name):
            raise BadInput(f"--{name.replace('_', '-')}: cannot be combined with --prompts")
    return True


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order.

    Raises:
        BadInput: it cannot be read, or a line is none.
    """
    try:
        # Not splitlines(): texts may hold what else ends lines.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompts={path}: {error}") from None
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str):
            raise BadInput(f'{path}:{number}: must be an object with a text "prompt"')
        prompts.append(prompt)
    return prompts


def write_all(
    options: argparse.Namespace, saved: SavedDecoder, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    """Continue the prompts that the output does not hold yet; a summary to standard error."""
    prompts = read_prompts(options.prompts)
    data = saved.config.data
    ids = {}
    for index, prompt in enumerate(prompts):
        where = f"{options.prompts}:{index + 1}"
        ids[index] = first_tokens(data, tokenizer, prompt.encode(), where=where)
        try:
            check_prompts(saved.model, [ids[index]])
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
    settings = {name: getattr(options, name) for name in _OPTIONS}
    mark = _mark({"checkpoint": str(options.checkpoint), **settings})
    begun, drawn = time.perf_counter(), 0
    with options.output.open("a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"--output={options.output}: another process writes it") from None
        done = _finished(out, options.output, prompts, mark)
        waiting = [(index, tokens) for index, tokens in ids.items() if index not in done]
        for made in generate_all(
            saved.model,
            waiting,
            max_new_tokens=options.max_tokens,
            batch_size=options.batch_size,
            sampling=sampling,
            seed=options.seed,
            vocab_size=tokenizer.vocab_size,
            end=None if options.ignore_end else tokenizer.end,
        ):
            drawn += len(made.tokens)
            line = {
                "index": made.key,
                "prompt": prompts[made.key],
                "text": tokenizer.decode(made.tokens[:-1] if made.ended else made.tokens),
                "tokens": len(made.tokens),
                "ended": made.ended,
                "settings": mark,
            }
            # One write: who is killed leaves a whole line, or one that the next start cuts off.
            out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            out.flush()
    seconds = time.perf_counter() - begun
    held = f", {len(done)} were there" if done else ""
    print(
        f"{len(waiting)} prompts, {drawn} tokens in {seconds:.1f} s, "
        f"{drawn / seconds:.0f} tokens/s{held}",
        file=sys.stderr,
    )


def _finished(out: Any, path: Path, prompts: list[str], mark: str) -> set[int]:
    """Indices of the prompts whose lines are whole; what a killed writer left behind is cut off."""
    out.seek(0)
    content: bytes = out.read()
    whole = content.rfind(b"\n") + 1
    done = set()
    for number, raw in enumerate(content[:whole].splitlines(), 1):
        try:
            line = json.loads(raw)
            index, prompt, settings = line["index"], line["prompt"], line["settings"]
            same = prompts[index] == prompt
        except (ValueError, TypeError, KeyError, IndexError):
            same, settings = False, mark
        if not same:
            raise BadInput(
                f"--output={path}: line {number} is not of these prompts; give a new file"
            )
        if settings != mark:
            raise BadInput(f"--output={path}: was written with other options; give a new file")
        done.add(index)
    if whole < len(content):
        out.truncate(whole)
        os.fsync(out.fileno())
    out.seek(0, os.SEEK_END)
    return done


def _mark(settings: Mapping[str, Any]) -> str:
    """What a line was drawn with, in short."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
