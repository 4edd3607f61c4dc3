"""Sparse-dense fusion against the formula written out sample by sample; one test a trap."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import RoutingTape, SparseDenseFusion, TokenLayout
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm, SwiGLU

DIM = 8


class Mixing(nn.Module):
    """A user's own block on [B, K, D]: each token sees the mean of the tokens it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.own = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x_BKD: Tensor) -> Tensor:
        return x_BKD + torch.tanh(self.own(x_BKD) + self.mean(x_BKD.mean(1, keepdim=True)))


def fusion_of(depths: tuple[int, int, int] = (1, 2, 1), **options: Any) -> SparseDenseFusion:
    torch.manual_seed(0)
    parts = [[Mixing() for _ in range(depth)] for depth in depths]
    return SparseDenseFusion(*parts, DIM, **{"grid": (4, 4), **options}).double()


def written_out(
    module: SparseDenseFusion, hidden_BSD: Tensor, keep: list[list[int]], drop: list[bool]
) -> Tensor:
    """decoder(W concat[restored g ; f] + b), by Python loops."""
    out = []
    for h_SD, kept, dropped in zip(hidden_BSD, keep, drop, strict=True):
        f_SD = h_SD[None]
        for block in module.encoder:
            f_SD = block(f_SD)
        g_KD = torch.stack([f_SD[0, i] for i in kept])[None]
        for block in module.middle:
            g_KD = block(g_KD)
        mask_D = module.fusion.mask_token
        rows = []
        for i in range(len(h_SD)):
            restored = g_KD[0, kept.index(i)] if i in kept and not dropped else mask_D
            joined = torch.cat([restored, f_SD[0, i]])
            rows.append(module.fusion.weight @ joined + module.fusion.bias)
        y_SD = torch.stack(rows)[None]
        for block in module.decoder:
            y_SD = block(y_SD)
        out.append(y_SD[0])
    return torch.stack(out)


def hidden(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 16, DIM, dtype=torch.float64, generator=generator)


KEEP = [[0, 3, 8, 15], [1, 2, 9, 10], [4, 5, 6, 7]]


@pytest.mark.parametrize("mask_token", ["fixed", "learnt"])
def test_sparse_forward_and_every_gradient_match_the_formula(mask_token: str) -> None:
    module = fusion_of(mask_token=mask_token).eval()
    drop = torch.tensor([False, True, False])
    results = []
    for run in ("ours", "formula"):
        x = hidden().requires_grad_()
        module.zero_grad()
        if run == "ours":
            out = module(x, keep_ids=torch.tensor(KEEP).flip(1), drop_path=drop)
        else:
            out = written_out(module, x, KEEP, drop.tolist())
        (out**2).sum().backward()
        results.append((out, x.grad, {n: p.grad for n, p in module.named_parameters()}))
    (out, x_grad, grads), (want, want_x_grad, want_grads) = results
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(x_grad, want_x_grad)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_keeps_every_token_and_drops_no_path() -> None:
    module = fusion_of(path_drop=1.0).eval()
    want = written_out(module, hidden(), [list(range(16))] * 3, [False] * 3)
    torch.testing.assert_close(module(hidden()), want)


def test_the_fixed_mask_is_saved_but_never_trained() -> None:
    module = fusion_of(mask_token="fixed")
    assert "fusion.mask_token" in module.state_dict()
    assert "fusion.mask_token" not in dict(module.named_parameters())
    # N(0, 0.02), not zeros: a zero mask would be another network.
    torch.manual_seed(0)
    wide = SparseDenseFusion([], [], [], 4096).fusion.mask_token
    assert abs(wide.std() - 0.02) < 0.002
    assert "fusion.mask_token" in dict(fusion_of(mask_token="learnt").named_parameters())


def test_training_keeps_its_share_in_every_cell() -> None:
    module = fusion_of(keep=0.25, path_drop=0.0)
    with RoutingTape() as tape:
        module(hidden())
    (record,) = tape.records
    assert (record.tokens, record.executed) == (48, 12)
    cells = record.chosen.view(3, 2, 2, 2, 2).sum(dim=(2, 4))
    assert (cells == 1).all()


@pytest.mark.parametrize("keep", [0.125, 0.25, 0.375, 0.5])
def test_video_keeps_its_share_in_every_three_dimensional_cell(keep: float) -> None:
    module = fusion_of(keep=keep, grid=(2, 4, 4), path_drop=0.0)
    with RoutingTape() as tape:
        module(torch.randn(3, 32, DIM, dtype=torch.float64))
    cells = tape.records[0].chosen.view(3, 1, 2, 2, 2, 2, 2).sum(dim=(2, 4, 6))
    assert (cells == round(keep * 8)).all()


def test_the_middle_sees_kept_tokens_only() -> None:
    """Changing a dropped token's encoder output must not reach the kept tokens' middle."""
    module = fusion_of(depths=(0, 2, 0)).eval()
    x = hidden()
    before = module(x, keep_ids=torch.tensor(KEEP))
    x[0, 1] += 1
    after = module(x, keep_ids=torch.tensor(KEEP))
    changed = (before != after).any(-1)
    assert changed.nonzero().tolist() == [[0, 1]]


def test_path_drop_takes_whole_samples_at_its_rate() -> None:
    module = fusion_of(depths=(0, 1, 0), path_drop=0.25, keep=1.0)
    x = hidden(batch=1).expand(2000, -1, -1)
    torch.manual_seed(2)
    out = module(x)
    masked = module.eval()(x[:1], drop_path=torch.tensor([True]))[0]
    is_masked = torch.isclose(out, masked).all(-1)
    assert (is_masked.all(1) | ~is_masked.any(1)).all()
    # Five standard errors of sqrt(.25 * .75 / 2000).
    assert abs(is_masked.all(1).double().mean() - 0.25) < 0.05


class Masking(SparseDenseFusion):
    """Computes the middle of dropped samples too and throws it away, as the official code does."""

    def leaves_out(self, kwargs: dict[str, Any]) -> bool:
        return False


@pytest.mark.parametrize("case", ["kept tokens", "all tokens", "ragged text", "all dropped"])
def test_a_dropped_sample_is_left_out_of_the_middle_and_nothing_else_changes(case: str) -> None:
    drop = torch.tensor([True, False, True] if case != "all dropped" else [True] * 3)
    results = []
    for kind in (SparseDenseFusion, Masking):
        module = text_fusion() if case == "ragged text" else fusion_of()
        module.__class__ = kind
        seen = []
        module.middle[0].register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
        x, layout = hidden().flatten(0, 1), TokenLayout.dense(3, 16)
        if case == "ragged text":
            x, layout = x[:20], TokenLayout.from_lengths([7, 4, 9])
        module.keep = 1.0 if case == "all tokens" else 0.25
        x.requires_grad_()
        torch.manual_seed(3)
        with RoutingTape() as tape:
            out = module(x, layout=layout, drop_path=drop)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        executed = tape.records[0].executed
        assert executed == seen[0].numel() // DIM
        assert executed == tape.records[0].executed_lengths.sum()
        results.append((executed, [out, x.grad, gradients]))
    (executed, ours), (whole, masked) = results
    torch.testing.assert_close(ours, masked)
    # A batch that is dropped whole computes one sample: every parameter takes part.
    want = {"kept tokens": (4, 12), "all tokens": (16, 48), "ragged text": (1, 6)}
    assert (executed, whole) == want.get(case, (4, 12))


def test_blocks_get_the_rows_of_the_sequences_that_they_compute() -> None:
    class Shifted(nn.Module):
        def forward(self, x_BKD: Tensor, *, shift: Tensor) -> Tensor:
            return x_BKD + shift[:, None]

    drop, shift = torch.tensor([True, False, True]), hidden()[:, 0]
    outs = []
    for named in (("shift",), ()):
        torch.manual_seed(0)
        parts = ([], [Shifted()], [])
        module = SparseDenseFusion(*parts, DIM, keep=1.0, per_sequence=named).double()
        rows = []
        module.middle[0].register_forward_pre_hook(lambda _, args, r=rows: r.append(len(args[0])))
        outs.append(module(hidden(), drop_path=drop, shift=shift))
        # Without the name nobody knows whose rows they are: computed, and masked.
        assert rows == ([1] if named else [3])
    torch.testing.assert_close(*outs)


def test_a_dropped_path_still_gives_every_parameter_a_gradient() -> None:
    """ZeRO stops or hangs on a parameter that took no part on some rank."""
    for options in ({"path_drop": 1.0}, {"paths": "sparse"}, {"mask_token": "learnt"}):
        module = fusion_of(**options)
        module(hidden()).sum().backward()
        assert all(p.grad is not None for p in module.parameters()), options


def test_the_sparse_path_alone_sees_no_encoder_output_at_dropped_places() -> None:
    module = fusion_of(depths=(0, 2, 0), paths="sparse").eval()
    out = module(hidden(), keep_ids=torch.tensor(KEEP))
    dropped = [[i for i in range(16) if i not in row] for row in KEEP]
    rows = torch.stack([out[b, i] for b in range(3) for i in dropped[b]])
    torch.testing.assert_close(rows, rows[:1].expand_as(rows))


def test_the_dense_path_alone_is_the_path_drop_of_the_whole() -> None:
    both, dense = fusion_of(), fusion_of(depths=(1, 0, 1), paths="dense")
    weights = {n: v for n, v in both.state_dict().items() if not n.startswith("middle")}
    dense.load_state_dict(weights)
    want = both.eval()(hidden(), drop_path=torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(dense(hidden()), want)


def text_fusion(**options: Any) -> SparseDenseFusion:
    def layer() -> DecoderLayer:
        return DecoderLayer(RMSNorm(DIM), Attention(DIM, 2), RMSNorm(DIM), SwiGLU(DIM, 16))

    torch.manual_seed(0)
    return SparseDenseFusion([layer()], [layer()], [layer()], DIM, **options).double()


def test_text_of_any_lengths_goes_through_decoder_layers() -> None:
    module = text_fusion(path_drop=0.0)
    layout = TokenLayout.from_lengths([7, 0, 4, 9])
    with RoutingTape() as tape:
        out = module(torch.randn(20, DIM, dtype=torch.float64), layout=layout)
    assert out.shape == (20, DIM)
    # Cells of four keep one, and a last short cell keeps one: 2 + 0 + 1 + 3.
    assert tape.records[0].executed == 6


def test_text_stays_causal() -> None:
    module = text_fusion().eval()
    x = torch.randn(1, 12, DIM, dtype=torch.float64)
    ids = torch.tensor([[1, 4, 7, 10]])
    changed = x.clone()
    changed[0, 8] += 1
    same = module(x, keep_ids=ids) == module(changed, keep_ids=ids)
    assert same[0, :8].all()
    assert not same[0, 8].all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_leaves_as_it_came(side: str) -> None:
    module = text_fusion().eval()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    valid = slice(3, 9) if side == "left" else slice(0, 6)
    mask[1] = False
    mask[1, valid] = True
    x[1, ~mask[1]] = torch.nan
    out = module(x, token_mask=mask)
    assert out[1, ~mask[1]].isnan().all()
    torch.testing.assert_close(out[1:, valid], module(x[1:, valid]))
    torch.testing.assert_close(out[:1], module(x[:1]))


def test_padding_is_never_kept_nor_counted() -> None:
    module = text_fusion(path_drop=0.0)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :8], mask[1, :4] = True, True
    with RoutingTape() as tape:
        module(torch.randn(2, 16, DIM, dtype=torch.float64), token_mask=mask)
    assert (tape.records[0].tokens, tape.records[0].executed) == (12, 3)


def test_a_batch_of_padding_alone_still_gives_every_parameter_a_gradient() -> None:
    module = text_fusion(mask_token="learnt")
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    out = module(x, token_mask=torch.zeros(2, 5, dtype=torch.bool))
    out.sum().backward()
    assert torch.equal(out, x)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("kind", ["grid", "text"])
def test_recomputation_repeats_the_draws(kind: str) -> None:
    grads = []
    for recompute in (False, True):
        module = fusion_of() if kind == "grid" else text_fusion()
        module.recompute = recompute
        torch.manual_seed(5)
        module(hidden()).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_a_checkpoint_around_the_whole_module_repeats_the_draws() -> None:
    from adaptive import checkpoint

    grads = []
    for wrapped in (False, True):
        module = fusion_of(path_drop=0.5)
        torch.manual_seed(5)
        x = hidden().requires_grad_()
        out = checkpoint(module, x) if wrapped else module(x)
        # A draw between forward and backward would shift an unreplayed random stream.
        torch.rand(7)
        out.square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_fixed_grids_keep_static_shapes_without_a_host_synchronisation() -> None:
    """Under FakeTensor any read of a value raises. Dropped paths are drawn on the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        parts = [[Mixing()] for _ in range(3)]
        module = SparseDenseFusion(*parts, DIM, grid=(4, 4), path_drop=0.0)
        out = module(torch.randn(2, 16, DIM))
        out.sum().backward()
    assert out.shape == (2, 16, DIM)


def test_a_user_feeds_blocks_of_their_own_by_overriding_inner() -> None:
    class Scaled(SparseDenseFusion):
        def inner(self, blocks, packed_TD, layout, *, factor):  # type: ignore[no-untyped-def]
            return packed_TD * factor

    module = Scaled([], [], [], DIM, keep=1.0, path_drop=0.0)
    x = torch.randn(2, 4, DIM)
    weight, bias = module.fusion.weight, module.fusion.bias
    want = (torch.cat([x * 4, x * 2], -1) @ weight.T + bias) * 2
    torch.testing.assert_close(module(x, factor=2), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.3}, "keep=0.3: structured keeping needs one of"),
        ({"grid": (5, 4)}, "grid 5x4: must be divisible by the cell 2x2"),
        ({"path_drop": 1.5}, r"path_drop=1.5: must be in \[0, 1\]"),
        ({"mask_token": "zero"}, "mask_token='zero': must be one of fixed, learnt"),
        ({"paths": "none"}, "paths='none': must be one of both, sparse, dense"),
        ({"paths": "dense"}, "paths='dense': needs an empty middle, not 2 blocks"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_of(**options)


def test_a_path_drop_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_path of shape \[2\]: must be \[3\]"):
        fusion_of()(hidden(), drop_path=torch.tensor([True, False]))
