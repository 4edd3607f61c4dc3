"""The model `adaptive` of lm-evaluation-harness: scores of its class `hf`, on a task of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.convert import main as convert
from tests.launch.test_generate import checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install '.[eval]'")

CHOICE = """
task: our_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
task: our_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """
task: our_until
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = {"our_choice": CHOICE, "our_rolling": ROLLING, "our_until": UNTIL}
ROWS = [
    {"question": "def f(x): ", "choices": ["return x", "z"], "answer": 0, "text": "Grüße " * 20},
    {"question": "a", "choices": [" b", "cd", "é"], "answer": 1, "text": "short"},
    {"question": "q" * 90, "choices": ["w", "q"], "answer": 1, "text": "x = 1\n"},
]


def scores(model: str, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from lm_eval.tasks import TaskManager

    import adaptive.hub  # noqa: F401  (the class `hf` reads models that route, too)
    import launch.evaluation.harness  # noqa: F401

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(path), "max_length": 64},
        tasks=list(TASKS),
        task_manager=manager,
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )


def answers(found: Any) -> list[Any]:
    return [
        sample["resps"]
        for task in TASKS
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    ]


def test_scores_are_those_of_the_harness_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = checkpoint(tmp_path / "run"), tmp_path / "out"
    convert(["to_transformers", str(run), "--output", str(out)])
    ours = scores("adaptive", run, tmp_path, monkeypatch)
    theirs = scores("hf", out, tmp_path, monkeypatch)
    for mine, other in zip(answers(ours), answers(theirs), strict=True):
        for one, expected in zip(_flat(mine), _flat(other), strict=True):
            close = isinstance(expected, float)
            assert one == (pytest.approx(expected, rel=1e-4) if close else expected)
    for task in TASKS:
        assert 0 < ours["config"]["operations"][task]["share_of_dense"] < 1


def _flat(answer: Any) -> list[Any]:
    if isinstance(answer, list | tuple):
        return [leaf for part in answer for leaf in _flat(part)]
    return [answer]
