"""Speculation makes what plain sampling makes, whatever drafts and however much."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.blocks.pattention import PattentionConfig
from adaptive.blocks.sized_feed_forward import SizedFeedForwardConfig
from adaptive.blocks.skip_layer import SkipLayerConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.speculation.controllers import (
    Confidence,
    Controller,
    Fixed,
    Thompson,
    worthwhile,
)
from adaptive.models.decoder.speculation.drafts import (
    Draft,
    ExitDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
)
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter, distil_adapter
from adaptive.models.decoder.speculative import Speculation, speculate

GREEDY = Sampling(temperature=0)

FAMILIES = {
    "dense": {},
    "mixture_of_depths": {"mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5)},
    "sliding_windows": {
        "mixture_of_depths": MixtureOfDepthsConfig(capacity=0.5),
        "sliding_window": 5,
        "window_layers": [0, 3],
    },
    "skip_layer": {"skip_layer": SkipLayerConfig()},
    "skip_layer_executing_keys": {"skip_layer": SkipLayerConfig(keys="executing")},
    "sized": {"sized_feed_forward": SizedFeedForwardConfig()},
    "experts": {"mixture_of_experts": MixtureOfExpertsConfig(num_experts=4, ffn_dim=16)},
    "pattention": {"pattention": PattentionConfig(tokens=16, ffn_tokens=32)},
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [PROMPT, [2, 7], [1, 8, 2, 8, 1]]


def decoder(family: str = "dense", layers: int = 4, vocab_size: int = 32) -> Decoder:
    """Wide initial weights, so that routers and likeliest tokens are decided."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=vocab_size,
        dim=16,
        num_layers=layers,
        num_heads=2,
        ffn_dim=32,
        max_seq_len=64,
        init_std=0.5,
        **FAMILIES[family],
    )
    return Decoder(config).double().eval()


def untrained(model: Decoder, exit_layer: int = 2) -> ExitDraft:
    return ExitDraft(ExitAdapter.of(model, exit_layer))


DRAFTS: dict[str, Callable[[Decoder], Draft]] = {
    "exit": untrained,
    "model": lambda model: ModelDraft(decoder(layers=2)),
    "ngram": lambda model: NgramDraft(),
    "recycling": lambda model: RecyclingDraft(),
}


def last(*arguments: object, **options: object) -> Speculation:
    *_, made = speculate(*arguments, **options)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("draft", DRAFTS)
def test_text_is_that_of_greedy_decoding(family: str, draft: str) -> None:
    """Three sequences that keep different numbers of drafts: caches rewind each alone."""
    model = decoder(family)
    *_, plain = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    made = last(model, PROMPTS, DRAFTS[draft](model), max_new_tokens=20, sampling=GREEDY)
    assert made.tokens == plain.tokens
    assert made.accepted < made.drafted  # drafts are wrong sometimes
    assert made.accepted + made.rounds == 3 * 20


@pytest.mark.parametrize(
    ("controller", "drafts"), [(Confidence(0.3, 4), True), (Thompson(4), True), (Fixed(0), False)]
)
def test_text_is_that_of_greedy_decoding_under_every_controller(
    controller: Controller, drafts: bool
) -> None:
    model = decoder("mixture_of_depths")
    *_, plain = generate(model, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    made = last(
        model,
        PROMPTS,
        untrained(model),
        max_new_tokens=20,
        sampling=GREEDY,
        controller=controller,
    )
    assert made.tokens == plain.tokens
    assert (made.drafted > 0) == drafts


class Tables:
    """A draft and a model that know one token back: distributions are known exactly."""

    def __init__(self, vocab_size: int, *, same: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, vocab_size, vocab_size, generator=generator) * 1.5
        self.target, self.draft = drawn[0], drawn[0 if same else 1] / 2 + drawn[0] / 2

    def begin(self, inference: Inference, batch_size: int) -> "Tables":
        return self

    def propose(self, rows_B: Sequence[Sequence[int]]) -> Tensor:
        return self.draft[[row[-1] for row in rows_B if row]]

    def verify(self, rows_B: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor:
        pairs = zip(rows_B, wanted, strict=True)
        return self.target[[t for row, count in pairs for t in row[len(row) - count :]]]

    def rewind(self, counts: Sequence[int]) -> None:
        return


def chi_square(tokens: Sequence[int], expected_V: Tensor) -> float:
    """Probability of a larger statistic than that of these tokens; rare ones count together."""
    expected = expected_V.double() * len(tokens)
    found = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert found[expected == 0].sum() == 0
    rare = expected < 5
    expected, found = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, found))
    keep = expected > 0
    statistic = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = torch.tensor((int(keep.sum()) - 1) / 2).double()
    return float(torch.special.gammaincc(freedom, statistic / 2))


TOP_P = Sampling(1.0, top_p=0.8)


@pytest.mark.parametrize(
    ("controller", "sampling"),
    [
        (Fixed(3), TOP_P),
        (Confidence(0.15, 3), TOP_P),
        (Thompson(3), TOP_P),
        (Fixed(3), Sampling(0.7, top_k=9)),
    ],
)
def test_tokens_are_distributed_as_those_of_the_model(
    controller: Controller, sampling: Sampling
) -> None:
    """Chi-square on 50 tokens: of the fourth token, whichever drafts were taken before it."""
    tables = Tables(50)
    model = decoder(layers=2, vocab_size=50)
    made = last(
        model,
        [[7]] * 4000,
        tables,
        max_new_tokens=4,
        sampling=sampling,
        controller=controller,
        generator=torch.Generator().manual_seed(1),
    )
    assert 0 < made.accepted < made.drafted
    steps_VV = sampling.probabilities(tables.target).double()
    expected_V = steps_VV[7]
    for place in range(4):
        assert chi_square([row[place] for row in made.tokens], expected_V) > 1e-3
        expected_V = expected_V @ steps_VV


def test_chi_square_sees_another_distribution() -> None:
    """The control: a draft's own tokens, and those of another cut."""
    tables = Tables(50)
    generator = torch.Generator().manual_seed(0)
    for drawn in (tables.draft[7], tables.target[7] / 0.9):
        tokens = torch.multinomial(drawn.softmax(-1), 4000, True, generator=generator).tolist()
        assert chi_square(tokens, tables.target[7].softmax(-1)) < 1e-3


def test_share_of_drafts_taken_is_the_overlap_of_the_distributions() -> None:
    tables, sampling = Tables(50), TOP_P
    made = last(
        decoder(layers=2, vocab_size=50),
        [[7]] * 4000,
        tables,
        max_new_tokens=2,
        sampling=sampling,
        controller=Fixed(1),
        generator=torch.Generator().manual_seed(1),
    )
    p, q = (sampling.probabilities(x[7:8]) for x in (tables.draft, tables.target))
    overlap = float(torch.minimum(p, q).sum())
    # The first token of 4,000; a second draft has no room.
    assert made.drafted == 4000
    assert abs(made.acceptance - overlap) < 4 * (overlap * (1 - overlap) / 4000) ** 0.5


@pytest.mark.parametrize("draft", ["exit", "model"])
def test_sampled_text_of_a_routed_decoder_has_its_distribution(draft: str) -> None:
    """The whole way: caches, routed layers, and rows of a batch that keep different drafts."""
    model = decoder("mixture_of_depths", layers=3)
    sampling = Sampling(2.0, top_p=0.9)
    made = last(
        model,
        [PROMPT] * 400,
        ModelDraft(decoder(layers=1)) if draft == "model" else untrained(model, 1),
        max_new_tokens=3,
        sampling=sampling,
        controller=Fixed(2),
        generator=torch.Generator().manual_seed(2),
    )
    assert 0 < made.accepted < made.drafted
    with torch.no_grad():
        first_V = sampling.probabilities(model(torch.tensor([PROMPT]))[:, -1])[0].double()
        texts = torch.tensor([[*PROMPT, token] for token in range(32)])
        second_VV = sampling.probabilities(model(texts)[:, -1]).double()
    assert chi_square([row[0] for row in made.tokens], first_V) > 1e-3
    assert chi_square([row[1] for row in made.tokens], first_V @ second_VV) > 1e-3


def test_a_draft_that_is_the_model_is_always_taken() -> None:
    """Residuals without mass are never drawn from; a round makes all its drafts and one more."""
    made = last(
        decoder(layers=2, vocab_size=50),
        [[7]] * 50,
        Tables(50, same=True),
        max_new_tokens=12,
        sampling=TOP_P,
        controller=Fixed(3),
    )
    assert made.acceptance == 1
    assert made.rounds == 50 * 3
    assert made.tokens_per_round == 4


def test_early_layers_are_computed_once_and_late_ones_at_most_once_a_token_kept() -> None:
    model = decoder()
    seen = {0: 0, 3: 0}
    for index in seen:
        model.layers[index].ffn.register_forward_hook(
            lambda _, args, out, index=index: seen.update({index: seen[index] + args[0].shape[0]})
        )
    made = last(model, [PROMPT], untrained(model), max_new_tokens=20, sampling=GREEDY)
    # Each draft and each token that follows a round, once; the last is never computed.
    assert seen[0] == seen[3] == len(PROMPT) + made.drafted + made.rounds - 1


@torch.no_grad()
@pytest.mark.parametrize("draft", ["exit", "model"])
def test_a_draft_forgets_what_was_rejected(draft: str) -> None:
    """The text would be right all the same, and drafts worse."""
    model = decoder("mixture_of_depths")
    drafter = DRAFTS[draft](model)
    used, fresh = (drafter.begin(Inference(model), 2) for _ in range(2))
    rows, drafts = [PROMPT, PROMPT[:3]], [[7, 8, 9], [10]]
    used.propose(rows)
    longer = [row + new for row, new in zip(rows, drafts, strict=True)]
    used.propose(longer)
    used.verify(longer, [4, 2])
    kept = [len(PROMPT) + 1, 3]
    used.rewind(kept)
    rows = [[*row[:count], 30] for row, count in zip(longer, kept, strict=True)]
    torch.testing.assert_close(used.propose(rows), fresh.propose(rows))


def test_generation_ends_at_the_end_of_the_text_and_of_the_longest_sequence() -> None:
    model = decoder()
    *_, plain = generate(model, PROMPTS, max_new_tokens=1000, sampling=GREEDY)
    made = last(model, PROMPTS, untrained(model, 1), max_new_tokens=1000, sampling=GREEDY)
    assert made.tokens == plain.tokens
    end = plain.tokens[0][5]
    *_, plain = generate(model, PROMPTS, max_new_tokens=30, sampling=GREEDY, end=end)
    made = last(model, PROMPTS, untrained(model), max_new_tokens=30, sampling=GREEDY, end=end)
    assert made.tokens == plain.tokens
    assert list(speculate(model, PROMPTS, NgramDraft(), max_new_tokens=0)) == []


def test_ngrams_draft_what_followed_and_recycled_candidates_what_was_likeliest() -> None:
    model = decoder()
    text = [5, 6, 7, 8, 5, 6]
    run = NgramDraft().begin(Inference(model), 1)
    assert run.propose([text]).isneginf().all()  # Nothing has been read yet.
    run.verify([text], [1])
    assert int(run.propose([text]).argmax()) == 7
    assert int(run.propose([[*text, 7]]).argmax()) == 8
    assert run.propose([[*text, 30]]).isneginf().all()
    draft = RecyclingDraft()
    run = draft.begin(Inference(model), 1)
    # A token not met yet drafts nothing, not token 0.
    assert run.propose([text]).isneginf().all()
    logits = run.verify([text], [6])
    # 5 stands twice: the later candidate stays.
    assert int(draft.candidates[5, 0]) == int(logits[4].argmax())
    assert int(draft.begin(Inference(model), 1).propose([[6]]).argmax()) == int(logits[5].argmax())


def test_worthwhile_numbers_of_drafts() -> None:
    """Speed-up of a number of drafts by its definition; the best of them is chosen."""
    for share in (0.1, 0.5, 0.7, 0.9):
        for cost in (0.05, 0.1, 0.3, 1.1):
            speed = [
                sum(share**i for i in range(count + 1)) / (1 + count * cost) for count in range(21)
            ]
            assert worthwhile(share, cost, 20) == speed.index(max(speed))
    # The optima that the rule was derived with.
    found = [worthwhile(*at, 20) for at in ((0.7, 0.1), (0.7, 0.3), (0.9, 0.1), (0.5, 0.3))]
    assert found == [4, 2, 10, 1]


@pytest.mark.parametrize(
    ("taken", "cost", "least", "most"), [(0.9, 0.1, 5, 8), (0.6, 0.9, 0, 0.3), (0.05, 0.2, 0, 0.5)]
)
def test_thompson_drafts_where_it_pays_and_rests_where_not(
    taken: float, cost: float, least: float, most: float
) -> None:
    controller = Thompson(8)
    chance = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(400):
        count = controller.most()
        kept = 0
        while kept < count and float(torch.rand((), generator=chance)) < taken:
            kept += 1
        controller.learn([count], [kept], draft_seconds=cost * count, verify_seconds=1.0)
        counts.append(count)
    assert least <= sum(counts[100:]) / 300 <= most


@pytest.mark.parametrize("cost", [0.3, 1.0, 3.0])
def test_thompson_loses_little_where_no_draft_is_taken(cost: float) -> None:
    """Generations of 160 tokens, also where a draft reads what it has missed: below 3%."""
    controller, drafts, missed = Thompson(8), 0, 0
    for _ in range(4):
        for place in range(160):
            count = controller.most()
            missed = 0 if count else missed + 1
            seconds = cost * count + (0.01 * missed if count else 0.0)
            controller.learn(
                [count], [0], draft_seconds=seconds, verify_seconds=1.0 + 5.0 * (not place)
            )
            drafts += count
    assert 0 < drafts * cost < 0.03 * 640


def test_drafts_cost_nothing_until_something_is_drafted() -> None:
    """A small model is not made ready; logits wait to be read, and not for ever."""
    model = decoder()
    small = decoder(layers=2)
    small.layers[0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    recycling = RecyclingDraft()
    for draft in (ModelDraft(small), recycling):
        last(model, [PROMPT], draft, max_new_tokens=20, controller=Fixed(0))
    assert len(recycling._unread) == 20
    last(model, [PROMPT], recycling, max_new_tokens=20, controller=Fixed(0))
    assert len(recycling._unread) < 20


def test_distilling_makes_drafts_that_are_accepted() -> None:
    model = decoder()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = ExitAdapter.of(model, 3).double()
    torch.manual_seed(0)
    batches = [torch.randint(32, (8, 24)) for _ in range(60)]
    steps = list(distil_adapter(model, adapter, batches, learning_rate=1e-2))
    assert steps[-1][0] < steps[0][0]
    assert steps[-1][1] > steps[0][1] + 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_has_the_dtype_of_its_model(dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    adapter = ExitAdapter.of(model, 2)
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    assert len(last(model, [PROMPT], ExitDraft(adapter), max_new_tokens=4).tokens[0]) == 4


def test_what_cannot_be_is_named() -> None:
    model, draft = decoder(), NgramDraft()

    def refused(message: str, *arguments: object, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            last(*arguments, max_new_tokens=2, **options)

    refused("verification=tree: must be chain or greedy", model, [[1]], draft, verification="tree")
    refused("temperature=1.0: must be 0", model, [[1]], draft, verification="greedy")
    refused("prompt: must have at least one", model, [[]], draft)
    small = ModelDraft(decoder(vocab_size=16))
    refused("vocab_size=16 of the draft: must be the model's, 32", model, [[1]], small)
    adapter = ExitAdapter.of(decoder(layers=6), 5)
    refused("exit_layer=5: must be between 1 and 3", model, [[1]], ExitDraft(adapter))
    depths = MixtureOfDepthsConfig(predictor="none")
    ahead = Decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, mixture_of_depths=depths))
    refused("looking at later ones", ahead, [[1]], draft)
    with pytest.raises(ValueError, match="looking at later ones"):
        ModelDraft(ahead)
    for make, message in (
        (lambda: Fixed(-1), "count=-1: must be 0 or more"),
        (lambda: Confidence(2.0), r"threshold=2.0: must be in \[0, 1\]"),
        (lambda: Thompson(forget=0.0), r"forget=0.0: must be in \(0, 1\]"),
        (lambda: Thompson(loss=1.0), r"loss=1.0: must be in \(0, 1\)"),
        (lambda: NgramDraft(0), "longest=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
