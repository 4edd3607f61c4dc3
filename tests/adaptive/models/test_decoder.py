"""The decoder: padding, packed documents, causality, recomputation, bad configurations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import BatchScope, RoutingTape, TokenLayout, start_step
from adaptive.blocks.mixture_of_depths import MixtureOfDepths, MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=61, dim=32, num_layers=4, num_heads=4, num_kv_heads=2)
ROUTED = replace(CONFIG, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25))


def build(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).double()
    for module in model.modules():
        if isinstance(module, MixtureOfDepths):
            torch.nn.init.normal_(module.router.weight)
    return model


def ids(batch: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 61, (batch, seq_len), generator=generator)


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_padding_on_either_side_changes_no_logit(config: DecoderConfig) -> None:
    model = build(config)
    tokens = ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, 8:] = False
    logits = model(tokens, mask)
    torch.testing.assert_close(logits[0, 5:], model(tokens[:1, 5:])[0])
    torch.testing.assert_close(logits[1, :8], model(tokens[1:, :8])[0])
    assert not logits[~mask].any()


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_documents_packed_into_a_row_stay_apart(config: DecoderConfig) -> None:
    model = build(config)
    tokens = ids(1, 12)
    logits = model(tokens, layout=TokenLayout.from_lengths([5, 7]))
    torch.testing.assert_close(logits[0, :5], model(tokens[:, :5])[0])
    torch.testing.assert_close(logits[0, 5:], model(tokens[:, 5:])[0])


@pytest.mark.parametrize("config", [CONFIG, ROUTED], ids=["dense", "routed"])
def test_changing_a_token_changes_no_earlier_logit(config: DecoderConfig) -> None:
    model = build(config).eval()
    tokens = ids(1, 16)
    before = model(tokens)
    for t in range(16):
        changed = tokens.clone()
        changed[0, t:] = (changed[0, t:] + 1 + t) % 61
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_training_choice_is_not_causal() -> None:
    """The test above can fail: expert choice sees the future."""
    model = build(ROUTED)
    tokens = ids(1, 16)
    before = model(tokens)
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 61
    assert not torch.allclose(model(changed)[:, :8], before[:, :8])


def test_token_losses_are_the_cross_entropy_of_the_logits() -> None:
    model = build(ROUTED)
    tokens, targets = ids(2, 8), ids(2, 8).flip(1)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    losses = model.token_losses(tokens, targets, mask)
    logp = torch.log_softmax(model(tokens, mask)[mask], -1)
    expected = -logp[torch.arange(13), targets[mask]]
    torch.testing.assert_close(losses, expected, check_dtype=False)


def test_recomputation_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        model = build(replace(ROUTED, recompute=recompute))
        with RoutingTape(model) as tape:
            loss = model.token_losses(ids(2, 16), ids(2, 16).roll(-1, 1)).mean()
        (loss + tape.loss()).backward()
        assert len(tape.records) == 2
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, gradients[1][name])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_losses_do_not_depend_on_how_the_batch_is_split(parts: int) -> None:
    """Trap: a mean of means. Rows have different lengths, so parts have different token counts."""
    model = build(ROUTED)
    tokens = ids(4, 12)
    mask = torch.arange(12)[None] < torch.tensor([12, 5, 9, 3])[:, None]
    total = int(mask.sum())
    values = 0.0
    for rows in torch.arange(4).chunk(parts):
        scope = BatchScope(tokens=total, replicas=parts)
        with RoutingTape(model, scope=scope) as tape:
            losses = model.token_losses(tokens[rows], tokens[rows].flip(1), mask[rows])
        # What an engine does: the mean over parts.
        loss = (losses.sum() * parts / total + tape.loss()) / parts
        loss.backward()
        values += loss.item()
    whole = build(ROUTED)
    with RoutingTape(whole) as tape:
        losses = whole.token_losses(tokens, tokens.flip(1), mask)
    loss = losses.mean() + tape.loss()
    loss.backward()
    assert values == pytest.approx(loss.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_annealing_reaches_every_routed_layer() -> None:
    config = replace(CONFIG, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.25, anneal_steps=4))
    model = build(config)
    start_step(model, 2)
    with RoutingTape(model) as tape:
        model(ids(1, 16))
    assert [record.executed for record in tape.records] == [10, 10]
    start_step(model, 100)
    with RoutingTape(model) as tape:
        model(ids(1, 16))
    assert [record.executed for record in tape.records] == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5: must divide dim=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"num_layers": 0}, "num_layers=0: must be at least 1"),
        ({"norm": "batch"}, "norm='batch': must be rms or parameter_free"),
        ({"rotary_fraction": 2.0}, r"rotary_fraction=2.0: must be in \[0, 1\]"),
        ({"ffn_dim": -1}, "ffn_dim=-1: must be at least 1"),
        ({"rope_base": 0.0}, "rope_base=0.0: must be above 0"),
        ({"rope_base": float("nan")}, "rope_base=nan: must be above 0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0: must be 0 or more"),
        ({"init_std": -1.0}, "init_std=-1.0: must be 0 or more"),
    ],
)
def test_wrong_configurations_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (8,)])
def test_masks_and_targets_have_the_shape_of_the_ids(shape: tuple[int, ...]) -> None:
    """Of a mask, what it is True at was read off the flattened ids, whosever tokens these are."""
    model, other = build(CONFIG), torch.ones(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_mask of shape .*: must be \[2, 4\]"):
        model(ids(2, 4), other)
    with pytest.raises(ValueError, match=r"targets of shape .*: must be \[2, 4\]"):
        model.token_losses(ids(2, 4), other)


def test_layout_and_mask_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="layout and token_mask: give one of them"):
        build(CONFIG)(ids(1, 4), torch.ones(1, 4).bool(), layout=TokenLayout.dense(1, 4))
