"""Every command of docs/data.md, on files as it names them."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.encode import main as encode
from launch.run.config import load_config
from launch.run.preflight import check_run
from tests.launch.test_data_conversations import CHAT_ML, chat_tokenizer
from tests.launch.test_data_encoding import megatron_builder

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=2",
    "train.batch_size=4",
    "train.calibrate_rows=0",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "data.validation_rows=4",
]


def commands() -> list[list[str]]:
    """The words of each command of the page, in its order; without those that are only named."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    start = r"(?:recipes/\w+\.sh|python -m launch\.\w+)"
    found = re.findall(rf"(?:^    |\| `)({start}[^`\n]*)", page, re.MULTILINE)
    return [shlex.split(command) for command in found]


def overrides(words: list[str]) -> list[str]:
    """A command's own settings, and those that make its run short."""
    return [*words[1:], *SMALL]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page speaks of, 200 short documents in each form."""
    arrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    home = tmp_path_factory.mktemp("home")
    for name in ("texts/deep", "code", "parquet", "tok"):
        (home / name).mkdir(parents=True)
    texts = [f"# Page {n}\nIt says {n * 7919 % 1000} things. " * 9 for n in range(200)]
    for number, text in enumerate(texts[:40]):
        (home / "texts" / "deep" / f"{number}.md").write_text(text)
        (home / "code" / f"{number}.py").write_text(text)
    (home / "corpus.txt").write_text("".join(texts))
    (home / "corpus.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
    rows = "".join(json.dumps({"content": text, "text": text}) + "\n" for text in texts)
    (home / "web.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    for file, name in (("parquet/a.parquet", "text"), ("books.parquet", "body")):
        parquet.write_table(arrow.table({name: texts}), home / file)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(home / "saved" / "train")
    chat_tokenizer(home / "tok", CHAT_ML)
    ids = [[*text.encode(), 256] for text in texts]
    megatron_builder(home / "web_text_document", np.uint16, ids)
    np.save(home / "ids.npy", np.concatenate(ids).astype(np.uint16))
    chats = [{"prompt": f"{n} plus {n}?", "response": str(2 * n)} for n in range(200)]
    (home / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return home


def test_every_format_has_a_command() -> None:
    words = [" ".join(command) for command in commands()]
    for said in (".zst", "parquet/", "saved/train", ".bin", ".npy", "chat.jsonl", "data.sources="):
        assert any(said in command for command in words), said
    assert len(words) >= 13


def test_every_command_of_the_page_could_begin(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, data and model of each, as `launch.start` checks them before ranks start."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    for number, words in enumerate(commands()):
        if words[2:3] == ["launch.encode"]:
            encode(words[3:])
        elif words[0].endswith(".sh"):
            recipe = ROOT / words[0].replace(".sh", ".yaml")
            # There are no weights yet to begin with.
            own = [word for word in overrides(words) if not word.startswith("checkpoint.weights=")]
            if len(words) > 1:  # the default text is that of the recipes' own test
                check_run(load_config(recipe, [*own, f"output=checked/{number}"]), ranks=2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_of_the_page_trains(home: Path) -> None:
    """As printed, in order; of each recipe the first writes where the page says that it does."""
    environment = {**os.environ, "HOME": str(home), "PYTHON": sys.executable}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begun: set[str] = set()
    for number, words in enumerate(commands()):
        own = words
        if words[0].endswith(".sh"):
            elsewhere = [f"output=runs/{number}"] if words[0] in begun else []
            begun.add(words[0])
            own = [str(ROOT / words[0]), *overrides(words), *elsewhere]
        elif words[0] == "python":
            own = [sys.executable, *words[1:]]
        done = subprocess.run(own, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
        if words[0].endswith(".sh"):
            assert "step 2/2" in done.stdout, done.stdout
