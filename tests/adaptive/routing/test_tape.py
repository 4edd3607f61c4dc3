"""RoutingTape, BatchScope and recomputation: nothing lost, nothing twice, nothing left behind."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from adaptive import MixtureOfExperts, SkipLayer
from adaptive.flops import executed_flops
from adaptive.routing.recompute import checkpoint, decide, recomputing
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, RoutingTape, current_tape


class Recorder(nn.Module):
    """Records once a forward, with a loss that is not linear in the batch: (total of x)²."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x
        tape = current_tape()
        if tape is not None:
            total = tape.total(y.sum())
            # d/dy of total² / 2, the total being a constant.
            loss = AuxiliaryLoss((y * total).sum(), 0.5)
            record = RoutingRecord(name="", kind="recorder", tokens=x.numel(), executed=0)
            tape.record(self, record, {"square": loss})
        return y.exp()


def test_outside_a_tape_nothing_is_recorded_and_nothing_stays() -> None:
    module = Recorder()
    before = set(vars(module))
    module(torch.ones(3))
    with RoutingTape() as tape:
        pass
    assert tape.records == []
    assert tape.loss() == 0.0
    assert set(vars(module)) == before


def test_names_are_the_models_paths() -> None:
    model = nn.ModuleDict({"a": Recorder(), "b": nn.ModuleList([Recorder()])})
    with RoutingTape(model) as tape:
        model["a"](torch.ones(1))
        model["b"][0](torch.ones(1))
    assert [record.name for record in tape.records] == ["a", "b.0"]
    with RoutingTape() as unnamed:
        model["a"](torch.ones(1))
    assert unnamed.records[0].name == "recorder.0"


def test_nested_tapes_record_apart() -> None:
    module = Recorder()
    with RoutingTape() as outer:
        module(torch.ones(1))
        with RoutingTape() as inner:
            module(torch.ones(1))
            module(torch.ones(1))
        module(torch.ones(1))
    assert (len(outer.records), len(inner.records)) == (2, 2)


def test_recomputation_repeats_losses_but_records_once_even_outside_the_tape() -> None:
    module = Recorder()
    x = torch.tensor([0.1, 0.2], requires_grad=True)
    gradients = []
    for recompute in (False, True):
        module.zero_grad()
        with RoutingTape() as tape:
            out = checkpoint(module, x) if recompute else module(x)
        (out.sum() + tape.loss()).backward()
        assert len(tape.records) == 1
        gradients.append(module.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_decisions_replay_in_order_and_nest() -> None:
    drawn: list[float] = []

    def draw() -> float:
        drawn.append(float(len(drawn)))
        return drawn[-1]

    def inner(x: Tensor) -> Tensor:
        return x * decide(draw)

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x.sin() * decide(draw)) + decide(draw)

    x = torch.tensor(1.0, requires_grad=True)
    checkpoint(outer, x).backward()
    assert drawn == [0.0, 1.0, 2.0]
    assert not recomputing()


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_census_makes_nonlinear_losses_exact_under_accumulation(micro_batches: int) -> None:
    x = torch.arange(1.0, 9.0)
    parts = x.chunk(micro_batches)
    module = Recorder()
    scope = BatchScope(tokens=8, replicas=micro_batches, micro_batches=micro_batches)
    scope.start_census()
    for part in parts:
        with torch.no_grad(), RoutingTape(scope=scope):
            module(part)
    scope.finish_census()
    value = 0.0
    for part in parts:
        with RoutingTape(scope=scope) as tape:
            module(part)
        loss = tape.loss() / micro_batches
        assert isinstance(loss, Tensor)
        loss.backward()
        value += loss.item()
    # ½ (w Σx)², and its gradient with the total held constant: ½ (Σx) (w Σx).
    assert value == pytest.approx(0.5 * (2 * 36) ** 2)
    assert module.weight.grad.item() == pytest.approx(0.5 * 36 * 2 * 36)


def test_without_a_census_a_total_is_the_micro_batchs_times_their_number() -> None:
    scope = BatchScope(tokens=8, replicas=4, micro_batches=4)
    with RoutingTape(scope=scope) as tape:
        assert tape.total(torch.tensor([1.0, 2.0])).tolist() == [4.0, 8.0]


def test_replicas_without_the_global_token_count_are_refused() -> None:
    with pytest.raises(ValueError, match="replicas=2: needs tokens"):
        BatchScope(replicas=2)


def test_the_model_itself_has_the_empty_path() -> None:
    module = MixtureOfExperts(8, 16, 4)
    with RoutingTape(module) as tape:
        module(torch.randn(2, 6, 8))
    assert tape.records[0].name == ""
    assert executed_flops(module, tape.records, 2, 6) > 0


def test_losses_that_reentrant_checkpointing_loses_are_said_once() -> None:
    """Its first forward has no gradients, its second is a repetition: the loss trains nothing."""
    model, x = nn.Sequential(Recorder(), Recorder()), torch.ones(3, requires_grad=True)
    match = "use_reentrant=False with context_fn"
    with pytest.warns(UserWarning, match=match) as told, RoutingTape(model) as tape:
        torch_checkpoint(model, x, use_reentrant=True)
    assert len(told) == 1
    loss = tape.loss()
    assert isinstance(loss, Tensor)
    assert not loss.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RoutingTape(model):
            checkpoint(model, x).sum().backward()
        with torch.no_grad(), RoutingTape(model):  # a count, or an evaluation
            model(x)
        with torch.no_grad(), RoutingTape(model.eval()):
            model(x)


@pytest.mark.parametrize("state", ["bias", "price"])
def test_a_forward_that_failed_counts_for_no_later_step(state: str) -> None:
    """It may be tried again, as after it ran out of memory."""
    routed: nn.Module = MixtureOfExperts(8, 16, 4, top_k=1, bias_rate=0.1)
    if state == "price":
        routed = SkipLayer(nn.Linear(8, 8), 8, keys="executing", controller_gain=0.1)
    fails = nn.Linear(7, 7)

    def counted() -> float:
        counts = [b for name, b in routed.named_buffers() if name.endswith(("load", "seen"))]
        return float(torch.stack([count.sum() for count in counts]).sum())

    with pytest.raises(RuntimeError, match="shape"), RoutingTape():
        fails(routed(torch.randn(1, 5, 8)))
    assert counted() == 0
    with RoutingTape():
        routed(torch.randn(1, 5, 8))
    assert counted() == 5
