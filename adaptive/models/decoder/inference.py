"""A decoder's layers as generation runs them: what training needs around them is left out.

The same weights and the same numbers up to rounding, on one rank, in evaluation mode, without
gradients and without a tape: products of small weights in one call, rotary tables made once, keys
and values written where they stay, and for a token that a layer skips nothing but the decision. A
layer that is not known here runs as the module that it is.

Shape legend: T tokens of the pass, R of them that a layer computes, D width, F feed-forward width,
H query heads, G key-value heads, h head width, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.feed_forward import SwiGLU
from adaptive.blocks.mixture_of_depths import ChoicePredictor, MixtureOfDepths, update_weights
from adaptive.blocks.protocol import RoutedBlock
from adaptive.blocks.skip_layer import EXECUTE, SkipLayer
from adaptive.models.decoder.cache import Cache
from adaptive.models.decoder.cached_attention import attend
from adaptive.models.decoder.layer_cache import LayerCache
from adaptive.models.decoder.layers import Attention, DecoderLayer, RMSNorm
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.products import Product
from adaptive.models.decoder.tokens import Tokens
from adaptive.routing.forced import forced_choice
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import RoutingRecord, RoutingTape
from parallel.linear import Linear

Norm = Callable[[Tensor], Tensor]
Layer = Callable[[Tensor, Tokens, LayerCache], Tensor]
"""[T, D], tokens, the layer's cache -> [T, D] updated."""


class Choice(NamedTuple):
    """Which tokens of a pass a layer computed.

    Attributes:
        module: the layer's name in the model, and its kind.
        chosen: of every token, whether it did.
        lengths: computed tokens of each sequence.
        keys: how many keys each of those attended to, for each sequence.
    """

    module: tuple[str, str]
    chosen: list[bool]
    lengths: tuple[int, ...]
    keys: list[int]

    def record(self) -> RoutingRecord:
        """The same as modules tell it."""
        return RoutingRecord(
            name=self.module[0],
            kind=self.module[1],
            tokens=len(self.chosen),
            executed=sum(self.chosen),
            executed_lengths=torch.tensor(self.lengths),
            key_lengths=torch.tensor(self.keys),
            chosen=torch.tensor(self.chosen),
        )


class Inference:
    """A decoder ready to generate. Its weights are read when it is made: make it anew when they
    have changed.

    Args:
        model: in evaluation mode, whole on this rank.
        rows: most tokens of a usual pass: sequences, times drafts of each and one.

    Attributes:
        choices: of the last pass, what layers decided that are known here.
        records: of the last pass, what other routed modules told.
    """

    def __init__(self, model: Decoder, *, rows: int = 1) -> None:
        self.model = model
        self.choices: list[Choice] = []
        self.records: list[RoutingRecord] = []
        self._device = model.embedding.weight.device
        self._plain = _is_plain(model.embedding)
        self._norm = norm_of(model.norm)
        self._output: Callable[[Tensor], Tensor] = model.output
        if _is_linear(model.output):
            self._output = _product([model.output], rows)
        maker = _Maker(model, rows, self.choices)
        self._layers = [maker.layer(layer) for layer in model.layers]
        known = maker.known
        self._tells = any(isinstance(m, RoutedBlock) and m not in known for m in model.modules())

    def embed(self, ids: Sequence[int]) -> Tensor:
        """[T, D]."""
        if self._plain and len(ids) == 1:
            return self.model.embedding.weight.detach().narrow(0, ids[0], 1)
        out_TD: Tensor = self.model.embedding(torch.tensor(list(ids)).to(self._device))
        return out_TD

    def hidden(self, ids: Sequence[int], tokens: Tokens, cache: Cache) -> Tensor:
        """[T, D], what `logits` takes, of tokens that `cache.next_tokens` has placed."""
        self.choices.clear()
        self.records = []
        hidden_TD = self.embed(ids)
        if not self._tells:
            return self._through(hidden_TD, ids, tokens, cache)
        with RoutingTape(self.model) as tape:
            hidden_TD = self._through(hidden_TD, ids, tokens, cache)
        self.records = tape.records
        return hidden_TD

    def run(self, hidden_TD: Tensor, tokens: Tokens, cache: Cache, layers: range) -> Tensor:
        """Hidden states that have passed some layers only."""
        for index in layers if tokens.count else ():
            hidden_TD = self._layers[index](hidden_TD, tokens, cache.layer(index))
        return hidden_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V]."""
        return self._output(self._norm(hidden_RD))

    def project(self, normed_RD: Tensor) -> Tensor:
        """[R, V], of hidden states that have been normed."""
        return self._output(normed_RD)

    def _through(
        self, hidden_TD: Tensor, ids: Sequence[int], tokens: Tokens, cache: Cache
    ) -> Tensor:
        stack = self.model.stack
        if stack is None:
            return self.run(hidden_TD, tokens, cache, range(len(self._layers)))

        def layers(hidden_TD: Tensor, layout: TokenLayout, first: int, last: int) -> Tensor:
            return self.run(hidden_TD, Tokens.of(layout), cache, range(first, last))

        ids_T = torch.tensor(list(ids)).to(self._device)
        hidden_TD, cache.stack = stack(
            hidden_TD, ids_T, layout=tokens.layout, layers=layers, state=cache.stack, keep=True
        )
        return hidden_TD


class _Maker:
    """Makes layers of a model's modules."""

    def __init__(self, model: Decoder, rows: int, choices: list[Choice]) -> None:
        self.rows, self.choices = rows, choices
        self.places = model.config.max_seq_len
        self.known: set[nn.Module] = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._tables: dict[Any, _Rotary] = {}

    def layer(self, module: nn.Module) -> Layer:
        if type(module) is DecoderLayer and _is_plain(module):
            return _Layer(module, self)
        inner = getattr(module, "block", None)
        if type(inner) is DecoderLayer and _is_plain(module) and not module.training:
            if type(module) is MixtureOfDepths and module.causal:
                self.known.add(module)
                return _Depths(module, _Layer(inner, self), self)
            if type(module) is SkipLayer:
                self.known.add(module)
                return _Skip(module, _Layer(inner, self), self)
        return partial(_run_module, module)

    def name(self, module: RoutedBlock) -> tuple[str, str]:
        return self._names[module], module.kind

    def rotary(self, attention: Attention) -> _Rotary | None:
        if not attention.rotary_dim:
            return None
        options = attention.rotary.keywords
        key = (options["base"], options["scaling"], attention.rotary_dim)
        if key not in self._tables:
            self._tables[key] = _Rotary(attention, self.places)
        return self._tables[key]


def attention_step(module: Attention, *, places: int, rows: int) -> AttentionStep:
    """An attention that stands alone, for positions up to about `places`."""
    return AttentionStep(module, rows, _Rotary(module, places) if module.rotary_dim else None)


def _is_plain(module: nn.Module) -> bool:
    """Whether its forward is all that a call of it does: engines gather weights in hooks."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def _run_module(module: nn.Module, x_TD: Tensor, tokens: Tokens, cache: LayerCache) -> Tensor:
    if tokens.tree is not None:
        raise ValueError(f"{type(module).__name__}: cannot verify a tree of drafts; draft a chain")
    out_TD: Tensor = module(x_TD, layout=tokens.layout, cache=cache)
    return out_TD


class _Rotary:
    """cos and signed sin of every position, [P, rotary width], made once."""

    def __init__(self, attention: Attention, places: int) -> None:
        self._attention = attention
        self._make(places)

    def _make(self, places: int) -> None:
        weight = next(self._attention.parameters())
        positions_P = torch.arange(places, device=weight.device)
        cos, sin = self._attention.rotary(positions_P, self._attention.rotary_dim)
        self._cos = cos.repeat(1, 1, 2).to(weight.dtype)
        self._sin = torch.cat((-sin, sin), -1).to(weight.dtype)

    def at(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[T, 1, rotary width] each."""
        if max(tokens.positions) >= len(self._cos):
            self._make(2 * max(tokens.positions))
        if tokens.count == 1:
            place = tokens.positions[0]
            return self._cos.narrow(0, place, 1), self._sin.narrow(0, place, 1)
        if self not in tokens.kept:
            tokens.kept[self] = self._cos[tokens.positions_T], self._sin[tokens.positions_T]
        tables: tuple[Tensor, Tensor] = tokens.kept[self]
        return tables


class AttentionStep:
    """`residual + attention(x)`, of all tokens or of some among all.

    Args:
        module: the attention.
        rows: most tokens of a usual pass.
        rotary: of its positions; None: it has none.
    """

    def __init__(self, module: Attention, rows: int, rotary: _Rotary | None) -> None:
        self._module, self._rotary = module, rotary
        self._heads, self._pairs = module.heads, 2 * module.kv_heads
        self._split = (-1, module.head_dim)
        self._width = module.rotary_dim
        self._inputs: Product | None = None
        self._output: Product | None = None
        projections = (module.query, module.key, module.value)
        if all(_is_linear(projection) for projection in projections):
            bias = None
            if module.query_bias is not None:
                biases: list[Any] = [module.query_bias, module.key_bias, module.value_bias]
                bias = torch.cat(biases).detach()
            self._inputs = _product(projections, rows, bias)
        if _is_linear(module.output):
            self._output = _product([module.output], rows)

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor, tokens: Tokens, cache: LayerCache
    ) -> Tensor:
        qkv_TNh = self._projected(x_TD, (0, 1, 2)).unflatten(1, self._split)
        self._turn(qkv_TNh.narrow(1, 0, self._heads + self._pairs // 2), self._heads, tokens)
        cache.append(qkv_TNh.narrow(1, self._heads, self._pairs), tokens)
        return self._finish(qkv_TNh.narrow(1, 0, self._heads), residual_TD, tokens, cache)

    def of_some(
        self, x_TD: Tensor, residual_RD: Tensor, rows: list[int], tokens: Tokens, cache: LayerCache
    ) -> Tensor:
        """As above, [R, D], of the tokens at `rows`, while all are keys."""
        kv_TNh = self._projected(x_TD, (1, 2)).unflatten(1, self._split)
        self._turn(kv_TNh.narrow(1, 0, self._pairs // 2), 0, tokens)
        cache.append(kv_TNh, tokens)
        if not rows:
            return residual_RD
        asking = tokens.take(rows)
        q_RHh = self._projected(_taken(x_TD, rows), (0,)).unflatten(1, self._split)
        self._turn(q_RHh, self._heads, asking)
        return self._finish(q_RHh, residual_RD, asking, cache)

    def _projected(self, x_TD: Tensor, which: tuple[int, ...]) -> Tensor:
        """Queries, keys and values, or some of them, side by side."""
        if self._inputs is not None:
            whole = len(which) == 3
            return self._inputs(x_TD) if whole else self._inputs.part(x_TD, *which)
        module = self._module
        parts = []
        for place in which:
            name = ("query", "key", "value")[place]
            part_TN = getattr(module, name)(x_TD)
            bias = getattr(module, f"{name}_bias")
            parts.append(part_TN if bias is None else part_TN + bias)
        return torch.cat(parts, 1)

    def _turn(self, qk_TNh: Tensor, heads: int, tokens: Tokens) -> None:
        """Norms and rotation of `heads` queries and of the keys behind them, in place."""
        query_norm, key_norm = self._module.query_norm, self._module.key_norm
        if query_norm is not None and key_norm is not None:
            keys = qk_TNh.shape[1] - heads
            for norm, first, count in ((query_norm, 0, heads), (key_norm, heads, keys)):
                if count:
                    part_TNh = qk_TNh.narrow(1, first, count)
                    part_TNh.copy_(norm(part_TNh.contiguous()))
        if self._rotary is None:
            return
        cos_T1h, sin_T1h = self._rotary.at(tokens)
        if self._width < qk_TNh.shape[-1]:
            qk_TNh = qk_TNh.narrow(-1, 0, self._width)
        rolled_TNh = qk_TNh.roll(self._width // 2, -1)
        qk_TNh.mul_(cos_T1h).addcmul_(rolled_TNh, sin_T1h)

    def _finish(
        self, q_RHh: Tensor, residual_RD: Tensor, tokens: Tokens, cache: LayerCache
    ) -> Tensor:
        attended_RD = attend(cache, q_RHh, tokens, self._module.window).flatten(1)
        if self._output is not None:
            return self._output.added(residual_RD, attended_RD)
        out_RD: Tensor = residual_RD + self._module.output(attended_RD)
        return out_RD


class _Layer:
    """A decoder layer, and its halves."""

    def __init__(self, module: DecoderLayer, maker: _Maker) -> None:
        self.attention_norm, self._ffn_norm = map(norm_of, (module.attention_norm, module.ffn_norm))
        attention, self._ffn = module.attention, module.ffn
        assert isinstance(attention, Attention)
        self.attention = AttentionStep(attention, maker.rows, maker.rotary(attention))
        self._inputs: Product | None = None
        ffn = module.ffn
        if type(ffn) is SwiGLU and all(map(_is_linear, (ffn.gate, ffn.up, ffn.down))):
            self._inputs = _product([ffn.gate, ffn.up], maker.rows)
            self._output = _product([ffn.down], maker.rows)

    def __call__(self, x_TD: Tensor, tokens: Tokens, cache: LayerCache) -> Tensor:
        return self.feed_forward(self.attend(x_TD, tokens, cache), tokens)

    def attend(self, x_TD: Tensor, tokens: Tokens, cache: LayerCache) -> Tensor:
        return self.attention(self.attention_norm(x_TD), x_TD, tokens, cache)

    def feed_forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        normed_TD = self._ffn_norm(x_TD)
        if self._inputs is None:
            out_TD: Tensor = x_TD + self._ffn(normed_TD, layout=tokens.layout)
            return out_TD
        gate_TF, up_TF = self._inputs(normed_TD).chunk(2, -1)
        return self._output.added(x_TD, F.silu(gate_TF).mul_(up_TF))


class _Depths:
    """Mixture-of-Depths by its predictor: nothing else is computed for a token left out."""

    def __init__(self, module: MixtureOfDepths, inner: _Layer, maker: _Maker) -> None:
        self._module, self._inner, self._choices = module, inner, maker.choices
        self._name = maker.name(module)
        self._threshold = float(module.threshold)
        self._predict: Callable[[Tensor], Tensor] | None = module.predictor
        predictor = module.predictor
        if type(predictor) is ChoicePredictor and _is_plain(predictor):
            up = Product([predictor.up.weight], predictor.up.bias)
            down = Product([predictor.down.weight], predictor.down.bias)
            self._predict = lambda x_TD: down(F.gelu(up(x_TD))).squeeze(-1)

    def __call__(self, x_TD: Tensor, tokens: Tokens, cache: LayerCache) -> Tensor:
        module, inner = self._module, self._inner
        ffn = module.granularity == "ffn"
        if ffn:
            x_TD = inner.attend(x_TD, tokens, cache)
        logits_T: Tensor | None = None
        if self._predict is None:
            causal_T = logits_T = module.router(x_TD).squeeze(-1)
        else:
            causal_T = self._predict(x_TD)
        forced_T = forced_choice(module, x_TD.shape[0])
        chosen_T = causal_T > self._threshold if forced_T is None else forced_T == 1
        chosen = chosen_T.tolist()
        rows = [row for row, taken in enumerate(chosen) if taken]
        some = tokens.take(rows) if rows else None
        x_RD = _taken(x_TD, rows)
        after_RD = x_RD
        if module.keys == "all" and not ffn:  # keys of those left out, too
            after_RD = inner.attention.of_some(
                inner.attention_norm(x_TD), x_RD, rows, tokens, cache
            )
        elif some is not None and not ffn:
            after_RD = inner.attend(x_RD, some, cache)
        if some is not None:
            if logits_T is None:
                logits_T = module.router(x_TD).squeeze(-1)
            update_RD = inner.feed_forward(after_RD, some).sub_(x_RD)
            weights_R = update_weights(module.weight, _taken(logits_T, rows)).to(x_TD.dtype)
            x_TD = _put(x_TD, rows, torch.addcmul(x_RD, update_RD, weights_R[:, None]))
        lengths = (0,) * len(tokens.lengths) if some is None else some.lengths
        self._choices.append(Choice(self._name, chosen, lengths, cache.held))
        return x_TD


class _Skip:
    """SkipLayer by its router's decision."""

    def __init__(self, module: SkipLayer, inner: _Layer, maker: _Maker) -> None:
        self._module, self._inner, self._choices = module, inner, maker.choices
        self._name = maker.name(module)

    def __call__(self, x_TD: Tensor, tokens: Tokens, cache: LayerCache) -> Tensor:
        module, inner = self._module, self._inner
        if module.granularity == "ffn":
            x_TD = inner.attend(x_TD, tokens, cache)
        chosen = self._decide(x_TD)
        rows = [row for row, taken in enumerate(chosen) if taken]
        some = tokens.take(rows) if rows else None
        x_RD = _taken(x_TD, rows)
        if module.granularity != "ffn":
            if module.keys == "all":
                x_RD = inner.attention.of_some(
                    inner.attention_norm(x_TD), x_RD, rows, tokens, cache
                )
            elif some is not None:
                x_RD = inner.attend(x_RD, some, cache)
        if some is not None:
            if module.granularity != "attention":
                x_RD = inner.feed_forward(x_RD, some)
            x_TD = _put(x_TD, rows, x_RD)
        if module.granularity == "attention":
            x_TD = inner.feed_forward(x_TD, tokens)
        lengths = (0,) * len(tokens.lengths) if some is None else some.lengths
        self._choices.append(Choice(self._name, chosen, lengths, cache.held))
        return x_TD

    def _decide(self, x_TD: Tensor) -> list[bool]:
        forced_T = forced_choice(self._module, x_TD.shape[0])
        if forced_T is None:
            forced_T = self._module.router(F.layer_norm(x_TD, x_TD.shape[-1:])).argmax(-1)
        return [choice == EXECUTE for choice in forced_T.tolist()]


def norm_of(module: nn.Module) -> Norm:
    """A norm of few rows."""
    if type(module) is not RMSNorm or not _is_plain(module):
        return module
    weight_D, eps = module.weight.detach(), module.eps
    width = (weight_D.shape[0],)
    exact = weight_D.device.type == "cpu" and weight_D.dtype in (torch.float32, torch.float64)

    def norm(x_TD: Tensor) -> Tensor:
        if exact and x_TD.shape[0] == 1:
            size = torch.linalg.vector_norm(x_TD).item()
            return x_TD.mul(1 / math.sqrt(size * size / width[0] + eps)).mul_(weight_D)
        return F.rms_norm(x_TD, width, weight_D.to(x_TD.dtype), eps)

    return norm


def _is_linear(module: Any) -> bool:
    return type(module) in (Linear, nn.Linear) and module.bias is None and _is_plain(module)


def _product(modules: Sequence[Any], rows: int, bias: Tensor | None = None) -> Product:
    return Product([module.weight for module in modules], bias, rows=rows)


def _taken(x_TX: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == x_TX.shape[0]:
        return x_TX
    return x_TX.index_select(0, torch.tensor(rows, dtype=torch.int64).to(x_TX.device))


def _put(x_TD: Tensor, rows: list[int], x_RD: Tensor) -> Tensor:
    """`x` with other rows at some places; the others stay as they are."""
    if len(rows) == x_TD.shape[0]:
        return x_RD
    return x_TD.index_copy(0, torch.tensor(rows, dtype=torch.int64).to(x_TD.device), x_RD)
