"""Conversations in packed documents: one curve, whatever splits them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.runs import Outcome, tiny_config, train_few
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of very different lengths: a mean of each rank's or micro-batch's mean is another."""
    folder = tmp_path_factory.mktemp("documents")
    rows = [
        {"prompt": f"{n} plus {n % 7}?", "response": str(n + n % 7) * (1 + n * n % 5)}
        for n in range(200)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "chat.jsonl"), "packing": "documents", "conversations": True}
    tree = tiny_config(folder, data={**data, "seq_len": 64, "validation_fraction": 0.2})
    tree["model"] |= {"max_seq_len": 64}
    return tree


@pytest.fixture(scope="module")
def reference(tree: dict[str, Any]) -> Outcome:
    return run_ranks(train_few, 1, tree, (0,), timeout=120)[0][0]


@pytest.mark.parametrize(
    ("ranks", "stage", "sections"),
    [
        (1, 0, {"train": {"micro_batch_size": 2}}),
        (2, 1, {"train": {"micro_batch_size": 2}}),
        (2, 0, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
        (2, 0, {"parallel": {"context": 2}}),
    ],
    ids=["accumulated", "data", "tensor and sequence", "context"],
)
def test_ranks_and_accumulation_give_one_curve(
    ranks: int, stage: int, sections: dict[str, Any], tree: dict[str, Any], reference: Outcome
) -> None:
    split = {k: {**tree.get(k, {}), **v} for k, v in sections.items()}
    outcome = run_ranks(train_few, ranks, {**tree, **split}, (stage,), timeout=150)[0][stage]
    assert outcome.losses == pytest.approx(reference.losses, abs=1e-5)
    assert outcome.validation == pytest.approx(reference.validation, abs=1e-5)
    assert outcome.norms == pytest.approx(reference.norms, rel=1e-4)
    assert outcome.state.tokens == reference.state.tokens < 3 * 8 * 64
    assert reference.losses[-1] < reference.losses[0]
    # Of 256 equally likely: the mean is over what is learnt, a third of the tokens.
    assert reference.losses[0] == pytest.approx(5.55, abs=0.2)
