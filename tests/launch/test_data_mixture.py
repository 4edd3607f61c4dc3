"""Sources by their weights: at every row, across interruptions and changes."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adaptive.observe.metric_log import read_metrics
from adaptive.observe.sinks import shown_name
from launch.checkpoint.files import find_checkpoint, load_model
from launch.data.mixture import Mixture
from launch.data.text import Corpus
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.ranks import is_first
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


def test_what_a_checkpoint_keeps_of_three_sources_is_enough() -> None:
    weights = {"web": 0.7, "code": 0.2, "books": 0.1}
    mixture = Mixture(weights)
    whole = [mixture.locate(row) for row in range(1000)]
    assert Counter(source for source, _ in whole) == {0: 700, 1: 200, 2: 100}
    # What a checkpoint at row 437 keeps is enough, in another process too.
    resumed, said = Mixture(weights).resumed(Mixture(weights).state(437))
    assert said is None
    assert [resumed.locate(row) for row in range(437, 1000)] == whole[437:]
    far = Mixture(weights).state(100_000)
    assert far["mixture/web"].tolist() == [0, 70_000]


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


def run_and_return(tree: dict[str, Any], changed: dict[str, Any]) -> list[str]:
    """A run of 6 steps; from its step 3 again; from there with other data, and from their step 5.

    Returns:
        what each of the four printed.
    """
    folder, said = Path(tree["output"]).parent, []

    def go_on(of: str, name: str, *, step: int, data: dict[str, Any]) -> None:
        if is_first():
            if name != of:
                shutil.copytree(folder / of, folder / name)
            for later in range(step + 1, 7):
                forgotten = folder / name / "checkpoints" / f"step-{later:08}"
                shutil.rmtree(forgotten, ignore_errors=True)
        dist.barrier()
        own = {**tree, "output": str(folder / name), "data": {**tree["data"], **data}}
        with redirect_stdout(StringIO()) as printed:
            run(from_mapping(own))
        said.append(printed.getvalue())

    go_on("whole", "whole", step=0, data={})
    go_on("whole", "again", step=3, data={})
    go_on("whole", "begun", step=3, data=changed)
    go_on("begun", "resumed", step=5, data=changed)
    return said


def test_a_run_of_several_sources_goes_on_and_measures_each(tmp_path: Path) -> None:
    """Interrupted or not, the same losses, with sources and weights changed in between too."""
    for name, text in (("a", "one of the first "), ("b", "another sort of text "), ("c", "0123 ")):
        (tmp_path / f"{name}.txt").write_text(text * 300)
    sources = [
        {"path": str(tmp_path / "a.txt"), "weight": 0.7},
        {"path": str(tmp_path / "b.txt"), "weight": 0.2, "name": "other"},
        {"path": str(tmp_path / "c.txt"), "weight": 0.1},
    ]
    changed = [{**sources[0], "weight": 0.3}, *sources[1:]]
    changed.append({"path": str(tmp_path / "b.txt"), "weight": 0.4, "name": "new"})
    data = {"path": None, "sources": sources, "validation_fraction": 0.2, "seq_len": 32}
    tree = tiny_config(tmp_path, data=data, output=str(tmp_path / "whole"))
    tree["monitor"] = {"every": 1, "tensorboard": True}
    tree["train"] |= {"steps": 6, "evaluate_every": 3, "log_every": 1, "micro_batch_size": 2}
    tree["checkpoint"] = {"every": 1, "keep": 6}
    said = run_ranks(run_and_return, 2, tree, {"sources": changed}, timeout=120)[0]

    names = ("whole", "again", "begun", "resumed")
    records = {name: list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in names}
    losses = {
        name: {line["step"]: line["loss/train"] for line in lines if "loss/train" in line}
        for name, lines in records.items()
    }
    assert list(losses["whole"]) == [1, 2, 3, 4, 5, 6]
    assert losses["again"] == losses["whole"]
    change = "from row 24 on the sources' weights are others: a.txt 0.7 -> 0.3, new 0 -> 0.4\n"
    assert [change in printed for printed in said] == [False, False, True, False]
    assert losses["begun"] == losses["resumed"]
    assert losses["begun"][4] != losses["whole"][4]
    # Rows are of one length: the loss is the mean of the sources' by the rows of each.
    order = Mixture({"a.txt": 0.7, "other": 0.2, "c.txt": 0.1})
    for line in (line for line in records["whole"] if "loss/train" in line):
        rows = range(8 * line["step"] - 8, 8 * line["step"])
        counts = Counter(order.names[order.locate(row)[0]] for row in rows)
        own = {name: line[f"loss/train/{name}"] for name in counts}
        assert sum(key.startswith("loss/train/") for key in line) == len(own)
        mean = sum(own[name] * count for name, count in counts.items()) / 8
        assert mean == pytest.approx(line["loss/train"], rel=1e-6)
    # Of 24 rows .7, .2 and .1, then of 24 more .3, .2, .1 and .4.
    state = load_file(find_checkpoint(tmp_path / "resumed") / "task.safetensors")
    given = [int(state[f"mixture/{name}"][1]) for name in ("a.txt", "other", "c.txt", "new")]
    assert sum(given) == 48
    for count, share in zip(given, (24.0, 9.6, 4.8, 9.6), strict=True):
        assert abs(count - share) < 2  # within one, twice

    model, config = load_model(tmp_path / "whole")
    shown = EventAccumulator(str(tmp_path / "whole" / "tensorboard" / "whole")).Reload()
    for name, source in zip(config.data.names, Corpus(config.data).sources, strict=True):
        held_out = np.stack([source.validation_row(n) for n in range(source.held_out_rows)])
        rows_BS = torch.from_numpy(held_out)
        with torch.no_grad():
            logits = model(rows_BS[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows_BS[:, 1:].flatten())
        tag = f"validation/loss/{name}"
        written = {line["step"]: line[tag] for line in records["whole"] if tag in line}
        assert list(written) == [3, 6]
        assert written[6] == pytest.approx(float(loss), abs=1e-4)
        drawn = {event.step: event.value for event in shown.Scalars(shown_name(tag))}
        assert drawn == pytest.approx(written, rel=1e-6)
    assert any("validation/loss/new" in line for line in records["begun"])
    waiting = [line["data/waiting"] for line in records["whole"] if "data/waiting" in line]
    assert len(waiting) >= 5
    assert all(0 <= share < 1 for share in waiting)


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
