"""TensorBoard of a real run, opened tab by tab in a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adaptive.observe.metric_log import read_metrics
from adaptive.observe.pictures import WIDTH
from tests.browser import CHROMIUM, DRIVER, browser, tensorboard
from tests.launch.test_monitoring import RECIPE

TABS = {
    "timeseries": "card-view",
    "scalars": "tf-scalar-card",
    "custom_scalars": "tf-custom-scalar-margin-chart-card",
    "images": "img",
    "distributions": "vz-distribution-chart",
    "histograms": "vz-histogram-timeseries",
    "text": "tf-text-loader",
    "hparams": "tf-hparams-table-view",
}
"""Each tab, and what it shows when it has anything to show."""


PICTURES = """return (async () => {
  const json = async path => (await fetch('data/plugin/images/' + path)).json();
  const found = [];
  for (const [run, tags] of Object.entries(await json('tags')))
    for (const tag of Object.keys(tags)) {
      const kept = await json('images?' + new URLSearchParams({run, tag, sample: 0}));
      const file = await fetch('data/plugin/images/individualImage?' + kept.at(-1).query);
      const {width} = await createImageBitmap(await file.blob());
      found.push([run, tag, width]);
    }
  return found;
})()"""
"""Run, name and width of every picture, as this browser decodes the last of each."""

TEXTS = """return (async () => {
  const json = async path => (await fetch('data/plugin/text/' + path)).json();
  const found = {};
  for (const [run, tags] of Object.entries(await json('tags')))
    for (const tag of tags)
      found[tag] = (await json('text?' + new URLSearchParams({run, tag}))).at(-1).text;
  return found;
})()"""
"""The last of every text."""

TRIALS = """return (async () => {
  const asked = {experimentName: '', allowedStatuses: ['STATUS_SUCCESS'], colParams: [],
    startIndex: 0, sliceSize: 10};
  const answer = await fetch('data/plugin/hparams/session_groups', {method: 'POST',
    headers: {'Content-Type': 'application/json'}, body: JSON.stringify(asked)});
  return (await answer.json()).sessionGroups;
})()"""
"""What the tab HPARAMS makes its table of."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver")
def test_every_tab_opens_and_every_picture_loads(tmp_path: Path) -> None:
    model = {**RECIPE["model"], "num_layers": 4}
    tree = {**RECIPE, "model": model, "output": str(tmp_path / "named_run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tree, "monitor": {"every": 1}}))
    words = [sys.executable, "-m", "launch.start", "--ranks", "1"]
    started = subprocess.run(
        [*words, "--config", str(tmp_path / "recipe.yaml")],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert started.returncode == 0, started.stderr
    # What the run itself says that shows it.
    (said,) = [line for line in started.stdout.splitlines() if line.startswith("TensorBoard")]
    lines = read_metrics(tmp_path / "named_run" / "metrics.jsonl")
    with tensorboard(Path(said.split()[-1])) as address, browser(tmp_path) as window:
        window.open(address)
        for tab, shows in TABS.items():
            window.open(f"{address}?tab={tab}#{tab}")
            window.wait(f"return deep({shows!r}).length")
            if tab == "images":
                window.wait("return deep('img').every(i => i.complete && i.naturalWidth)")
                pictures = window.run(PICTURES)
                assert {run for run, _, _ in pictures} == {"named_run"}
                assert {width for _, _, width in pictures} == {WIDTH}
                assert {name for _, name, _ in pictures} >= {
                    "routing/tokens_over_depth",
                    "routing/layers_of_text",
                    "routing_over_steps/executed_share",
                    "gradients_over_steps/attention",
                }
            if tab == "text":
                texts = window.run(TEXTS)
                assert "launch/train.py" in texts["command/text_summary"]
                assert "num_layers: 4" in texts["configuration/text_summary"]
                assert "continued" in texts["samples/text_summary"]
            if tab == "hparams":
                (trial,) = window.run(TRIALS)
                assert trial["hparams"]["model.num_layers"] == 4
                found = {m["name"]["tag"]: m["value"] for m in trial["metricValues"]}
                assert found["validation/loss"] == pytest.approx(lines[-1]["validation/loss"])
            assert window.errors() == [], tab
