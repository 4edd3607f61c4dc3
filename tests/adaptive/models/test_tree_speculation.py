"""Trees of drafts: verified in one pass, kept as a path, and what comes out is plain sampling."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.speculation.controllers import Fixed, Thompson
from adaptive.models.decoder.speculation.drafts import (
    Draft,
    ExitDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
)
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter
from adaptive.models.decoder.speculation.trees import (
    Budgeted,
    Independent,
    Shape,
    Tree,
    chosen_tree,
    taken_path,
    template,
)
from adaptive.models.decoder.speculation.verification import (
    Verdict,
    chain,
    k_seq,
    recursive_acceptance,
)
from adaptive.models.decoder.speculative import Speculation
from adaptive.models.decoder.tree_speculation import speculate_trees
from tests.adaptive.models.test_speculative import (
    FAMILIES,
    GREEDY,
    PROMPT,
    PROMPTS,
    TOP_P,
    Tables,
    chi_square,
    decoder,
)

SHAPES: dict[str, Shape] = {
    "budgeted": Budgeted(7),
    "k-seq": Independent(3, 2),
    "recursive": Independent(3, 2, rule="recursive"),
}


def last(*arguments: object, **options: object) -> Speculation:
    *_, made = speculate_trees(*arguments, **options)  # type: ignore[arg-type]
    return made


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_node_sees_its_ancestors_alone_and_a_path_is_kept(family: str) -> None:
    """Logits of every node are those of its path as a text, also behind a kept path with gaps."""
    model = decoder(family)
    run = NgramDraft().begin(Inference(model), 2)
    trees = [Tree([7, 8, 9, 10, 11], [-1, -1, 1, 0, 2]), Tree([4, 4], [-1, 0])]
    rows = [list(PROMPT), [2, 7, 1]]
    for _ in range(3):
        logits, starts = run.verify_trees(rows, trees)  # type: ignore[attr-defined]
        for row, tree, start in zip(rows, trees, starts, strict=True):
            for node in range(-1, len(tree.tokens)):
                text = [*row, *(tree.tokens[step] for step in tree.path(node))]
                wanted = model(torch.tensor([text]))[0, -1]
                torch.testing.assert_close(logits[start + node + 1], wanted, atol=1e-9, rtol=1e-9)
        run.keep_paths([[0, 2, 3], [0]])  # type: ignore[attr-defined]  # nodes 1 and 2
        rows = [[*rows[0], 8, 9, 12], [*rows[1], 3]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", ["recycling", *SHAPES])
def test_text_is_that_of_greedy_decoding(family: str, kind: str) -> None:
    model = decoder(family)
    draft: Draft = RecyclingDraft() if kind == "recycling" else ModelDraft(decoder(layers=2))
    *_, plain = generate(model, PROMPTS, max_new_tokens=14, sampling=GREEDY)
    shape = SHAPES.get(kind, Budgeted(9))
    for controller in (Fixed(1), Thompson(4)):
        made = last(
            model,
            PROMPTS,
            draft,
            max_new_tokens=14,
            shape=shape,
            sampling=GREEDY,
            controller=controller,
        )
        assert made.tokens == plain.tokens
        assert made.accepted + made.rounds == 3 * 14
    end = plain.tokens[0][5]
    *_, plain = generate(model, PROMPTS, max_new_tokens=14, sampling=GREEDY, end=end)
    made = last(model, PROMPTS, draft, max_new_tokens=14, shape=shape, sampling=GREEDY, end=end)
    assert made.tokens == plain.tokens


class TreeTables(Tables):
    """As `Tables`, which also fills a template with the likeliest of another table if asked."""

    def __init__(self, *, chosen: bool) -> None:
        super().__init__(50)
        if chosen:
            self.candidates_of = lambda token: self.draft[token].topk(4).indices.tolist()

    def retract(self, counts: Sequence[int]) -> None:
        return

    def verify_trees(
        self, rows_B: Sequence[Sequence[int]], trees_B: Sequence[Tree]
    ) -> tuple[Tensor, list[int]]:
        pairs = zip(rows_B, trees_B, strict=True)
        nodes = [[row[-1], *tree.tokens] if row else [] for row, tree in pairs]
        starts = [0, *torch.tensor([len(row) for row in nodes]).cumsum(0).tolist()]
        return self.target[[token for row in nodes for token in row]], starts[:-1]

    def keep_paths(self, paths_B: Sequence[Sequence[int]]) -> None:
        return


def place_of(kind: str) -> tuple[TreeTables, Tensor, Tensor, int]:
    """Tables, what draft and model draw from, and a token behind which half the drafts are taken.

    Where nearly all or none are, a wrong rule is hardly seen.
    """
    tables = TreeTables(chosen=kind == "chosen")
    p_VV, q_VV = (TOP_P.probabilities(x).double() for x in (tables.draft, tables.target))
    start = int((torch.minimum(p_VV, q_VV).sum(1) - 0.57).abs().argmin())
    return tables, p_VV, q_VV, start


@pytest.mark.parametrize("kind", ["chosen", *SHAPES])
def test_a_tree_makes_a_token_of_the_model(kind: str) -> None:
    """Chi-square on 50 tokens at temperature 1 with top-p: the first token behind a tree."""
    tables, p_VV, q_VV, start = place_of(kind)
    chance = torch.Generator().manual_seed(1)
    shape = SHAPES.get(kind, Budgeted(6))
    firsts, longer = [], 0
    for _ in range(2500):
        if kind == "chosen":
            tree = chosen_tree(tables.candidates_of, start, 6)
        else:
            tree = shape.grow(lambda path: p_VV[path[-1] if path else start], chance)
        path, token = taken_path(tree, q_VV[[start, *tree.tokens]], shape.judge, chance)
        firsts.append(tree.tokens[path[0]] if path else token)
        longer += bool(path)
    assert chi_square(firsts, q_VV[start]) > 1e-3
    assert 300 < longer < 2500


K_SEQ_ALIKE: dict[str, Callable[[Tensor, Tensor, float], tuple[float, Tensor]]] = {
    "right": lambda p, q, rho: (rho, k_seq(p, q, 3).residual),
    "each as if it were alone": lambda p, q, rho: (1, chain(p, q).residual),
    "the largest rho": lambda p, q, rho: (3, k_seq(p, q, 3).residual),
    "what one draft leaves": lambda p, q, rho: (rho, chain(p, q).residual),
    "the model's own token": lambda p, q, rho: (rho, q),
}


@pytest.mark.parametrize("rule", K_SEQ_ALIKE)
def test_chi_square_of_trees_tells_k_seq_from_what_resembles_it(rule: str) -> None:
    _, p_VV, q_VV, start = place_of("k-seq")
    p_V, q_V = p_VV[start], q_VV[start]
    rho, residual_V = K_SEQ_ALIKE[rule](p_V, q_V, float(k_seq(p_V, q_V, 3).rho))
    accept_V = torch.where(p_V > 0, q_V / (rho * p_V), 0).clamp(max=1)
    chance = torch.Generator().manual_seed(1)
    firsts = []
    for _ in range(2500):
        tree = Independent(3, 1).grow(lambda path: p_V, chance)
        path, token = taken_path(
            tree,
            torch.stack([q_V] * 4),
            lambda p, q, drafts: Verdict(accept_V[drafts], residual_V),
            chance,
        )
        firsts.append(tree.tokens[path[0]] if path else token)
    assert (chi_square(firsts, q_V) > 1e-3) == (rule == "right")


@pytest.mark.parametrize("kind", ["chosen", "budgeted"])
def test_tokens_are_distributed_as_those_of_the_model(kind: str) -> None:
    """The same over rounds, of each of two places."""
    tables = TreeTables(chosen=kind == "chosen")
    made = last(
        decoder(layers=2, vocab_size=50),
        [[7]] * 800,
        tables,
        max_new_tokens=3,
        shape=SHAPES.get(kind, Budgeted(6)),
        sampling=TOP_P,
        generator=torch.Generator().manual_seed(1),
    )
    assert 0 < made.accepted < made.drafted
    steps_VV = TOP_P.probabilities(tables.target).double()
    expected_V = steps_VV[7]
    for place in range(2):
        assert chi_square([row[place] for row in made.tokens], expected_V) > 1e-3
        expected_V = expected_V @ steps_VV


@pytest.mark.parametrize("rule", ["k_seq", "recursive"])
def test_some_draft_of_a_place_is_taken_as_often_as_the_rule_says(rule: str) -> None:
    tables = TreeTables(chosen=False)
    made = last(
        decoder(layers=2, vocab_size=50),
        [[7]] * 600,
        tables,
        max_new_tokens=2,
        shape=Independent(3, 1, rule=rule),
        sampling=TOP_P,
        generator=torch.Generator().manual_seed(2),
    )
    p, q = (TOP_P.probabilities(x[7:8])[0].double() for x in (tables.draft, tables.target))
    wanted = float(k_seq(p, q, 3).acceptance if rule == "k_seq" else recursive_acceptance(p, q, 3))
    # The first round of each; where none was taken, the second has no room for a draft.
    share = made.accepted / 600
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 600) ** 0.5


def test_sampled_text_of_a_routed_decoder_has_its_distribution() -> None:
    model = decoder("mixture_of_depths", layers=3)
    sampling = Sampling(2.0, top_p=0.9)
    made = last(
        model,
        [PROMPT] * 300,
        ModelDraft(decoder(layers=1)),
        max_new_tokens=2,
        shape=Budgeted(4),
        sampling=sampling,
        generator=torch.Generator().manual_seed(2),
    )
    assert 0 < made.accepted < made.drafted
    with torch.no_grad():
        first_V = sampling.probabilities(model(torch.tensor([PROMPT]))[:, -1])[0].double()
    assert chi_square([row[0] for row in made.tokens], first_V) > 1e-3


def test_budgeted_trees_hold_the_likeliest_places() -> None:
    """A draft that is nearly sure makes a chain, one that knows nothing makes siblings."""
    sure = torch.tensor([0.97, 0.01, 0.01, 0.01])
    chance = torch.Generator().manual_seed(0)
    chain = Budgeted(6).grow(lambda path: sure, chance)
    assert max(chain.depths()) >= 4
    flat = Budgeted(4).grow(lambda path: torch.full((4,), 0.25), chance)
    assert sorted(flat.tokens[:2]) != flat.tokens[:1] * 2  # siblings differ
    assert max(flat.depths()) <= 2
    few = Budgeted(16, threshold=0.5).grow(lambda path: torch.full((4,), 0.25), chance)
    assert len(few.tokens) == 2  # the next place is worth 0.5
    none = Budgeted(4).grow(lambda path: torch.zeros(4), chance)
    assert none.tokens == []


def test_templates_hold_short_paths_of_likely_ranks_and_unmet_tokens_draft_nothing() -> None:
    assert template(4) == [(0,), (1,), (0, 0), (2,)]
    paths = template(31)
    assert len(set(paths)) == 31
    assert all(path[:-1] in ((), *paths) for path in paths)
    known = {3: [5, 6], 5: [7]}
    tree = chosen_tree(lambda token: known.get(token, []), 3, 6)
    assert (tree.tokens, tree.parents) == ([5, 6, 7], [-1, -1, 0])
    assert chosen_tree(lambda token: [], 3, 6).tokens == []


def test_what_cannot_be_is_named() -> None:
    model = decoder()
    exits = ExitDraft(ExitAdapter.of(model, 2))
    with pytest.raises(ValueError, match="ExitDraft: drafts chains only; use speculate"):
        last(model, [[1]], exits, max_new_tokens=2)
    hooked = decoder()
    hooked.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="DecoderLayer: cannot verify a tree of drafts"):
        last(hooked, [[1]], RecyclingDraft(), max_new_tokens=2)
    for make, message in (
        (lambda: Budgeted(0), "budget=0: must be at least 1"),
        (lambda: Budgeted(threshold=1.0), r"threshold=1.0: must be in \[0, 1\)"),
        (lambda: Independent(0), "count=0: must be at least 1"),
        (lambda: Independent(rule="x"), "rule=x: must be k_seq or recursive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
