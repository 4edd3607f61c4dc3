"""Sources by their weights: at every row, across interruptions and changes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checkpoint.files import find_checkpoint
from launch.data.mixture import Mixture
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.training import run
from tests.distributed.runs import tiny_config
from tests.ranks import run_ranks


@settings(max_examples=30)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=6))
def test_shares_are_within_one_row_of_the_weights_at_every_row(weights: list[float]) -> None:
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)})
    shares = [weight / sum(weights) for weight in weights]
    counts = [0] * len(weights)
    for row in range(300):
        source, index = mixture.locate(row)
        assert index == counts[source]  # each of a source's rows once, in its order
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - share * (row + 1)) < 1


def test_three_sources_over_a_thousand_rows_and_a_kill_in_between() -> None:
    weights = {"web": 0.7, "code": 0.2, "books": 0.1}
    whole = [Mixture(weights).locate(row) for row in range(1000)]
    assert Counter(source for source, _ in whole) == {0: 700, 1: 200, 2: 100}
    # What a checkpoint at row 437 keeps is enough, in another process too.
    resumed, said = Mixture(weights).resumed(Mixture(weights).state(437))
    assert said is None
    assert [resumed.locate(row) for row in range(437, 1000)] == whole[437:]
    # A million rows further it needs none of those before.
    far = Mixture(weights).state(1_000_000)
    assert far["mixture/web"].tolist() == [0, 700_000]


def test_a_new_source_and_a_new_weight_go_on_from_what_each_has_given() -> None:
    state = Mixture({"web": 0.7, "code": 0.3}).state(500)
    weights = {"web": 0.2, "code": 0.3, "books": 0.5}
    changed, said = Mixture(weights).resumed(state)
    assert said is not None
    assert "from row 500 on" in said
    assert "books 0 -> 0.5, web 0.7 -> 0.2" in said
    rows = [changed.locate(row) for row in range(500, 600)]
    assert Counter(source for source, _ in rows) == {0: 20, 1: 30, 2: 50}
    for source, given_ in enumerate((350, 150, 0)):
        own = [index for number, index in rows if number == source]
        assert own == list(range(given_, given_ + len(own)))
    # And a source that is away for a while is not begun anew.
    without, _ = Mixture({"web": 1.0, "books": 1.0}).resumed(changed.state(600))
    again, _ = Mixture(weights).resumed(without.state(700))
    code = [index for source, index in map(again.locate, range(700, 710)) if source == 1]
    assert code[0] == 180


def run_one(tree: dict[str, Any]) -> None:
    run(from_mapping(tree))


def test_a_run_of_several_sources_goes_on_and_measures_each(tmp_path: Path) -> None:
    """Interrupted or not, the same losses; a loss of every source, in training and held out."""
    for name, text in (("a", "one of the first "), ("b", "another sort of text "), ("c", "0123 ")):
        (tmp_path / f"{name}.txt").write_text(text * 300)
    sources = [
        {"path": str(tmp_path / "a.txt"), "weight": 0.7},
        {"path": str(tmp_path / "b.txt"), "weight": 0.2, "name": "other"},
        {"path": str(tmp_path / "c.txt"), "weight": 0.1},
    ]
    data = {"path": None, "sources": sources, "validation_fraction": 0.2, "seq_len": 32}
    losses = {}
    order = Mixture({"a.txt": 0.7, "other": 0.2, "c.txt": 0.1})
    for name, halves in (("whole", (6,)), ("halves", (3, 6))):
        for steps in halves:
            tree = tiny_config(tmp_path, data=data, output=str(tmp_path / name))
            tree["monitor"]["every"] = 1
            tree["train"] |= {"steps": 6, "evaluate_every": 3}
            tree["checkpoint"] = {"every": 3}
            if steps == 3:
                tree["train"] |= {"steps": 3}
            else:
                tree["train"] |= {"micro_batch_size": 2}
            run_ranks(run_one, 2 if name == "whole" else 1, tree, timeout=120)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses[name] = [r["loss/train"] for r in records if "loss/train" in r]
        for record in (r for r in records if "loss/train" in r):
            # Rows are of one length: the loss is the mean of the sources' by the rows of each.
            rows = range(8 * record["step"] - 8, 8 * record["step"])
            given = Counter(order.names[order.locate(row)[0]] for row in rows)
            found = {key.removeprefix("loss/train/"): v for key, v in record.items()}
            found = {source: v for source, v in found.items() if source in order.names}
            assert found.keys() == given.keys()
            mean = sum(found[source] * count for source, count in given.items()) / 8
            assert mean == pytest.approx(record["loss/train"], rel=1e-6)
        for source in ("a.txt", "other", "c.txt"):
            assert any(f"validation/loss/{source}" in record for record in records)
        assert all(0 <= r["data/waiting"] < 1 for r in records if "data/waiting" in r)
        assert any("data/waiting" in record for record in records)
    # The schedule of the learning rate differs in the first half: only the rows are compared there.
    assert len(losses["whole"]) == len(losses["halves"]) == 6
    from safetensors.torch import load_file

    states = [
        load_file(find_checkpoint(tmp_path / name) / "task.safetensors")
        for name in ("whole", "halves")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # 48 rows: .7, .2 and .1 of them.
    assert states[0]["mixture/a.txt"][1] in (33, 34)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {"path": "a", "sources": [{"path": "b"}]},
            "data.path=a: must be null beside data.sources",
        ),
        (
            {"sources": [{"path": "x/a"}, {"path": "y/a"}]},
            "data.sources: two are called a: give them a name each",
        ),
        (
            {"sources": [{"path": "a", "weight": 0}]},
            "data.sources[0].weight=0: must be above 0",
        ),
        ({"sources": [{"weight": 1}]}, "data.sources[0].path: required"),
        (
            {"conversations": True},
            "data.packing=windows: must be documents with data.conversations",
        ),
    ],
)
def test_sections_that_contradict_themselves_are_refused(data: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput) as error:
        from_mapping({"data": data})
    assert line.split(":")[0].split("=")[0] in str(error.value)
    assert line.split(": ", 1)[1] in str(error.value)
