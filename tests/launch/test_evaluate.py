"""`launch.evaluate`: losses and bits a byte against sums over each document, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.flops import nominal_flops
from adaptive.models import Decoder
from launch.checkpoint.models import load_decoder
from launch.convert import main as convert
from launch.data.tokenizer import Tokenizer
from launch.evaluate import main
from launch.evaluation.scoring import before_text, windows_of
from tests.adaptive.models.test_transformers_weights import random_model
from tests.launch.test_generate import checkpoint

TEXTS = ["def f(x):\n", "Grüße 日本 " * 2, "a", "z" * 18]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data" / "texts.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    return file


def evaluated(folder: Path, tmp_path: Path, *words: object) -> dict[str, Any]:
    out = tmp_path / "out.json"
    main([str(word) for word in (folder, *words, "--output", out)])
    return json.loads(out.read_text())


@torch.no_grad()
def written_out(model: Any, *, context: int, stride: int) -> tuple[float, int, int]:
    """(nats, tokens, bytes) in float64, every token by a forward of its own."""
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [0, *text.encode()]
        for target in range(1, len(ids)):
            later = max(0, math.ceil((target - context) / stride))
            end = min(context + later * stride, len(ids) - 1)
            start = max(0, end - context)
            logits = model(torch.tensor([ids[start:target]]))
            logits = getattr(logits, "logits", logits)[0, -1].double()
            nats += float(logits.logsumexp(0) - logits[ids[target]])
            tokens += 1
    return nats, tokens, sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("context", "stride"), [(64, 32), (8, 3)])
def test_a_runs_loss_is_the_sum_over_each_document_alone(
    context: int, stride: int, tmp_path: Path, data: Path
) -> None:
    run = checkpoint(tmp_path / "run")
    nats, tokens, size = written_out(load_decoder(run).model, context=context, stride=stride)
    found = []
    for batch in (1, 3):
        words = ("--context", context, "--stride", stride, "--batch-size", batch)
        (one,) = evaluated(run, tmp_path, "--data", data, *words)["sources"]
        found.append(one)
        assert (one["documents"], one["tokens"], one["bytes"]) == (4, tokens, size)
        assert one["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert one["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
        assert one["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert 0 < one["share_of_dense"] < 1
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert found[0]["operations_per_token"] == pytest.approx(found[1]["operations_per_token"])


def test_operations_of_a_dense_model_are_those_of_its_windows(tmp_path: Path, data: Path) -> None:
    run = checkpoint(tmp_path / "run", capacity=1.0)
    (one,) = evaluated(run, tmp_path, "--data", data, "--documents", 1)["sources"]
    model = load_decoder(run).model
    assert isinstance(model, Decoder)
    assert one["operations_per_token"] * one["tokens"] == nominal_flops(model, 1, one["tokens"])
    assert one["share_of_dense"] == 1


def test_a_folder_of_transformers_and_its_run_agree(tmp_path: Path, data: Path) -> None:
    run = checkpoint(tmp_path / "run", predictor="mlp")
    convert(["to_transformers", str(run), "--output", str(tmp_path / "out")])
    ours = evaluated(run, tmp_path, "--data", data)["sources"][0]
    theirs = evaluated(tmp_path / "out", tmp_path, "--data", data)["sources"][0]
    for name in ("tokens", "bytes", "loss", "operations_per_token", "share_of_dense"):
        assert theirs[name] == ours[name], name


def test_families_that_a_decoder_cannot_be_are_read_by_the_hub(tmp_path: Path, data: Path) -> None:
    from adaptive.hub import adapt

    model = random_model("Gemma", {"vocab_size": 256, "head_dim": 8})
    adapt(model, "mixture_of_depths", layers=[1], capacity=0.5)
    convert(
        ["to_transformers", str(checkpoint(tmp_path / "run")), "--output", str(tmp_path / "out")]
    )
    for file in (tmp_path / "out").glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    model.save_pretrained(tmp_path / "gemma")
    for file in tmp_path.glob("tokenizer*"):
        file.rename(tmp_path / "gemma" / file.name)
    nats, tokens, _ = written_out(model.eval(), context=16, stride=8)
    words = ("--context", 16, "--stride", 8, "--batch-size", 3)
    (one,) = evaluated(tmp_path / "gemma", tmp_path, "--data", data, *words)["sources"]
    assert one["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert 0.5 < one["share_of_dense"] < 1


def test_token_files_are_measured_by_the_bytes_they_decode_to(tmp_path: Path, data: Path) -> None:
    import numpy as np

    run = checkpoint(tmp_path / "run")
    ids = np.concatenate([[*text.encode(), 0] for text in TEXTS]).astype(np.uint8)
    np.save(tmp_path / "ids.npy", ids)
    both = evaluated(run, tmp_path, "--data", tmp_path / "ids.npy", "--data", data)["sources"]
    assert both[0] == {**both[1], "data": both[0]["data"]} | {
        "tokens_per_second": both[0]["tokens_per_second"]
    }


def test_every_token_is_scored_once_whatever_the_windows() -> None:
    for length in range(12):
        for context in range(1, 6):
            for stride in range(1, context + 1):
                found: list[int] = []
                for window in windows_of(range(1, length + 1), 0, context=context, stride=stride):
                    assert len(window.ids) <= context + 1
                    found += window.ids[len(window.ids) - window.scored :]
                assert found == list(range(1, length + 1))
    assert [w.ids for w in windows_of([5, 6], None, context=4, stride=2)] == [[5, 6]]
    assert before_text([5], Tokenizer("bytes")) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "NOWHERE"], "no such file"),
        (["--data", "EMPTY"], "holds no token to score"),
        (["--data", "DATA", "--context", "65"], "--context=65: must be at most 64"),
        (["--data", "DATA", "--context", "8", "--stride", "9"], "--stride=9: must be at most"),
        (["--data", "DATA", "--text-field", "body"], ":1: must have a string `body`"),
        (["--data", "DATA", "--documents", "0"], "--documents=0: must be at least 1"),
        ([], "the following arguments are required: --data"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY.txt").write_text("")
    files = {"DATA": data, "EMPTY": tmp_path / "EMPTY.txt", "NOWHERE": tmp_path / "no"}
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint(tmp_path / "run")), *(str(files.get(w, w)) for w in words)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
