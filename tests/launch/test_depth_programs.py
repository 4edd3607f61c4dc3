"""The oracle and the conversion to rows of learners, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.models import Decoder
from launch import convert, oracle
from launch.checkpoint.files import (
    load_model,
    named_tensors,
    read_state,
    save_tensors,
    write_description,
)
from launch.checkpoint.state import RunState
from launch.run.config import from_mapping
from launch.run.preflight import check_run
from parallel.checkpoint import save_atomically


def run_folder(root: Path, *, data: Any = None, **routing: Any) -> Path:
    """A run's folder with one checkpoint of an untrained model, on a text of its own."""
    torch.manual_seed(0)
    text = root / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n" * 200)
    model = {"dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "max_seq_len": 64}
    config = from_mapping(
        {
            "task": "language_model",
            "model": {**model, **routing},
            "data": {
                "seq_len": 16,
                "path": str(text),
                "cache": str(root / "cache"),
                **(data or {}),
            },
        }
    )
    decoder = Decoder(config.model)

    def write(at: Path) -> None:
        save_tensors(named_tensors(decoder), at / "model.safetensors")
        write_description(at, RunState(step=1), config)

    save_atomically(root / "run" / "checkpoints", 1, write, keep=1)
    return root / "run"


def refusal(capsys: pytest.CaptureFixture[str], program: Any, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        program.main([str(word) for word in words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_oracle_reports_the_best_path_of_every_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path, sized_feed_forward={"budget": 0.5})
    report = tmp_path / "report.json"
    words = [folder, "--budgets", 0.0, 0.5, "--tokens", 3, "--output", report]
    oracle.main([str(word) for word in words])
    out = capsys.readouterr().out
    assert "3 tokens, 27 (token, path) pairs computed" in out
    assert "oracle <= 0.5" in out
    found = json.loads(report.read_text())
    assert len(found["best"]["0.5"]) == 3
    assert all(best["path"] == [0, 0] for best in found["best"]["0"])
    assert "--row=99999" in refusal(capsys, oracle, folder, "--row", 99999)
    assert "budget=2.0: must be in [0, 1]" in refusal(capsys, oracle, folder, "--budgets", 2)


def test_of_packed_rows_the_oracle_searches_one_document_for_what_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "what?" * (n % 3), "response": "so" * (1 + n % 4)} for n in range(60)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = {"path": str(chat), "packing": "documents", "conversations": True, "seq_len": 64}
    folder = run_folder(tmp_path, data=packed, sized_feed_forward={"budget": 0.5})
    report = tmp_path / "report.json"
    words = [folder, "--budgets", 0.5, "--tokens", 3, "--output", report]
    oracle.main([str(word) for word in words])
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 0, 7, 8, 9, 0]]),
        "targets": torch.tensor([[-1, 6, 1, -1, 8, 9, 4, -1]]),
        "documents": torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]]),
    }
    ids, positions = oracle.text_of(batch)
    assert (ids.tolist(), positions) == ([0, 7, 8, 9, 4], [1, 2, 3])
    batch["targets"][0, 6] = -1
    batch["targets"][0, 1:3] = -1
    ids, positions = oracle.text_of(batch)
    assert (ids.tolist(), positions) == ([0, 7, 8, 9], [1, 2])
    found = json.loads(report.read_text())
    assert found["positions"] == list(range(found["positions"][-1] - 2, found["positions"][-1] + 1))
    # Nor does a conversion learn from packed ids as if they were plain text.
    words = ["acm", folder, "--output", tmp_path / "converted", "--distil-steps", "1"]
    capsys.readouterr()
    assert "data.packing=documents: must be windows" in refusal(capsys, convert, *words)


def test_conversion_is_the_beginning_of_a_run_and_keeps_the_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path)
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    steps = ["--distil-steps", "2", "--gate-steps", "2", "--batch-size", "2", "--rows", "2"]
    convert.main(["acm", str(folder), "--output", str(tuned), "--learners", "2", *steps])
    told = [line.split() for line in capsys.readouterr().out.splitlines() if " loss " in line]
    losses = {" ".join(words[: words.index("loss")]): words[-1] for words in told[:-1]}
    assert losses["converted, 2 of 2 learners"] == losses["teacher"]
    model, config = load_model(tuned)
    assert config.model.adaptive_computation.num_learners == 2
    assert sum(p.numel() for n, p in model.named_parameters() if "learners" in n) == 2 * 3 * 16 * 32
    assert read_state(tuned / "checkpoints" / "step-00000000").step == 0
    check_run(config, ranks=1)
    # Made again, its gates begin with the same numbers: torch's own seed is another each time.
    torch.manual_seed(1234)
    convert.main(["acm", str(folder), "--output", str(again), "--learners", "2", *steps])
    for name, value in load_model(again)[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    line = refusal(capsys, convert, "acm", folder, "--output", tuned)
    assert "already holds checkpoints" in line
    line = refusal(capsys, convert, "acm", folder, "--output", tmp_path / "x", "--learners", 5)
    assert "num_learners=5: must divide ffn_dim=32" in line


def test_a_second_size_is_the_beginning_of_a_run_and_keeps_the_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, duo = run_folder(tmp_path), tmp_path / "duo"
    convert.main(["duo", str(folder), "--output", str(duo), "--rows", "2", "--random-steps", "9"])
    told = [
        line.split(" loss ") for line in capsys.readouterr().out.splitlines() if " loss " in line
    ]
    losses = {name.strip(): loss for name, loss in told}
    assert losses["every token big"] == losses["source"]
    assert len(set(losses.values())) == 3
    _, config = load_model(duo)
    assert config.model.sized_feed_forward.random_steps == 9
    assert config.train.move_within == 11
    check_run(config, ranks=1)
    line = refusal(capsys, convert, "duo", folder, "--output", tmp_path / "x", "--budget", 2)
    assert "budget=2.0: must be in (0, 1]" in line


@pytest.mark.parametrize("method", ["acm", "duo"])
def test_a_model_with_tied_embeddings_is_converted(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint holds tied weights once; twice, safetensors refuses them after all the work."""
    folder, converted = run_folder(tmp_path, tie_embeddings=True), tmp_path / "converted"
    steps = ["--distil-steps", "1", "--gate-steps", "1"] if method == "acm" else []
    convert.main(
        [method, str(folder), "--output", str(converted), "--batch-size", "1", "--rows=1", *steps]
    )
    model, config = load_model(converted)
    assert model.output.weight is model.embedding.weight
    teacher, _ = load_model(folder)
    torch.testing.assert_close(model.embedding.weight, teacher.embedding.weight)
    check_run(config, ranks=1)


SIZES = ["--tokens", 8, "--ffn-tokens", 8]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("acm", ["RUN", "--output", "/proc/x"]),
        ("duo", ["RUN", "--output", "/proc/x"]),
        ("distillation", ["RUN", "--output", "/proc/x", *SIZES]),
        ("upcycling", ["RUN", "/proc/x"]),
        ("tokenformer", ["load", "w", "--num-heads", 2, "--output", "/proc/x"]),
        ("tokenformer", ["save", "RUN", "/proc/x"]),
    ],
)
def test_an_output_that_cannot_be_written_is_said_before_the_work(
    method: str, words: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path)
    line = refusal(capsys, convert, method, *[folder if word == "RUN" else word for word in words])
    assert "=/proc/x: /proc cannot be written" in line


def test_what_cannot_be_converted_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sized").mkdir()
    folder, out = run_folder(tmp_path / "sized", sized_feed_forward={}), tmp_path / "out"
    line = refusal(capsys, convert, "distillation", folder, "--output", out, *SIZES)
    assert "model.sized_feed_forward and pattention: give one of them" in line
    dense = run_folder(tmp_path)
    line = refusal(
        capsys, convert, "distillation", dense, "--output", out, *SIZES, "--max_tokens", 3
    )
    assert line == "error: --max-tokens=3: 3 tokens: must be at least 5, a fifth is held out"
    (tmp_path / "routed").mkdir()
    routed = run_folder(tmp_path / "routed", mixture_of_depths={"capacity": 0.5})
    for method in ("acm", "duo"):
        line = refusal(capsys, convert, method, routed, "--output", out)
        assert "mixture_of_depths: must be null, a layer is judged by what every token" in line
    line = refusal(capsys, convert, "acm", folder, "--output", out, "--learning-rate", "nan")
    assert line == "error: --learning-rate=nan: must be a number above 0"
    assert not out.exists()


def test_recipes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="skip_layer"):
        from_mapping({"model": {"skip_layer": {"density": 2}}})
    with pytest.raises(ValueError, match="give one of them"):
        from_mapping({"model": {"skip_layer": {}, "mixture_of_depths": {}}})
