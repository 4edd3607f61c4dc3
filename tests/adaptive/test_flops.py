"""FLOPs: the formulas against operations that torch counts while the model runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from adaptive import MixtureOfDepths, RoutingTape
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.flops import (
    FlopCounter,
    Work,
    executed_flops,
    nominal_flops,
    planned_flops,
    register_flops,
)
from adaptive.models import Decoder, DecoderConfig
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection
from parallel.flop_formulas import torch_flop_counter

WITHIN = 0.01  # The bound. The formulas are exact for these models.
CONFIG = DecoderConfig(
    vocab_size=97, dim=64, num_layers=4, num_heads=4, num_kv_heads=2, max_seq_len=128
)
ROUTED = dataclasses.replace(CONFIG, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25))
BATCH, LENGTH = 3, 96
# Our kernel computes attention's scores again in the backward pass; math attention keeps them.
SCORES_AGAIN = os.environ.get("ADAPTIVE_BACKEND") == "triton"

# torch has no formula for its attention kernel on the CPU: it is the flash kernel's.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CPU_FLASH = {
    _FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _FLASH_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}


@contextmanager
def counted(*, flash: bool = False) -> Iterator[list[int]]:
    """What torch counted inside: math attention keeps its scores, flash attention does not."""
    total: list[int] = []
    backend = SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH
    mode = torch_flop_counter(display=False, custom_mapping=_CPU_FLASH)
    with sdpa_kernel(backend), mode:
        yield total
    total.append(mode.get_total_flops())


def run(model: nn.Module, ids_BS: Tensor, **kwargs: Any) -> tuple[RoutingTape, Tensor]:
    with RoutingTape(model) as tape:
        loss = model.token_losses(ids_BS, ids_BS, **kwargs).mean()
    return tape, loss + tape.loss()


def ids(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, length))


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_forward_agrees_with_torch(config: DecoderConfig) -> None:
    model = Decoder(config)
    with counted() as total:
        tape, _ = run(model, ids())
    assert planned_flops(model, BATCH, LENGTH) == pytest.approx(total[0], rel=WITHIN)
    executed = executed_flops(model, tape.records, BATCH, LENGTH)
    assert float(executed) == pytest.approx(total[0], rel=WITHIN)


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_backward_agrees_with_torch(config: DecoderConfig) -> None:
    model = Decoder(config)
    with counted() as total:
        tape, loss = run(model, ids())
        loss.backward()
    kwargs = {"backward": True, "recompute": SCORES_AGAIN}
    assert planned_flops(model, BATCH, LENGTH, **kwargs) == pytest.approx(total[0], rel=WITHIN)
    executed = executed_flops(model, tape.records, BATCH, LENGTH, **kwargs)
    assert float(executed) == pytest.approx(total[0], rel=WITHIN)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_recomputation_agrees_with_torch(config: DecoderConfig, recompute: bool) -> None:
    """Flash attention computes its scores again, a checkpointed layer its whole forward."""
    model = Decoder(dataclasses.replace(config, recompute=recompute))
    with counted(flash=True) as total:
        tape, loss = run(model, ids())
        loss.backward()
    kwargs = {"backward": True, "recompute": True}
    assert planned_flops(model, BATCH, LENGTH, **kwargs) == pytest.approx(total[0], rel=WITHIN)
    executed = executed_flops(model, tape.records, BATCH, LENGTH, **kwargs)
    assert float(executed) == pytest.approx(total[0], rel=WITHIN)


def test_tokens_really_routed_count_not_the_planned_ones() -> None:
    """In causal evaluation the number of chosen tokens is the predictor's to say."""
    torch.manual_seed(0)
    model = Decoder(ROUTED).eval()
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            nn.init.normal_(module.predictor.down.weight, std=3)
    with torch.no_grad(), counted() as total:
        tape, _ = run(model, ids())
    executed = float(executed_flops(model, tape.records, BATCH, LENGTH))
    assert executed == pytest.approx(total[0], rel=WITHIN)
    assert executed > 1.2 * planned_flops(model, BATCH, LENGTH)


def test_packed_documents_attend_within_themselves_only() -> None:
    model = Decoder(ROUTED)
    layout = TokenLayout.from_lengths([50, 46, 96, 7, 89])
    with counted() as total:
        tape, loss = run(model, ids(), layout=layout)
        loss.backward()
    kwargs = {"backward": True, "recompute": SCORES_AGAIN}
    executed = executed_flops(model, tape.records, layout, **kwargs)
    assert float(executed) == pytest.approx(total[0], rel=WITHIN)
    assert float(executed) < 0.97 * planned_flops(model, BATCH, LENGTH, **kwargs)


def test_records_of_several_micro_batches_add_up() -> None:
    model = Decoder(ROUTED)
    whole, _ = run(model, ids())
    with RoutingTape(model) as tape:
        for row in ids().split(1):
            model(row)
    parts = executed_flops(model, tape.records, BATCH, LENGTH)
    assert float(parts) == float(executed_flops(model, whole.records, BATCH, LENGTH))


def test_nominal_operations_are_those_of_the_dense_model() -> None:
    for backward in (False, True):
        nominal = nominal_flops(ROUTED, BATCH, LENGTH, backward=backward)
        assert nominal == planned_flops(CONFIG, BATCH, LENGTH, backward=backward)


def test_the_configuration_of_a_run_will_do() -> None:
    """As `load_model` gives it: the model's own is its section `model`."""
    run = SimpleNamespace(model=CONFIG, task="language_model")
    assert planned_flops(run, 2, 8) == planned_flops(CONFIG, 2, 8)
    with pytest.raises(ValueError, match="SimpleNamespace: must be a model, or a DecoderConfig"):
        planned_flops(SimpleNamespace(), 2, 8)


def test_written_out_formula() -> None:
    dim, ffn, heads = CONFIG.dim, CONFIG.ffn_width, CONFIG.num_heads
    tokens = BATCH * LENGTH
    per_token = 2 * (dim * dim * 2 + 2 * dim * dim // 2 + 3 * dim * ffn)  # two key-value heads of 4
    pairs = BATCH * LENGTH**2
    layer = tokens * per_token + 4 * pairs * heads * (dim // heads)
    logits = 2 * dim * CONFIG.vocab_size * tokens
    assert planned_flops(CONFIG, BATCH, LENGTH) == 4 * layer + logits
    assert planned_flops(CONFIG, BATCH, LENGTH, backward=True) == 3 * (4 * layer + logits)


def test_frozen_weights_need_no_gradient() -> None:
    model = Decoder(CONFIG)
    model.output.requires_grad_(False)
    with counted() as total:
        run(model, ids())[1].backward()
    planned = planned_flops(model, BATCH, LENGTH, backward=True, recompute=SCORES_AGAIN)
    assert planned == pytest.approx(total[0], rel=WITHIN)


def test_work_of_queries_that_attend_to_every_token() -> None:
    """SkipLayer: few queries, all keys."""
    layer = Decoder(CONFIG).layers[0]
    layout = TokenLayout.dense(2, 32)
    x_TD = torch.randn(64, CONFIG.dim)
    chosen = Selection.from_mask(torch.arange(64) % 3 == 0, layout)
    with counted() as total:
        layer(x_TD, layout=layout, queries=chosen)
    work = Work(
        chosen.cu_seqlens.diff().double(),
        torch.full((2,), 32.0).double(),
        torch.full((2,), 32.0).double(),
    )
    counter = FlopCounter()
    counter(layer, work)
    assert float(counter.total().forward) == pytest.approx(total[0], rel=WITHIN)


def test_foreign_module_counts_by_rule() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    routed = MixtureOfDepths(encoder, 32, capacity=0.5)
    x_BSD = torch.randn(2, 16, 32, requires_grad=True)
    with counted() as total, RoutingTape(routed) as tape:
        routed(x_BSD)
    assert tape.records[0].executed == 16
    assert planned_flops(routed, 2, 16) == pytest.approx(total[0], rel=WITHIN)


def test_unknown_weights_are_refused() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    with pytest.raises(ValueError, match=r"Bilinear: has a weight matrix and says no FLOPs"):
        planned_flops(Bilinear(), 1, 4)

    @register_flops(Bilinear)
    def _(module: nn.Module, count: FlopCounter, work: Work) -> None:
        count.linear(4, 4, work)

    assert planned_flops(Bilinear(), 1, 4) == 2 * 4 * 4 * 4


def test_missing_or_foreign_records_are_refused() -> None:
    model = Decoder(ROUTED)
    with pytest.raises(ValueError, match="run the model inside"):
        executed_flops(model, [], 1, 8)
    with RoutingTape() as unnamed:
        model(ids(1, 8))
    with pytest.raises(ValueError, match="names no module of this model"):
        executed_flops(model, unnamed.records, 1, 8)


def test_sharded_weights_change_nothing() -> None:
    """Under ZeRO 3 weights are empty between forwards: sizes come from elsewhere."""
    model = Decoder(ROUTED)
    before = planned_flops(model, BATCH, LENGTH, backward=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert planned_flops(model, BATCH, LENGTH, backward=True) == before


class NoHostSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


def test_counting_executed_operations_waits_for_nothing() -> None:
    model = Decoder(ROUTED)
    tape, _ = run(model, ids())
    with NoHostSync():
        executed = executed_flops(model, tape.records, BATCH, LENGTH, backward=True)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        float(executed)
