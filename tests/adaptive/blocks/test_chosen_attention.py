"""Layers of transformers, wrapped: right under each of its attentions, sliding windows included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.flex_attention
import transformers.masking_utils
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from adaptive import MixtureOfDepths, Selection, SkipLayer
from adaptive.blocks.chosen_attention import attention_of, attention_window, chosen_mask
from adaptive.blocks.wrapping import to_rows

WINDOW = 4


@pytest.fixture(autouse=True)
def flex_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers compiles flex attention at each shape: half a minute a time on a CPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, training: bool, **options: Any) -> Any:
        return flex_attention(query, key, value, **options)

    def block_mask(*args: Any, _compile: bool = False, **options: Any) -> BlockMask:
        return create_block_mask(*args, **options)

    home = transformers.integrations.flex_attention
    monkeypatch.setattr(home, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", block_mask)


class Rows:
    """The method that docs/wrapping.md shows."""

    block: nn.Module
    rotary: nn.Module

    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        positions_BK = to_rows(selection.positions[:, None], selection.layout)[..., 0]
        kwargs |= {
            "position_embeddings": self.rotary(packed_RD, positions_BK),
            "position_ids": positions_BK,
            "attention_mask": None,
        }
        return super().inner(packed_RD, selection, **kwargs)


class Routed(Rows, MixtureOfDepths):
    pass


class Skipped(Rows, SkipLayer):
    pass


def plain(kind: str, attention: str) -> Any:
    """Four tiny layers; for kinds with a window, all or every second of them has it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2}
    if kind == "GptOss":
        options |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    if kind != "Llama":
        options["sliding_window"] = WINDOW
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
        use_cache=False,
        pad_token_id=0,
        attn_implementation=attention,
        **options,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model.eval()


def wrapped(kind: str, attention: str, which: tuple[int, ...], **options: Any) -> Any:
    """That model with these layers wrapped, their choices those of a trained router."""
    model = plain(kind, attention)
    wrapper = Routed if "capacity" in options else Skipped
    layers = model.model.layers
    for index in which:
        layers[index] = wrapper(layers[index], 32, **options)
        layers[index].rotary = model.model.rotary_emb
    for name, parameter in model.named_parameters():
        if (".router." in name or ".predictor." in name) and ".mlp." not in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


ATTENTIONS = [
    ("Llama", "sdpa"),
    ("Llama", "eager"),
    ("Mistral", "sdpa"),
    ("Mistral", "eager"),
    ("Mistral", "flex_attention"),
    ("Gemma2", "eager"),
    ("GptOss", "eager"),
]
CHOICES: list[dict[str, Any]] = [{"capacity": 0.5}, {"keys": "executing"}]


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        # torch traces flex attention anew at every shape, uncompiled too.
        pytest.param(*pair, marks=pytest.mark.slow) if "flex_attention" in pair else pair
        for pair in ATTENTIONS
    ],
)
@torch.no_grad()
def test_later_tokens_padding_and_neighbours_change_nothing(
    kind: str, attention: str, options: dict[str, Any]
) -> None:
    model = wrapped(kind, attention, (0, 1, 3), **options)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (1, 20), generator=draw)
    other = ids.clone()
    other[:, 12:] = 7
    logits = model(ids).logits[0]
    torch.testing.assert_close(model(other).logits[0, :12], logits[:12], atol=1e-4, rtol=1e-4)
    for left in (False, True):
        padded = torch.zeros(2, 20, dtype=torch.long)
        start = 8 if left else 0
        padded[0, start : start + 12], padded[1] = ids[0, :12], other[0]
        mask = padded > 0
        beside = model(padded, attention_mask=mask.long(), token_mask=mask).logits
        got = beside[0, start : start + 12]
        torch.testing.assert_close(got, logits[:12], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
@torch.no_grad()
def test_a_wrapper_that_chooses_every_token_is_the_plain_model(kind: str, attention: str) -> None:
    """Windows too. The router of tanh_norm starts at zero, its weight at one."""
    model = plain(kind, attention)
    ids = torch.randint(1, 97, (2, 16), generator=torch.Generator().manual_seed(2))
    expected = model(ids).logits
    for index, layer in enumerate(model.model.layers):
        routed = Routed(layer, 32, capacity=1.0, weight="tanh_norm", predictor="none")
        routed.rotary = model.model.rotary_emb
        model.model.layers[index] = routed.eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
@torch.no_grad()
def test_the_chosen_see_the_chosen_within_their_window_of_the_text(
    kind: str, attention: str
) -> None:
    """Against the layer on the whole text, by eager attention that hides all who are not chosen."""
    model, whole = plain(kind, attention), plain(kind, "eager")
    layer, reference = model.model.layers[0], whole.model.layers[0]
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(3))
    columns = torch.tensor([[0, 1, 4, 5, 6, 9, 11]])
    distance = torch.arange(12)[:, None] - torch.arange(12)
    window = WINDOW if kind != "Llama" else 12
    seen = (distance >= 0) & (distance < window) & torch.isin(torch.arange(12), columns)
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    everywhere = torch.arange(12)[None]
    rotary = whole.model.rotary_emb
    expected = reference(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary(hidden, everywhere),
        position_ids=everywhere,
    )[:, columns[0]]
    routed = Routed(layer, 32)
    routed.rotary = rotary
    selection = Selection(
        indices=columns[0],
        cu_seqlens=torch.tensor([0, 7], dtype=torch.int32),
        max_seqlen=7,
        weights=None,
        batch_size=1,
        seq_len=12,
        positions=columns[0],
    )
    got = routed.inner(hidden[0, columns[0]], selection)
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-5)


def test_the_mask_is_causal_by_position_within_the_window_and_hides_what_is_no_token() -> None:
    positions = torch.tensor([[0, 2, 3, 7], [1, 5, 0, 0]])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    got = chosen_mask(positions, valid, window=3)[:, 0].int().tolist()
    assert got[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert got[1] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_what_cannot_be_told_is_refused() -> None:
    model = wrapped("Llama", "sdpa", (1,), capacity=0.5)
    ids = torch.arange(8)[None]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': a wrapped"):
        model.model.layers[1](torch.randn(1, 8, 32))
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(ValueError, match=r"layer_types\[1\]='chunked_attention'"):
        model(ids)


@pytest.mark.parametrize(("kind", "windows"), [("Llama", {None}), ("Gemma2", {None, WINDOW})])
def test_the_window_is_the_layers_own(kind: str, windows: set[int | None]) -> None:
    layers = plain(kind, "eager").model.layers
    assert {attention_window(attention_of(layer)) for layer in layers} == windows


@pytest.mark.parametrize("which", [(1, 3), (0, 2), (0, 1, 2, 3)])
@torch.no_grad()
def test_a_cache_that_holds_a_text_is_refused(which: tuple[int, ...]) -> None:
    """Whichever layers are wrapped: the cache tells its length by the first of all."""
    model = wrapped("Llama", "sdpa", which, keys="executing")
    ids = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(4))
    first = model(ids[:, :8], use_cache=True)
    with pytest.raises(ValueError, match=r"past_key_values of \d+ tokens: .* use_cache=False"):
        model(ids[:, 8:], past_key_values=first.past_key_values)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_layer_without_order_sees_no_row_ends(attention: str) -> None:
    """Rows of different lengths end with zeros, which are nobody's keys."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        attn_implementation=attention,
    )
    (layer,) = (
        m for m in transformers.ViTModel(config).modules() if type(m).__name__ == "ViTLayer"
    )
    module = SkipLayer(layer.eval(), 32, keys="executing").eval()
    nn.init.normal_(module.router.weight, std=0.5)
    hidden = torch.randn(3, 10, 32)
    out = module(hidden)
    for row, got in zip(hidden, out, strict=True):
        torch.testing.assert_close(got, module(row[None])[0], atol=1e-5, rtol=1e-4)
