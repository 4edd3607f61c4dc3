"""`launch.convert adapt`: a dense decoder's trained layers, routed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptive.models.convert.layers import wrap_layers
from adaptive.models.decoder.layers import DecoderLayer
from launch.checkpoint.files import load_model
from launch.convert import main
from launch.run.config import load_config
from launch.run.preflight import check_run
from tests.adaptive.models.test_transformers_weights import ids
from tests.launch.test_upcycle import dense_run


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "words",
    [
        ["model.mixture_of_depths={capacity: 0.99, schedule: [1], predictor: none}"],
        ["model.skip_layer={density: 0.5, layers: [0, 1]}"],
    ],
    ids=["mixture_of_depths", "skip_layer"],
)
def test_where_every_token_is_computed_it_is_the_dense_model(
    words: list[str], tie: bool, tmp_path: Path
) -> None:
    dense, source = dense_run(tmp_path, tie=tie)
    main(["adapt", str(source), str(tmp_path / "out"), *words, "train.steps=3"])
    routed, config = load_model(tmp_path / "out")
    assert config.train.steps == 3
    check_run(load_config(tmp_path / "out" / "run.yaml"), ranks=1)
    for module in routed.modules():
        if getattr(module, "kind", "") == "skip_layer":
            module.router.bias.data.copy_(torch.tensor([-9.0, 9.0]))
    torch.testing.assert_close(routed(ids()), dense(ids()), atol=1e-5, rtol=0)


def test_layers_can_be_left_out_for_a_smaller_dense_model(tmp_path: Path) -> None:
    dense, source = dense_run(tmp_path, tie=True)
    main(["adapt", str(source), str(tmp_path / "out"), "--layers", "1", "train.steps=3"])
    smaller, config = load_model(tmp_path / "out")
    assert config.model.num_layers == 1
    del dense.layers[0]
    assert [type(layer) for layer in dense.layers] == [DecoderLayer]
    torch.testing.assert_close(smaller(ids()), dense(ids()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.dim=64"], "model: gains nothing: must gain methods that wrap whole layers"),
        (["model.mixture_of_experts.num_experts=4"], "model: gains mixture_of_experts: must gain"),
        (
            ["model.mixture_of_depths.capacity=0.5", "model.norm_eps=0.1"],
            "model: other keys than those of the methods are not the source's",
        ),
        (["--layers", "0,7"], "layers=[0, 7]: 7 must be in 0..1"),
        (["--layers", "0-1"], "--layers: '0-1': must be numbers of layers, as 0,1,3"),
        (["--layers", "0", "model.norm_eps=0.1"], "--layers makes a dense model: give no keys"),
    ],
)
def test_what_is_no_routed_model_of_the_source_is_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, source = dense_run(tmp_path, tie=True)
    with pytest.raises(SystemExit) as stop:
        main(["adapt", str(source), str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {line}")
    assert not (tmp_path / "out").exists()


def test_a_weight_without_a_place_is_refused(tmp_path: Path) -> None:
    dense, source = dense_run(tmp_path, tie=False)
    main(["adapt", str(source), str(tmp_path / "out"), "model.mixture_of_depths.capacity=0.5"])
    config = load_model(tmp_path / "out")[1].model
    weights = dict(dense.state_dict())
    assert wrap_layers(weights, dense.config, config).keys() > {"layers.1.block.ffn.gate.weight"}
    with pytest.raises(ValueError, match=r"layers.1.extra: has no place in the new model"):
        wrap_layers(weights | {"layers.1.extra": torch.ones(1)}, dense.config, config)
