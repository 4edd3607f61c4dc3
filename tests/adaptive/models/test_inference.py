"""Generation's own way through the layers gives the modules' logits, whoever comes and goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from adaptive.blocks.segments import SegmentsConfig
from adaptive.models import Decoder
from adaptive.models.decoder import batch as batches
from adaptive.models.decoder.batch import Batch, Pass
from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.continuous import generate_all
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.inference import Choice, Inference
from adaptive.models.decoder.products import Product
from adaptive.routing.tape import RoutingTape
from tests.adaptive.models.test_cache import CONFIGS, DENSE, VOCAB, build

EXACT = 1e-9  # in float64; float32 within the 1e-5 below


def rows(*lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCAB, (n,), generator=drawn).tolist() for n in lengths]


def behind(model: Decoder, texts: list[list[int]]) -> Tensor:
    """The modules' logits behind each text, alone and whole."""
    return torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("piece", [2048, 12], ids=["whole prompts", "in pieces"])
def test_sequences_come_and_go_and_each_is_as_if_alone(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_PIECE", piece)
    model = build(name).double()
    together = Batch(Inference(model, rows=6))
    texts = rows(9, 1, 17)
    drawn = torch.Generator().manual_seed(5)

    def check(logits: Tensor, of: list[list[int]]) -> None:
        torch.testing.assert_close(logits, behind(model, of), atol=EXACT, rtol=EXACT)

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = torch.randint(0, VOCAB, (len(texts),), generator=drawn).tolist()
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            check(together.step(tokens), texts)

    check(together.begin(texts), texts)
    steps(3)
    more = rows(5, 5, 22)
    check(together.begin(more), more)
    texts += more
    steps(4)  # six of different lengths: padded to one call
    together.stay([0, 2, 5])
    texts = [texts[0], texts[2], texts[5]]
    steps(2)
    together.stay([1])
    texts = [texts[1]]
    steps(2)
    assert together.cache.counts.tolist() == [len(texts[0])]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "mixture_of_depths", "skip_layer"])
def test_modules_go_on_from_its_cache_and_it_from_theirs(name: str) -> None:
    model = build(name).double()
    (text,) = rows(30)
    together = Batch(Inference(model))
    together.begin([text[:10]])
    cache = together.cache
    model(torch.tensor([text[10:13]]), cache=cache)
    torch.testing.assert_close(
        together.step([text[13]]), behind(model, [text[:14]]), atol=EXACT, rtol=EXACT
    )
    cache.rewind(torch.tensor([8]))
    rest = model(torch.tensor([text[8:20]]), cache=cache)
    torch.testing.assert_close(rest[0, -1:], behind(model, [text[:20]]), atol=EXACT, rtol=EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_it_tells_what_modules_tell(name: str) -> None:
    """Executed tokens, keys and choices of every routed layer, in every pass."""
    model = build(name)
    texts, told, passes = rows(7, 3), [], []

    def note(done: Pass) -> None:
        made = [r.record() if isinstance(r, Choice) else r for r in done.records]
        told.append({r.name: r for r in made})
        passes.append(done)

    together = Batch(Inference(model))
    together.begin(texts, note)
    for token in (4, 8, 15):
        together.step([token, token + 1], note)
    cache = Cache(model, 2)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    given = [(torch.tensor([texts[0], texts[1] + [0] * 4]), mask)]
    given += [
        (torch.tensor([[token], [token + 1]]), torch.ones(2, 1).bool()) for token in (4, 8, 15)
    ]
    for found, done, (ids, valid) in zip(told, passes, given, strict=True):
        with RoutingTape(model) as tape:
            model(ids, valid, cache=cache)
        assert list(done.keys) == cache.counts.tolist()
        for record in tape.records:
            if record.name not in found:  # inside a layer that no token entered
                assert int(record.executed) == 0
                continue
            mine = found[record.name]
            assert int(mine.executed) == int(record.executed)
            for field in ("executed_lengths", "key_lengths", "chosen"):
                wanted, got = getattr(record, field), getattr(mine, field)
                assert (wanted is None) == (got is None)
                if wanted is not None and (field != "key_lengths" or int(record.executed)):
                    assert got.tolist() == wanted.tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"qk_norm": True},
        {"head_dim": 6},
        {"qk_norm": "projection", "rotary_fraction": 0.5},
        {"rotary_fraction": 0},
    ],
    ids=str,
)
def test_every_kind_of_attention(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(DENSE, init_std=0.3, **options))  # type: ignore[arg-type]
    model = model.double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0)
    texts = rows(9, 4)
    together = Batch(Inference(model))
    torch.testing.assert_close(together.begin(texts), behind(model, texts), atol=1e-5, rtol=1e-5)
    texts = [[*text, 3] for text in texts]
    torch.testing.assert_close(together.step([3, 3]), behind(model, texts), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_float32_it_errs_as_the_modules_do_also_beyond_the_longest_sequence() -> None:
    """One row has its own norm; rotary tables grow. Weights are wide: logits are of order ten.

    A row times a matrix is summed term by term, a matrix's product in blocks: 2.3 times was seen.
    """
    model, exact = build("mixture_of_depths").float(), build("mixture_of_depths")
    model.config = dataclasses.replace(model.config, max_seq_len=16)
    together, errors = Batch(Inference(model)), []
    (text,) = rows(6)
    together.begin([text])
    for token in range(40):
        text.append(token)
        wanted = behind(exact, [text])
        both = together.step([token]), behind(model, [text])
        errors.append([float((logits.double() - wanted).abs().max()) for logits in both])
    ours, theirs = (max(errs) for errs in zip(*errors, strict=True))
    assert ours < 4 * theirs < 2e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [24, 1100], ids=["copied", "too large to copy"])
def test_products_are_those_of_linear_layers(rows: int, bias: bool, width: int) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(width, width), torch.randn(8, width)]
    bias_O = torch.randn(width + 8) if bias else None
    x_TI, residual_TO = torch.randn(rows, width), torch.randn(rows, width + 8)
    wanted = x_TI.double() @ torch.cat(weights).double().t()
    wanted = wanted if bias_O is None else wanted + bias_O
    for made_for in (1, 16):
        product = Product(weights, bias_O, rows=made_for)
        close = {"atol": 1e-3, "rtol": 1e-5}  # sums of 1,100 numbers of order one
        torch.testing.assert_close(product(x_TI).double(), wanted, **close)
        torch.testing.assert_close(
            product.added(residual_TO, x_TI).double(), residual_TO + wanted, **close
        )
        torch.testing.assert_close(product.part(x_TI, 1).double(), wanted[:, width:], **close)


def test_a_hooked_module_is_called() -> None:
    """Engines that share weights gather them in hooks."""
    model = build("dense")
    called = []
    for module in (model.layers[1].attention.query, model.embedding, model.output):
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    *_, made = generate(model, [[1, 2]], max_new_tokens=3, sampling=Sampling(0.0))
    assert len(called) == 9
    *_, plain = generate(build("dense"), [[1, 2]], max_new_tokens=3, sampling=Sampling(0.0))
    assert made.tokens == plain.tokens


@pytest.mark.parametrize("name", ["dense", "mixture_of_depths", "skip_layer", "segments"])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_continuous_batches_make_the_texts_of_prompts_alone(name: str, size: int) -> None:
    if name == "segments":
        torch.manual_seed(0)
        config = dataclasses.replace(DENSE, segments=SegmentsConfig(), init_std=0.3)
        model = Decoder(config).double().eval()
    else:
        model = build(name).double()
    prompts = rows(3, 30, 1, 8, 8, 2, 17)
    alone = []
    for prompt in prompts:
        *_, made = generate(model, [prompt], max_new_tokens=7, sampling=Sampling(0.0))
        alone.append(made.tokens[0])
    end = alone[1][2]
    wanted = [text[: text.index(end) + 1] if end in text else text for text in alone]
    taken: list[int] = []

    def given() -> Iterator[tuple[int, list[int]]]:
        for key, prompt in enumerate(prompts):
            taken.append(key)
            yield key, prompt

    options = {"max_new_tokens": 7, "sampling": Sampling(0.0), "end": end, "batch_size": size}
    made_by_key, most = {}, 0
    for made in generate_all(model, given(), **options):  # type: ignore[arg-type]
        assert made.key not in made_by_key
        made_by_key[made.key] = made
        most = max(most, len(taken) - len(made_by_key) + 1)
    assert most <= size
    assert [list(made_by_key[key].tokens) for key in range(7)] == wanted
    assert [made_by_key[key].ended for key in range(7)] == [end in text for text in alone]


def test_what_a_prompt_draws_is_its_own_affair() -> None:
    model = build("mixture_of_depths").double()
    prompts = list(enumerate(rows(3, 9, 1, 5)))
    options = {"max_new_tokens": 6, "sampling": Sampling(0.9, top_k=20), "seed": 3}
    texts = [
        {made.key: made.tokens for made in generate_all(model, given, batch_size=size, **options)}  # type: ignore[arg-type]
        for given, size in ((prompts, 1), (prompts, 4), (prompts[::-1], 2))
    ]
    assert texts[0] == texts[1] == texts[2]
