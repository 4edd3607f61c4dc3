"""`train.compile`: losses as without it, a stated number of graphs, refusals in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive.blocks.method import METHODS, Method
from adaptive.compiling import graphs
from launch.run import compiled
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.preflight import check_run
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks

MOST_GRAPHS = 16
"""Of any method, those of SkipLayer, whose attention is left out of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    write_text(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "with ZeRO 3, whose weights are"),
        ({"parallel": {"tensor": 2}}, "with parallel.tensor=2, whose collectives lie in layers"),
        ({"parallel": {"context": 2}}, "with parallel.context=2, whose"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_ranks_start(
    changes: dict[str, Any], said: str, folder: Path
) -> None:
    config = from_mapping(tiny_config(folder, train={"compile": True}, **changes))
    with pytest.raises(BadInput, match=f"train.compile=true: must be false {said}"):
        check_run(config, ranks=2)


def test_a_missing_compiler_and_a_model_without_layers_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_mapping(tiny_config(folder, train={"compile": True}))
    with pytest.raises(BadInput, match="this model has no layers that could be compiled"):
        compiled.check_compiles(config, nn.Linear(2, 2))
    import torch._inductor.config as inductor

    layers = nn.ModuleList([nn.Linear(2, 2)])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    line = r"must be false, or a C\+\+ compiler be installed \(g\+\+\), or named by CXX"
    with pytest.raises(BadInput, match=line):
        compiled.check_compiles(config, nn.ModuleDict({"layers": layers}))


def both(tree: dict[str, Any], steps: int) -> tuple[list[float], list[float], list[int]]:
    """Losses without and with compiled layers, and the graphs after each step."""
    found, made = [], []
    for compiles in (False, True):
        torch._dynamo.reset()
        config = from_mapping({**tree, "train": {**tree["train"], "compile": compiles}})
        loop = make_loop(config)
        before, losses = graphs(), []
        for _ in range(steps):
            losses.append(loop.step().loss)
            made.append(graphs() - before)
        loop.evaluate()
        found.append(losses)
        loop.close()
    return found[0], found[1], made[steps:]


def recipe(method: type[Method] | None, folder: Path) -> dict[str, Any]:
    """A tiny run of the task that has the method."""
    if method is None or method.place in ("linear", "feed_forward", "layer", "stack"):
        model: dict[str, Any] = {"mixture_of_depths": None}
        if method is not None:
            model[method.name] = {}
        if method is not None and method.place == "stack":
            model["num_layers"] = 3  # one before and one behind those that it runs
        return tiny_config(folder, model=model, train={"micro_batch_size": 2, "move_within": 0})
    sizes = {"dim": 32, "num_heads": 2, "image_size": 8, "channels": 1, "num_classes": 10}
    tree = {**tiny_config(folder, train={"move_within": 0}), "data": {}}
    if method.place == "sequence":
        return {**tree, "task": "diffusion", "model": {**sizes, "patch_size": 2}}
    model = {**sizes, "num_layers": 3, "patch_size": 1, method.name: {"amount": 8}}
    return {**tree, "task": "image_classification", "model": model}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a C++ compiler at work, on a machine that may have other work
@pytest.mark.parametrize("method", [None, *METHODS], ids=lambda m: m.name if m else "dense")
def test_every_method_trains_compiled_as_before_in_a_few_graphs(
    method: type[Method] | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    ranks = 2 if method is None else 1
    for eager, fused, made in run_ranks(both, ranks, recipe(method, folder), 4, timeout=1700):
        assert fused == pytest.approx(eager, abs=1e-5)
        assert 0 < made[0] <= MOST_GRAPHS
        assert made[-1] == made[1]
