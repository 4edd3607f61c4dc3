"""TensorBoard of a real run, opened tab by tab in a real browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    logdir = Path(said.split()[-1])
    with tensorboard(logdir) as address, browser(tmp_path) as window:
        window.open(address)
        for tab, shows in TABS.items():
            window.open(f"{address}?tab={tab}#{tab}")
            window.wait(f"return deep({shows!r}).length")
            if tab == "images":
                loaded = "deep('img').every(i => i.complete && i.naturalWidth)"
                window.wait(f"return {loaded}")
                widths = window.run("return deep('img').map(i => i.naturalWidth)")
                assert all(width <= 350 for width in widths), widths
                runs = window.run(
                    "return document.body.innerText + deep('*').map(e => "
                    "e.shadowRoot ? e.shadowRoot.textContent : '').join(' ')"
                )
                assert "named_run" in runs
            assert window.errors() == [], tab
