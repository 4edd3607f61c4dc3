"""Documents packed into rows see nothing of one another, and cost nothing but their tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive import RoutingTape
from adaptive.models import Decoder
from adaptive.routing.layout import layout_from_documents
from launch.data.packing import Row, fit, load_rows, packed_rows, save_rows
from launch.data.text import Corpus, TextConfig
from launch.data.token_files import Ends, Tokens
from tests.distributed.subjects import FAMILIES as SUBJECTS

FAMILIES = sorted(set(SUBJECTS) - {"documents"})
SPAN = 16


@given(st.lists(st.integers(1, 32), min_size=1, max_size=300))
def test_pieces_fit_their_rows_and_rows_are_nearly_full(sizes: list[int]) -> None:
    lengths = np.array(sizes)
    rows, count = fit(lengths, 32)
    filled = np.bincount(rows, weights=lengths, minlength=count)
    assert filled.max() <= 32
    assert filled.min() > 0
    # No two rows fit into one, but for those that pieces of one length share.
    assert count <= 2 * (lengths.sum() / 32) + 1


def tokens_of(lengths: list[int]) -> Tokens:
    """Documents whose ids are all different, so that each token tells where it is from."""
    return Tokens(np.arange(1, sum(lengths) + 1), Ends.of(np.cumsum(lengths)))


def test_every_token_is_a_target_once_and_follows_its_own_document(tmp_path: Path) -> None:
    tokens = tokens_of([5, 40, 3, 16, 1, 17, 2, 2])
    packed = packed_rows(tokens, SPAN, long="split")
    save_rows(packed, tmp_path / "rows")
    packed = load_rows(tmp_path / "rows")
    begins = {0, *tokens.ends[:].tolist()}
    seen: list[int] = []
    for number in range(len(packed)):
        row = packed.row(number, tokens, span=SPAN, end=0)
        valid = row.documents >= 0
        assert valid.sum() == packed.tokens(number) == packed.targets(number, tokens)
        assert (row.targets[~valid] == -1).all()
        for own, target in zip(row.input_ids[valid], row.targets[valid], strict=True):
            assert own == (0 if target - 1 in begins else target - 1)
        seen += row.targets[valid].tolist()
    assert sorted(seen) == list(range(1, 87))
    assert packed.cut == 2
    assert packed.padding(SPAN) == pytest.approx(1 - 86 / (len(packed) * SPAN))


def test_long_conversations_are_cut_or_dropped_and_counted() -> None:
    counts = np.zeros(60, np.uint8)
    counts[[2, 35, 59]] = 1
    tokens = replace(tokens_of([5, 40, 15]), counts=counts)
    dropped = packed_rows(tokens, SPAN, long="drop")
    assert (dropped.cut, dropped.dropped, dropped.lengths.sum()) == (0, 1, 20)
    # What the assistant says of the second one is behind the cut.
    cut = packed_rows(tokens, SPAN, long="cut")
    assert (cut.cut, cut.dropped, cut.lengths.sum()) == (1, 1, 20)


def build(family: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(SUBJECTS[family].config)


LENGTHS = (7, 12, 1, 9)


def packed_losses(model: Decoder, ids_BS: torch.Tensor, documents_BS: torch.Tensor) -> torch.Tensor:
    layout, valid = layout_from_documents(documents_BS)
    ids_T = ids_BS.flatten()[valid]
    targets_T = (ids_T * 7 + 3) % model.config.vocab_size
    torch.manual_seed(1)
    with RoutingTape(model):
        return model.token_losses(ids_T[None], targets_T[None], layout=layout)


def test_positions_begin_anew_with_each_document() -> None:
    """Rotary embeddings hardly feel it where they do not: only differences count there."""
    layout, indices = layout_from_documents(torch.tensor([[0, 0, 0, 1, 2, -1], [0, 0, 1, 1, 1, 1]]))
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 5, 7, 11]
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 0, 1, 0, 1, 2, 3]
    assert layout.max_seqlen == 4
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_does_not_feel_the_others_of_its_row(family: str, training: bool) -> None:
    """Bit for bit, in training and evaluation; and its loss is the one that it has alone."""
    model = build(family).train(training)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (2, 32), generator=torch.Generator().manual_seed(3))
    documents = torch.full((2, 32), -1)
    place = 0
    for number, length in enumerate(LENGTHS):
        documents[:, place : place + length] = number
        place += length
    with torch.no_grad():
        before = packed_losses(model, ids, documents)
        changed = ids.clone()
        changed[0, 7:19] = (changed[0, 7:19] + 1) % vocab  # the second document of the first row
        after = packed_losses(model, changed, documents)
        others = torch.ones(len(before), dtype=torch.bool)
        others[7:19] = False
        assert not torch.equal(before[~others], after[~others])
        assert torch.equal(before[others], after[others])
        # What lies at padding is of no account at all.
        changed = ids.clone()
        changed[documents < 0] = 1
        assert torch.equal(packed_losses(model, changed, documents), before)
        start = 0
        for length in LENGTHS:
            own = ids[:1, start : start + length]
            alone = packed_losses(model, own, torch.zeros_like(own))
            torch.testing.assert_close(before[start : start + length], alone, atol=1e-6, rtol=1e-6)
            start += length


@pytest.mark.parametrize("family", ["dense", "mixture_of_depths"])
def test_masked_targets_have_no_loss_and_no_gradient(family: str) -> None:
    model = build(family)
    ids = torch.randint(model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1, 1)
    targets[:, :5] = -1
    losses = model.token_losses(ids, targets)
    assert not losses.view(2, 8)[:, :5].any()
    assert losses.view(2, 8)[:, 5:].all()
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # The same sum over the others only.
    model.token_losses(ids, ids.roll(-1, 1)).view(2, 8)[:, 5:].sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # a predictor learns from its own loss
            continue
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)
    model.zero_grad()
    model.token_losses(ids, torch.full_like(ids, -1)).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def write_texts(folder: Path) -> None:
    random = np.random.default_rng(0)
    rows = [{"text": f"<{n}>" + "x" * int(random.integers(1, 90))} for n in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_epoch_shows_every_packed_row_once(tmp_path: Path) -> None:
    write_texts(tmp_path)
    options: dict[str, Any] = {"path": str(tmp_path / "a.jsonl"), "cache": str(tmp_path / "cache")}
    data = Corpus(TextConfig(**options, seq_len=64, packing="documents", validation_fraction=0.1))
    source = data.sources[0]
    for epoch in range(2):
        places = [source.packed_place(5, epoch * source.rows + n) for n in range(source.rows)]
        assert sorted(places) == list(range(source.rows))
    texts = []
    for place in range(source.rows):
        row = source.packed_row("train", place)
        for number in range(row.documents.max() + 1):
            own = row.documents == number
            texts.append((bytes(row.input_ids[own].tolist()), bytes(row.targets[own].tolist())))
    # Inputs begin with the end of text, targets end with it: what `generate` begins and ends by.
    whole = [targets for inputs, targets in texts if inputs[:1] == b"\0"]
    assert all(inputs[1:] == targets[:-1] for inputs, targets in texts)
    joined = b"".join(bytes(document) for document in np.split(data.train, source.train.ends[:-1]))
    assert sum(map(len, (targets for _, targets in texts))) == len(joined)
    assert len(whole) == len(source.train.ends)
    assert "% padding" in data.describe()[0]
    _, held_out = data.held_out_row(data.held_out_rows - 1)
    assert isinstance(held_out, Row)
