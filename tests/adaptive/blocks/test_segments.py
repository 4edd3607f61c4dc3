"""A decoder whose middle computes segments: against the papers' matrices, causal, cached, apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import RoutingTape, TokenLayout
from adaptive.blocks.calibration import calibrate
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.segments import Script, SegmentsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.routing.boundaries import boundary_loss, lead_bytes, stride_ends, word_ends

TINY = DecoderConfig(
    vocab_size=64, dim=32, num_layers=4, num_heads=4, ffn_dim=48, max_seq_len=64, init_std=0.2
)
KINDS = ("learned", "stride", "words")


def make(
    boundaries: str = "learned", *, dtype: torch.dtype = torch.float64, **options: Any
) -> Decoder:
    torch.manual_seed(0)
    config = SegmentsConfig(boundaries=boundaries, stride=3, prior=0.4, **options)  # type: ignore[arg-type]
    model = Decoder(replace(TINY, segments=config)).to(dtype)
    if boundaries == "learned":
        # Untrained gates say the same of every token.
        torch.nn.init.normal_(model.stack.gate.score.weight, std=1.0)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def by_matrices(model: Decoder, ids_S: Tensor, noise_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """One text by dynamic pooling's assignment matrices: hidden states, and ends with gradients.

    Down: `W[t, g] = 1 - (g - c_t)` where that is 1, with the gradient of c_t, the ends before t;
    rows are then divided by their sums. Up: the same with the ends up to t, and a row in front.
    """
    stack, seq = model.stack, len(ids_S)
    layout = TokenLayout.dense(1, seq)
    hidden_SD = model.layers[0](model.embedding(ids_S), layout=layout)
    if stack.boundaries == "learned":
        normed_SD = torch.nn.functional.layer_norm(hidden_SD, (TINY.dim,))
        inner_SD = torch.nn.functional.gelu(stack.gate.hidden(normed_SD))
        logits_S = stack.gate.score(inner_SD).squeeze(-1)
        logits_S = logits_S if noise_S is None else logits_S + noise_S
        soft_S = (logits_S / stack.temperature).sigmoid()
        ends_S = (logits_S > 0).to(soft_S) + soft_S - soft_S.detach()
    elif stack.boundaries == "stride":
        ends_S = torch.tensor([float((s + 1) % 3 == 0) for s in range(seq)]).double()
    else:
        ends_S = torch.tensor(
            [float(i in (9, 10, 11, 12, 13, 32)) for i in ids_S.tolist()]
        ).double()
    segments = int(ends_S.detach().round().sum())
    before_S = ends_S.cumsum(0) - ends_S
    distance_SG = torch.arange(segments + 1).double() - before_S[:, None]
    down_SG = torch.where(distance_SG.detach().round() == 0, 1 - distance_SG, 0.0)[:, :segments]
    means_GD = (down_SG / down_SG.sum(0, keepdim=True)).t() @ hidden_SD
    means_GD = means_GD / (means_GD.square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt()
    rows = torch.cat([stack.null, means_GD * stack.norm_weight])
    lasts = ends_S.detach().round().nonzero().squeeze(1)
    positions = torch.cat([torch.tensor([-1]), lasts])
    middle = TokenLayout(
        torch.tensor([0, segments + 1], dtype=torch.int32), segments + 1, positions
    )
    for layer in model.layers[1:3]:
        rows = layer(rows, layout=middle)
    up_SP = torch.nn.functional.one_hot(ends_S.detach().round().cumsum(0).long(), segments + 1)
    out_SD = model.layers[3](hidden_SD + up_SP.double() @ rows, layout=layout)
    return model.norm(out_SD), ends_S


@pytest.mark.parametrize("boundaries", KINDS)
def test_values_and_gradients_are_those_of_the_papers_matrices(
    boundaries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(boundaries).train()
    ids_BS = tokens(2, 24)
    noise_T = torch.randn(48, generator=torch.Generator().manual_seed(2)).double()
    if boundaries == "learned":
        monkeypatch.setattr(model.stack, "_noise", lambda _: noise_T)
    weight_TD = torch.randn(48, TINY.dim, generator=torch.Generator().manual_seed(3)).double()
    with RoutingTape(model) as tape:
        ours_TD, _ = model.hidden_states(ids_BS)
    loss = (ours_TD * weight_TD).sum() + tape.loss()
    ours = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    found = [
        by_matrices(model, ids, noise)
        for ids, noise in zip(ids_BS, noise_T.view(2, 24), strict=True)
    ]
    theirs_TD = torch.cat([out for out, _ in found])
    loss = (theirs_TD * weight_TD).sum()
    if boundaries == "learned":
        for _, ends_S in found:
            likely = torch.distributions.Binomial(
                24, torch.tensor(0.4, dtype=torch.float64), validate_args=False
            )
            loss = loss - likely.log_prob(ends_S.sum()) / 48
    theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert (ours_TD - theirs_TD).abs().max() < 1e-12
    for (name, _), own, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (own is None) == (other is None), name
        if own is not None and other is not None:
            assert (own - other).abs().max() < 1e-11, name
    if boundaries == "learned":
        gate = model.stack.gate.hidden.weight
        assert ours[[id(p) for p in model.parameters()].index(id(gate))].abs().max() > 1e-4


@pytest.mark.parametrize("boundaries", KINDS)
def test_no_logit_depends_on_a_later_token(boundaries: str) -> None:
    model = make(boundaries).eval()
    ids_BS = tokens(1, 30)
    logits = model(ids_BS)
    for changed in range(1, 30):
        other_BS = ids_BS.clone()
        other_BS[0, changed] = (other_BS[0, changed] + 23) % 64
        # Another number of segments may sum in another order: rounding, no leak.
        before = (model(other_BS)[0, :changed], logits[0, :changed])
        torch.testing.assert_close(*before, rtol=0, atol=1e-13, msg=str(changed))
        assert not torch.equal(model(other_BS)[0, changed], logits[0, changed])


@pytest.mark.parametrize("boundaries", KINDS)
def test_texts_of_a_batch_a_pack_and_padding_are_as_each_alone(boundaries: str) -> None:
    model = make(boundaries).eval()
    lengths, ids_BS = (7, 20, 1, 12), tokens(4, 20)
    mask_BS = torch.arange(20) < torch.tensor(lengths)[:, None]
    alone = [model(ids[None, :length])[0] for ids, length in zip(ids_BS, lengths, strict=True)]
    right = model(ids_BS, mask_BS)
    left = model(
        torch.stack([ids.roll(20 - n) for ids, n in zip(ids_BS, lengths, strict=True)]),
        mask_BS.flip(1),
    )
    packed = torch.cat([ids[:n] for ids, n in zip(ids_BS, lengths, strict=True)])[None]
    apart = model(packed, layout=TokenLayout.from_lengths(lengths))[0].split(lengths)
    for row, length in enumerate(lengths):
        for found in (right[row, :length], left[row, 20 - length :], apart[row]):
            assert (found - alone[row]).abs().max() < 1e-12
    assert (right[0, 7:] == 0).all()


@pytest.mark.parametrize("boundaries", KINDS)
def test_one_token_at_a_time_is_the_whole_text(boundaries: str) -> None:
    model = make(boundaries).eval()
    ids_BS, lengths = tokens(3, 26), torch.tensor([26, 3, 11])
    whole = model(ids_BS)
    for chunks in ([1] * 26, [5, 1, 1, 9, 10], [26]):
        cache, at, found = Cache(model, 3), 0, []
        for size in chunks:
            found.append(model(ids_BS[:, at : at + size], cache=cache))
            at += size
        assert (torch.cat(found, 1) - whole).abs().max() < 1e-12
    # Prompts of different lengths, then sequences that rest.
    cache = Cache(model, 3)
    mask_BS = torch.arange(26) < lengths[:, None]
    model(ids_BS, mask_BS, cache=cache)
    goes_B1 = torch.tensor([[False], [True], [True]])
    for step in range(4):
        next_B1 = ids_BS.gather(1, (lengths + step).clamp(max=25)[:, None])
        found_BV = model(next_B1, goes_B1, cache=cache)[:, 0]
        for row in (1, 2):
            assert (found_BV[row] - whole[row, lengths[row] + step]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="rewind: a model of segments"):
        cache.rewind(lengths)


def test_generation_with_and_without_a_cache_is_one_and_counts_alike() -> None:
    model, prompts = make(dtype=torch.float32).eval(), [[1, 2, 3, 4, 5], [9]]
    made = {}
    for cached in (True, False):
        steps = generate(
            model, prompts, max_new_tokens=12, sampling=Sampling(temperature=0), cached=cached
        )
        *_, made[cached] = steps
    assert made[True].tokens == made[False].tokens
    assert made[True].layers == made[False].layers
    computed = [count for layers in made[True].layers for count in layers]
    assert set(computed) == {2, 4}
    assert made[True].always == 2
    assert 0 < made[True].executed_flops(model) < made[True].nominal_flops(model)


def test_evaluation_draws_nothing() -> None:
    """Public code draws the ends of segments in evaluation too."""
    model, ids_BS = make().eval(), tokens(2, 20)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(model(ids_BS), model(ids_BS))
    assert torch.equal(torch.get_rng_state(), before)
    model.train()
    assert not torch.equal(model(ids_BS), model(ids_BS))


def test_calibrated_it_ends_as_many_segments_as_it_was_trained_to() -> None:
    model, ids_BS = make(), tokens(4, 30)
    thresholds = calibrate(model, [ids_BS])
    assert list(thresholds) == ["stack"]
    with RoutingTape(model) as tape:
        model.eval()(ids_BS)
    (record,) = tape.records
    assert int(record.chosen.sum()) == 0.4 * 120


def test_recomputation_repeats_the_draws() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = replace(TINY, recompute=recompute, segments=SegmentsConfig(prior=0.4))
        model, ids_BS = Decoder(config), tokens(2, 24)
        torch.manual_seed(7)
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids_BS, ids_BS).mean()
        (loss + tape.loss()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for own, other in zip(*gradients, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("kind", ["binomial", "band"])
def test_the_loss_has_the_papers_value_and_slope(kind: Any) -> None:
    lengths, counts = (10, 4, 7), (3, 4, 0)
    layout = TokenLayout.from_lengths(lengths)
    ends = [[1.0] * k + [0.0] * (n - k) for n, k in zip(lengths, counts, strict=True)]
    ends_T = torch.tensor([end for row in ends for end in row]).double().requires_grad_()
    found = boundary_loss(ends_T, layout, prior=0.3, kind=kind, slack=0.1)
    if kind == "binomial":
        counted = [torch.tensor(float(k), dtype=torch.float64, requires_grad=True) for k in counts]
        likely = [
            torch.distributions.Binomial(
                n, torch.tensor(0.3, dtype=torch.float64), validate_args=False
            )
            for n in lengths
        ]
        expected = -sum(b.log_prob(k) for b, k in zip(likely, counted, strict=True))
        slopes = torch.autograd.grad(expected, counted)
    else:
        shares = [k / n for n, k in zip(lengths, counts, strict=True)]
        expected = sum(
            n * (max(r - 0.3, 0) + max(0.2 - r, 0)) for n, r in zip(lengths, shares, strict=True)
        )
        slopes = [float(r > 0.3) - float(r < 0.2) for r in shares]
    expected = torch.as_tensor(expected).detach()
    assert float(found.detach()) == pytest.approx(float(expected), abs=1e-6)
    found.backward()
    for part, slope in zip(ends_T.grad.split(lengths), slopes, strict=True):
        assert part.tolist() == pytest.approx([float(slope)] * len(part), abs=1e-6)


def test_words_and_strides_end_where_they_say() -> None:
    text = b"two words\tand\nmore"
    ends = word_ends(torch.tensor(list(text)))
    assert [bytes([b]) for b, e in zip(text, ends.tolist(), strict=True) if e] == [
        b" ",
        b"\t",
        b"\n",
    ]
    layout = TokenLayout.from_lengths((5, 4))
    assert stride_ends(layout, 2).int().tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    for options, said in (
        ({"before": 2, "after": 2}, "leave none of 4 layers"),
        ({"prior": 1.0}, "prior=1.0: must be above 0 and below 1"),
        ({"slack": 0.5}, "slack=0.5: must be between 0 and prior=0.2"),
        ({"boundaries": "words", "scripts": [Script(0, 9, 0.3)]}, "scripts: must be empty"),
        ({"slack": 0.15, "scripts": [Script(0, 9, 0.1)]}, "must be at most a script's 0.1"),
        ({"boundaries": "syllables"}, "must be one of learned, stride, words"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, segments=SegmentsConfig(**options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give one of them"):
        replace(TINY, segments=SegmentsConfig(), mixture_of_depths=MixtureOfDepthsConfig())


SCRIPTS = [Script(0xD0, 0xD3, 0.1), Script(0xE0, 0xE9, 0.05)]
MIXED = "two слова и नमस्ते, mixed".encode()


def in_scripts() -> Decoder:
    torch.manual_seed(0)
    config = SegmentsConfig(prior=0.3, scripts=SCRIPTS)
    model = Decoder(replace(TINY, vocab_size=256, segments=config)).double()
    torch.nn.init.normal_(model.stack.gate.score.weight, std=1.0)
    torch.nn.init.zeros_(model.stack.gate.score.bias)  # or hardly a segment ends
    return model


def test_a_byte_is_of_its_characters_script_and_none_is_known_ahead() -> None:
    ids_T = torch.tensor(list(MIXED))
    characters = [c.encode() for c in MIXED.decode()]
    expected = [c[0] for c in characters for _ in c]
    assert lead_bytes(ids_T, TokenLayout.dense(1, len(ids_T))).tolist() == expected
    # In two texts, the second of which begins inside a character, behind one that is told.
    cut = MIXED.index("и".encode()) + 1
    halves = TokenLayout.from_lengths((cut, len(ids_T) - cut))
    assert lead_bytes(ids_T, halves)[cut] == 0
    assert lead_bytes(ids_T, halves, torch.tensor([0, 0xD0])).tolist() == expected


def test_every_script_has_its_gate_and_its_prior() -> None:
    model = in_scripts().train()
    torch.nn.init.zeros_(model.stack.gate.score.weight)
    for number, prior in enumerate((0.3, 0.1, 0.05)):
        torch.nn.init.constant_(model.stack.gate.score.bias[number], prior)
    ids_BS = torch.tensor([list(MIXED)])
    with RoutingTape(model) as tape:
        model(ids_BS)
    (record,) = tape.records
    script_T = model.stack.script_of[lead_bytes(ids_BS[0], TokenLayout.dense(1, ids_BS.shape[1]))]
    assert script_T.unique().tolist() == [0, 1, 2]
    assert torch.equal(record.scores, torch.tensor([0.3, 0.1, 0.05], dtype=torch.float64)[script_T])
    expected = 0.0
    for number, prior in enumerate((0.3, 0.1, 0.05)):
        ends = record.chosen[script_T == number]
        likely = torch.distributions.Binomial(len(ends), torch.tensor(prior).double())
        expected -= likely.log_prob(ends.sum().double()).item()
    assert tape.loss().item() == pytest.approx(expected / ids_BS.shape[1], rel=1e-6)


def test_scripts_are_causal_and_continue_in_a_cache() -> None:
    model = in_scripts().eval()
    ids_BS = torch.tensor([list(MIXED)])
    with torch.no_grad(), RoutingTape(model) as tape:
        logits = model(ids_BS)
        for changed in (5, 12, 21, 30):
            other_BS = ids_BS.clone()
            other_BS[0, changed] = 0xE4  # the first byte of another script
            torch.testing.assert_close(
                model(other_BS)[0, :changed], logits[0, :changed], rtol=0, atol=1e-13
            )
    assert 2 < int(tape.records[0].chosen.sum()) < ids_BS.shape[1]
    cache = Cache(model, 1)
    with torch.no_grad():
        steps = [model(ids_BS[:, i : i + 1], cache=cache) for i in range(ids_BS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=1e-12)
