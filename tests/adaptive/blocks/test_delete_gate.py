"""DeleteGate in a decoder: what it learns soft it computes hard; causal, cached, counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaptive import RoutingTape, TokenLayout, start_step
from adaptive.blocks.calibration import calibrate
from adaptive.blocks.delete_gate import DeleteGate, DeleteGateConfig
from adaptive.blocks.segments import SegmentsConfig
from adaptive.flops import executed_flops
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.generate import Sampling, generate
from parallel.flop_formulas import torch_flop_counter

TINY = DecoderConfig(
    vocab_size=64, dim=32, num_layers=4, num_heads=4, ffn_dim=48, max_seq_len=64, init_std=0.2
)


def make(*, dtype: torch.dtype = torch.float64, **options: Any) -> Decoder:
    """A decoder whose gate deletes about half of the tokens, and is sure of each."""
    torch.manual_seed(0)
    gate = DeleteGateConfig(**({"before": 1} | options))
    model = Decoder(replace(TINY, delete_gate=gate)).to(dtype)
    nn.init.normal_(model.stack.gate.score.weight, std=20.0)
    nn.init.zeros_(model.stack.gate.score.bias)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def test_hard_steps_are_an_attention_mask_written_out() -> None:
    model, ids_BS = make().eval(), tokens(1, 20)
    layout = TokenLayout.dense(1, 20)
    hidden_SD = model.layers[0](model.embedding(ids_BS[0]), layout=layout)
    stays_S = model.stack.gate(hidden_SD) > 0
    assert 4 < int(stays_S.sum()) < 16
    # In plain terms: the middle has these rows, at their own places in the text.
    rows_RD = hidden_SD[stays_S]
    at = stays_S.nonzero().squeeze(1)
    middle = TokenLayout(torch.tensor([0, len(at)], dtype=torch.int32), len(at), at)
    for layer in model.layers[1:3]:
        rows_RD = layer(rows_RD, layout=middle)
    hidden_SD = hidden_SD.clone()
    hidden_SD[stays_S] = rows_RD
    wanted_SV = model.output(model.norm(model.layers[3](hidden_SD, layout=layout)))
    assert (model(ids_BS)[0] - wanted_SV).abs().max() < 1e-12
    # The trap: counted places are other places.
    counted = TokenLayout.dense(1, len(at))
    rows_RD = layout_rows = hidden_SD[stays_S]
    moved = model.layers[1](rows_RD, layout=counted) - model.layers[1](layout_rows, layout=middle)
    assert moved.abs().max() > 1e-3


def test_soft_training_computes_what_evaluation_gathers() -> None:
    ids_BS, found = tokens(3, 24), {}
    for depth in (-10.0, -60.0):
        model = make(depth=depth)
        found[depth] = (model.train()(ids_BS) - model.eval()(ids_BS)).abs().max()
    assert found[-60.0] < 1e-11
    assert 1e-9 < found[-10.0] < 0.5
    # A hard step of training is evaluation, bit for bit.
    model = make(hard_share=1.0).train()
    start_step(model, 0)
    assert torch.equal(model(ids_BS), model.eval()(ids_BS))


def test_the_gate_learns_what_a_deleted_key_was_worth() -> None:
    """Against a finite difference of G itself; who is hard deleted would have no gradient."""
    model, ids_BS = make(depth=-3.0).train(), tokens(1, 12)
    layout = TokenLayout.dense(1, 12)
    hidden_SD = model.layers[0](model.embedding(ids_BS[0]), layout=layout).detach()
    bias_S = torch.full((12,), -1.5, dtype=torch.float64, requires_grad=True)

    def middle(bias_S: Tensor) -> Tensor:
        return model.layers[1](hidden_SD, layout=layout, key_bias=bias_S)

    assert torch.autograd.gradcheck(middle, (bias_S,))
    with RoutingTape(model) as tape:
        loss = model.token_losses(ids_BS, ids_BS).mean()
    loss.backward()
    logits_S = model.stack.gate(hidden_SD)
    assert (logits_S < 0).any()
    assert model.stack.gate.score.weight.grad.abs().max() > 0
    assert tape.records[0].executed == 12


def test_no_logit_depends_on_a_later_token() -> None:
    for mode in (True, False):
        model, ids_BS = make().train(mode), tokens(1, 24)
        logits = model(ids_BS)
        for changed in range(1, 24):
            other_BS = ids_BS.clone()
            other_BS[0, changed] = (other_BS[0, changed] + 23) % 64
            # Another number of rows sums in another order.
            found = (model(other_BS)[0, :changed] - logits[0, :changed]).abs().max()
            assert found < 1e-12, changed


def test_texts_of_a_batch_a_pack_and_padding_are_as_each_alone() -> None:
    lengths, ids_BS = (7, 20, 1, 12), tokens(4, 20)
    mask_BS = torch.arange(20) < torch.tensor(lengths)[:, None]
    packed = torch.cat([ids[:n] for ids, n in zip(ids_BS, lengths, strict=True)])[None]
    for mode in (True, False):
        model = make().train(mode)
        alone = [model(ids[None, :n])[0] for ids, n in zip(ids_BS, lengths, strict=True)]
        right = model(ids_BS, mask_BS)
        apart = model(packed, layout=TokenLayout.from_lengths(lengths))[0].split(lengths)
        for row, length in enumerate(lengths):
            for found in (right[row, :length], apart[row]):
                assert (found - alone[row]).abs().max() < 1e-12


def test_a_text_that_is_deleted_whole_passes_by() -> None:
    """Public code then keeps the first token, or looks whether the whole batch is empty."""
    model, ids_BS = make().eval(), tokens(2, 9)
    model.stack.threshold.fill_(1e9)
    layout = TokenLayout.dense(2, 9)
    hidden_TD = model.embedding(ids_BS.flatten())
    for index in (0, 3):
        hidden_TD = model.layers[index](hidden_TD, layout=layout)
    wanted = model.output(model.norm(hidden_TD)).view(2, 9, -1)
    assert (model(ids_BS) - wanted).abs().max() < 1e-12


def test_one_token_at_a_time_is_the_whole_text() -> None:
    model = make().eval()
    ids_BS, lengths = tokens(3, 26), torch.tensor([26, 3, 11])
    whole = model(ids_BS)
    for chunks in ([1] * 26, [5, 1, 1, 9, 10], [26]):
        cache, at, found = Cache(model, 3), 0, []
        for size in chunks:
            found.append(model(ids_BS[:, at : at + size], cache=cache))
            at += size
        assert (torch.cat(found, 1) - whole).abs().max() < 1e-12
    cache = Cache(model, 3)
    model(ids_BS, torch.arange(26) < lengths[:, None], cache=cache)
    goes_B1 = torch.tensor([[False], [True], [True]])
    for step in range(4):
        next_B1 = ids_BS.gather(1, (lengths + step).clamp(max=25)[:, None])
        found_BV = model(next_B1, goes_B1, cache=cache)[:, 0]
        for row in (1, 2):
            assert (found_BV[row] - whole[row, lengths[row] + step]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="or that deletes tokens"):
        cache.rewind(lengths)


def test_generation_with_and_without_a_cache_is_one_and_counts_alike() -> None:
    model, prompts = make(dtype=torch.float32).eval(), [[1, 2, 3, 4, 5], [9]]
    made = {}
    for cached in (True, False):
        *_, made[cached] = generate(
            model, prompts, max_new_tokens=12, sampling=Sampling(temperature=0), cached=cached
        )
    assert made[True].tokens == made[False].tokens
    assert made[True].layers == made[False].layers
    assert {count for layers in made[True].layers for count in layers} == {2, 4}
    assert 0 < made[True].executed_flops(model) < made[True].nominal_flops(model)


@pytest.mark.parametrize("hard_share", [0.0, 1.0])
def test_operations_are_those_that_torch_counts(hard_share: float) -> None:
    model, ids_BS = make(hard_share=hard_share, dtype=torch.float32), tokens(2, 32)
    start_step(model, 0)
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch_flop_counter(display=False) as counted,
        RoutingTape(model) as tape,
    ):
        model.token_losses(ids_BS, ids_BS)
    executed = int(executed_flops(model, tape.records, 2, 32))
    # A bias a key travels in heads that are 8 wider, which torch counts as products.
    widened = 0 if hard_share else 2 * 2 * 2 * 8 * TINY.num_heads * 2 * 32**2
    assert executed == counted.get_total_flops() - widened
    (record,) = tape.records
    assert (int(record.executed) < 64) == bool(hard_share)


def test_the_controller_is_of_the_global_batch() -> None:
    gate = DeleteGate(
        8, before=0, after=0, num_layers=1, target=0.6, proportional=0.5, integral=0.1
    )
    quick = slow = 0.0
    for step, deleted in enumerate([0, 3, 40, 90, 100, 0]):
        for part in (deleted // 3, deleted - deleted // 3):  # two micro-batches
            gate._observe(torch.tensor([part, 50.0]))
        gate.start_step(step)
        error = 0.6 - deleted / 100
        quick, slow = 0.9 * quick + 0.1 * 0.5 * error, slow + 0.1 * error
        assert float(gate.price) == pytest.approx(max(0.0, quick + slow), abs=1e-7)
    held = float(gate.price)
    gate.start_step(9)  # nothing was seen
    assert float(gate.price) == held


def test_the_price_goes_once_the_share_is_reached() -> None:
    torch.manual_seed(0)
    config = DeleteGateConfig(before=1, target=0.5, proportional=5.0, integral=0.05)
    model, ids_BS = Decoder(replace(TINY, init_std=0.02, delete_gate=config)), tokens(4, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    shares: list[float] = []
    for step in range(60):
        start_step(model, step)
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS.roll(-1, 1)).mean()
        optimizer.zero_grad()
        (loss + tape.loss()).backward()
        optimizer.step()
        shares.append(float(tape.records[0].statistics["deleted"]))
    assert shares[0] == 0
    assert shares[-1] > 0.4
    assert float(model.stack.price) == 0


def test_calibrated_it_deletes_as_many_as_it_was_trained_to() -> None:
    model, ids_BS = make(target=0.3), tokens(4, 30)
    assert list(calibrate(model, [ids_BS])) == ["stack"]
    with RoutingTape(model) as tape:
        model.eval()(ids_BS)
    assert int(tape.records[0].executed) == 0.7 * 120


@pytest.mark.parametrize("hard_share", [0.0, 1.0])
def test_recomputation_repeats_the_choice(hard_share: float) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        gate = DeleteGateConfig(before=1, hard_share=hard_share)
        model = Decoder(replace(TINY, recompute=recompute, delete_gate=gate))
        start_step(model, 0)
        ids_BS = tokens(2, 24)
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS).mean()
        (loss + tape.loss()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for own, other in zip(*gradients, strict=True):
        assert torch.equal(own, other)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    for options, said in (
        ({"before": 2, "after": 2}, "leave none of 4 layers"),
        ({"target": 1.0}, "target=1.0: must be above 0 and below 1"),
        ({"depth": 1.0}, "depth=1.0: must be below 0"),
        ({"hard_share": 2.0}, r"hard_share=2.0: must be in \[0, 1\]"),
        ({"integral": -1.0}, "integral=-1.0: must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, delete_gate=DeleteGateConfig(**options))
    with pytest.raises(ValueError, match="give one of them"):
        replace(TINY, delete_gate=DeleteGateConfig(), segments=SegmentsConfig())


def test_a_run_that_goes_on_from_its_state_is_the_run() -> None:
    """The controller's sums, and what the step before deleted, are in the state."""
    ids_BS = tokens(2, 24)

    def model_and_optimizer() -> tuple[Decoder, torch.optim.Optimizer]:
        model = make(target=0.8, hard_share=0.5, dtype=torch.float32)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    def steps(model: Decoder, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            start_step(model, step)
            with RoutingTape(model) as tape:
                loss = model.token_losses(ids_BS, ids_BS.roll(-1, 1)).mean()
            optimizer.zero_grad()
            (loss + tape.loss()).backward()
            optimizer.step()

    whole, other = model_and_optimizer(), model_and_optimizer()
    steps(*whole, range(3))
    saved = [copy.deepcopy(part.state_dict()) for part in whole]
    steps(*whole, range(3, 6))
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    steps(*other, range(3, 6))
    assert float(whole[0].stack.price) > 0
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, other[0].state_dict()[name]), name
