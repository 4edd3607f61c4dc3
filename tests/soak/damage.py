"""Checkpoints that were damaged: each is passed over for the next older one, in one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from launch.checkpoint.files import read_state
from launch.run.config import from_mapping, load_saved
from launch.run.errors import BadInput
from launch.run.preflight import check_continues, starting_checkpoint
from parallel.checkpoint import MANIFEST
from tests.soak.interruptions import configuration
from tests.soak.record import LOST, SURVIVED, Record, Try

CONTENTS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"a"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"files": null, "step": 72}',
    b'{"files": {}, "step": 72}',
    b'{"files": [], "step": 72}',
    b'{"files": {"state.json": 3}, "step": 72}',
    b'{"files": {"state.json": {"bytes": "1", "sha256": 3}}, "step": 72}',
    b'{"files": {"../../text.py": {}}}',
    b'{"files": {}, "step": "' + b"9" * 5000 + b'"}',
    b'{"files": {}, "step": 1e400}',
)


def damage_one(number: int, *, folder: Path, record: Record, seed: int) -> None:
    """Damage the newest checkpoint of the undisturbed run, and see what a run would start from."""
    chance = random.Random(f"{seed} damage {number}")
    kind, deed = list(DEEDS.items())[number % len(DEEDS)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as at:
        output = Path(at) / "run"
        shutil.copytree(folder / "undisturbed" / "checkpoints", output / "checkpoints")
        newest = max((output / "checkpoints").glob("step-*"))
        older = sorted((output / "checkpoints").glob("step-*"))[-2]
        before = _content(newest)
        said = deed(newest, chance)
        after = _content(newest)
        tree = {**configuration(folder, "undisturbed"), "output": str(output)}
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                config = from_mapping(tree)
                found = starting_checkpoint(config)
                if found is not None:
                    check_continues(config, found)
                    read_state(found), load_saved(found)
        except BadInput as error:
            verdict, said = LOST, f"{said}: refused: {str(error)[:200]}"
        except BaseException as error:
            verdict, said = LOST, f"{said}: {type(error).__name__}: {str(error)[:200]}"
        else:
            verdict = SURVIVED
            name = None if found is None else found.name
            if found == newest and before != after:
                verdict, said = LOST, f"{said}: taken for intact"
            elif found not in (newest, older):
                verdict, said = LOST, f"{said}: {name} is what is left"
            elif found == older and not caught:
                verdict, said = LOST, f"{said}: passed over without a word"
            else:
                said = f"{said}: {name}"
    record.add(Try("checkpoints", kind, number, verdict, said, round(time.monotonic() - begun, 2)))


def _content(folder: Path) -> dict[str, str]:
    """What a checkpoint holds; its manifest only as far as it means something."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _some_file(folder: Path, chance: random.Random) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return chance.choice(files)


def _flip(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = chance.randrange(len(content)), chance.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} bit {bit} of byte {at}"


def _flip_file(folder: Path, chance: random.Random) -> str:
    return _flip(_some_file(folder, chance), chance)


def _flip_manifest(folder: Path, chance: random.Random) -> str:
    return _flip(folder / MANIFEST, chance)


def _truncate(folder: Path, chance: random.Random) -> str:
    path = _some_file(folder, chance)
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def _remove(folder: Path, chance: random.Random) -> str:
    path = chance.choice([_some_file(folder, chance), folder / MANIFEST])
    path.unlink()
    return f"{path.name} removed"


def _write_manifest(folder: Path, chance: random.Random) -> str:
    content = chance.choice(CONTENTS)
    (folder / MANIFEST).write_bytes(content)
    return f"manifest {content[:40]!r}"


def _consistent(folder: Path, name: str, content: bytes) -> str:
    """Write a file, and a manifest that it agrees with: a checksum does not make it readable."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return f"{name} {content[:40]!r}, manifest fits"


def _later_state(folder: Path, chance: random.Random) -> str:
    state = json.loads((folder / "state.json").read_text())
    changed = chance.choice(
        [
            {**state, "of_a_later_version": 1},
            {**state, "rows": -1},
            {**state, "step": "x"},
            {"step": state["step"]},
            [],
            None,
        ]
    )
    return _consistent(folder, "state.json", json.dumps(changed).encode())


def _bad_weights(folder: Path, chance: random.Random) -> str:
    content = bytearray((folder / "model.safetensors").read_bytes())
    for _ in range(8):
        content[chance.randrange(64)] ^= 1 << chance.randrange(8)
    return _consistent(folder, "model.safetensors", bytes(content))


DEEDS: dict[str, Callable[[Path, random.Random], str]] = {
    "one bit of a file": _flip_file,
    "one bit of the manifest": _flip_manifest,
    "a file cut short": _truncate,
    "a file removed": _remove,
    "another manifest": _write_manifest,
    "another state, manifest fits": _later_state,
    "a broken header of weights, manifest fits": _bad_weights,
}
