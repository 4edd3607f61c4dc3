"""save_pretrained and from_pretrained of adapted models, and folders of strangers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from adaptive.hub import adapt, load_adapted
from tests.adaptive.hub.families import some_ids, tiny, trained

ROOT = Path(__file__).parents[3]
FAMILIES = ("Llama", "GPT2", "Qwen3Moe")

FRESH = """
import sys, torch, transformers
folders = sys.argv[1:]
try:
    transformers.AutoModelForCausalLM.from_pretrained(folders[0])
except ValueError as error:
    assert "adaptive" in str(error)
else:
    raise AssertionError("loaded as a dense model")
import adaptive.hub
for folder in folders:
    given, expected = torch.load(folder + "/said.pt")
    for load in (transformers.AutoModelForCausalLM.from_pretrained, adaptive.hub.load_adapted):
        out = load(folder)(given, labels=given)
        torch.testing.assert_close(out.logits, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.loss, expected[1])
print("the same")
"""


@torch.no_grad()
def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    """Sharded, experts included; who does not know us refuses it rather than load it dense."""
    models = {}
    for family in FAMILIES:
        model = models[family] = tiny(family)
        adapt(model, "skip_layer", layers=[0], keys="all", schedule={"temperature": 2.0})
        adapt(model, "mixture_of_depths", layers=[1], capacity=0.5)
        trained(adapt(model, "early_exit", layers=[2, 3]))
        model.get_submodule(_layers(model) + ".1.routing").threshold.fill_(0.123456789)
    models["Llama-experts"] = adapt(tiny("Llama"), "mixture_of_experts", num_experts=3)
    adapt(models["Llama-experts"], "skip_layer", layers=[1])
    adapt(model := tiny("GPT2"), "mixture_of_experts", layers=[0], num_experts=3)
    adapt(model, "mixture_of_experts", layers=[1], num_experts=3, new_weights=True)
    adapt(model, "adaptive_computation", layers=[2], num_learners=2)
    models["GPT2-units"] = adapt(model, "sized_feed_forward", layers=[3])
    models["Phi3-parameters"] = adapt(tiny("Phi3"), "pattention", tokens=7, ffn_tokens=9)
    folders = []
    for name, model in models.items():
        folder = tmp_path / name
        trained(model).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        ids = some_ids(2)
        out = model(ids, labels=ids)
        torch.save((ids, (out.logits, out.loss)), folder / "said.pt")
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "the same\n", done.stderr


def _layers(model: Any) -> str:
    return "transformer.h" if hasattr(model, "transformer") else "model.layers"


@torch.no_grad()
def test_its_own_class_loads_it_and_half_precision_keeps_the_threshold(tmp_path: Path) -> None:
    model = trained(adapt(tiny("Llama"), "mixture_of_depths", layers=[2], capacity=0.5))
    model.model.layers[2].routing.threshold.fill_(0.123456789)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is type(model)
    assert loaded.model.layers[2].routing.threshold.item() == pytest.approx(0.123456789, abs=1e-8)
    # A checkpoint of a checkpoint, adapted again.
    ids = some_ids()
    again = adapt(loaded, "skip_layer", layers=[0])
    again.save_pretrained(tmp_path / "again")
    assert load_adapted(tmp_path / "again", dtype=torch.bfloat16)(ids).logits.equal(
        again(ids).logits
    )


def test_a_strangers_folder_runs_no_code(tmp_path: Path) -> None:
    model = adapt(tiny("Llama"), "skip_layer", layers=[1])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "theirs.A", "AutoModelForCausalLM": "theirs.B"}
    path.write_text(json.dumps(saved | {"auto_map": auto_map}))
    for load in (AutoModelForCausalLM.from_pretrained, load_adapted):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()

    entry = saved["adaptive"]

    def with_entry(**changes: Any) -> None:
        path.write_text(json.dumps(saved | {"adaptive": entry | changes}))

    method, options = "skip_layer", entry["adaptations"][0]["options"]
    changed: list[tuple[dict[str, Any], str]] = [
        ({"base": "no_such"}, "base='no_such': transformers has no such model"),
        ({"base": ["llama"]}, "adaptive.base: must be a str"),
        ({"adaptations": [1]}, "adaptive.adaptations: must have method and options"),
        ({"adaptations": [{"method": "os.system", "options": {}}]}, "is no method; must be one of"),
        (
            {"adaptations": [{"method": method, "options": options | {"density": "x"}}]},
            "skip_layer: ",
        ),
    ]
    for changes, message in changed:
        with_entry(**changes)
        with pytest.raises(ValueError, match=message) as refusal:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(refusal.value)
    with_entry(architecture="logging")
    with pytest.raises(ValueError, match="architecture='logging': transformers has no such model"):
        load_adapted(tmp_path)
    tiny("Llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds no adapted model"):
        load_adapted(tmp_path / "dense")


transformers.logging.set_verbosity_error()
