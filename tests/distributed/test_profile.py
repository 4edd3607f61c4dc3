"""`launch.profile` on two real ranks: what it prints sums to what the clock says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from launch.profile import main
from tests.distributed.runs import tiny_config, write_text


def test_a_profile_of_two_ranks_sums_to_the_clock(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path)
    tree = tiny_config(
        tmp_path,
        train={"micro_batch_size": 2},
        deepspeed={"zero_optimization": {"stage": 1}},
    )
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    folder = tmp_path / "profile"
    main(["--config", str(recipe), "--ranks", "2", "--steps", "3", "--out", str(folder)])
    said = capfd.readouterr().out
    found = json.loads((folder / "regions.json").read_text())
    regions = found["regions"]
    for name in ("router", "pack", "block", "combine", "attention", "ffn", "optimizer", "engine"):
        assert f"\n{name} " in said
    for name in ("data", "monitor", "communication", "gradients", "other"):
        assert f"\n{name} " in said
    # Two micro-batches of two layers, one of them routed.
    assert regions["attention"]["calls"] == 4
    assert regions["router"]["calls"] == regions["block"]["calls"] == 2
    assert regions["optimizer"]["backward"] == regions["data"]["backward"] == 0
    assert regions["attention"]["backward"] > 0
    whole = sum(row["forward"] + row["backward"] for row in regions.values())
    assert whole == pytest.approx(found["seconds_of_a_step"]["profiled"], rel=0.03)
    assert f"of {1e3 * found['seconds_of_a_step']['profiled']:.2f} by the clock" in said
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"adaptive/router", "adaptive/mixture_of_depths.1", "adaptive/data"} <= names
    assert (folder / "flame.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_wrong_number_of_steps_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["mod_lm", "--steps", "0"])
    assert capsys.readouterr().err == "error: --steps=0: must be at least 1\n"
