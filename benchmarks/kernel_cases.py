"""What benchmarks/kernels.py runs: every op at sizes of language models, with its bytes and FLOPs.

Bytes are the fewest an op must move (each input read once, each output written once); FLOPs those
of its matrix products, a multiply-add counting two.

Shape legend: T tokens, R chosen, D width, E experts, N rows, F feed-forward width, H heads, h head
width, n parameter tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import measure  # noqa: F401 (puts the checkout before this folder on the path)
import torch
from torch import Tensor

from adaptive.ops.backend import choose
from adaptive.ops.cross_entropy import cross_entropy
from adaptive.ops.expert_feed_forward import expert_feed_forward
from adaptive.ops.grouped_linear import grouped_linear
from adaptive.ops.pack import combine, combine_, pack
from adaptive.ops.parameter_attention import parameter_attention
from adaptive.ops.permute import permute, unpermute
from adaptive.ops.ranking import highest_columns, order_by_unit
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.layout import TokenLayout
from parallel.ring.layout import Pair, RingLayout


@dataclass
class Case:
    """One op at one size.

    Attributes:
        op: name in the backend's registry.
        size: label.
        dtype: of the tensors.
        make: builds the inputs on the device; returns (call, tensors to differentiate).
        forward, backward: bytes moved, or FLOPs, of each pass; 0: no backward.
        bound: "bytes" or "flops": what the two numbers count.
        backends: label -> value of ADAPTIVE_BACKEND.
        required: smallest share of the machine's ceiling that issue 8 asks of "triton", or None.
    """

    op: str
    size: str
    dtype: torch.dtype
    make: Callable[[torch.device], tuple[Callable[..., Tensor], list[Tensor]]]
    forward: float
    backward: float
    bound: str = "bytes"
    backends: dict[str, str] = field(
        default_factory=lambda: {"triton": "triton", "reference": "reference"}
    )
    required: float | None = None


def draw(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device, dtype=dtype) * scale).requires_grad_()


def every_case(*, tiny: bool, quick: bool) -> list[Case]:
    """All cases, the first size of every op before the second of any."""
    makers = (
        packing, experts, attention, ring_parts, parameter_tokens, routing, losses,
    )  # fmt: skip
    by_op: dict[str, list[Case]] = {}
    for maker in makers:
        for case in maker(tiny, quick):
            by_op.setdefault(case.op, []).append(case)
    rows = max(len(cases) for cases in by_op.values())
    return [cases[row] for row in range(rows) for cases in by_op.values() if row < len(cases)]


def dtypes(tiny: bool, quick: bool) -> list[torch.dtype]:
    if tiny:
        return [torch.float32]
    return [torch.bfloat16] if quick else [torch.bfloat16, torch.float32]


def packing(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [(32768, 2048, 0.125), (65536, 1024, 0.5), (16384, 4096, 1.0), (8192, 4096, 0.25)]
    sizes = [(64, 32, 0.25)] if tiny else sizes[:2] if quick else sizes
    for dtype in dtypes(tiny, quick):
        for tokens, width, capacity in sizes:
            chosen = int(tokens * capacity)
            row = width * dtype.itemsize
            label = f"T {tokens} D {width} capacity {capacity}"

            def make_pack(device, tokens=tokens, width=width, chosen=chosen, dtype=dtype):
                index = torch.randperm(tokens, device=device)[:chosen].sort().values
                return (lambda x: pack(x, index)), [draw(device, dtype, tokens, width)]

            def make_combine(device, tokens=tokens, width=width, chosen=chosen, dtype=dtype):
                index = torch.randperm(tokens, device=device)[:chosen].sort().values
                inputs = [draw(device, dtype, n, width) for n in (tokens, chosen)]
                inputs.append(draw(device, torch.float32, chosen))
                return (lambda x, u, w: combine(x, u, index, w)), inputs

            def make_in_place(device, tokens=tokens, width=width, chosen=chosen, dtype=dtype):
                index = torch.randperm(tokens, device=device)[:chosen].sort().values
                x, update = (draw(device, dtype, n, width).detach() for n in (tokens, chosen))
                return (lambda: combine_(x, update, index)), []

            moved = 2 * chosen * row
            scattered = (tokens + chosen) * row
            yield Case("pack", label, dtype, make_pack, moved, scattered, required=0.8)
            added = (2 * tokens + chosen) * row
            yield Case("combine", label, dtype, make_combine, added, 3 * chosen * row, required=0.8)
            # Rows of the stream read and written, rows of the update read; inference only.
            yield Case("combine_", label, dtype, make_in_place, 3 * chosen * row, 0)


def routed_pairs(device: torch.device, tokens: int, top_k: int, num_experts: int, *, even: bool):
    """(pairs, rows per expert): an even load, or one that halves from expert to expert."""
    if even:
        experts_N = torch.arange(tokens * top_k, device=device) % num_experts
    else:
        share = 0.5 ** torch.arange(num_experts, device=device, dtype=torch.float32)
        experts_N = torch.multinomial(share.clamp(min=1e-4), tokens * top_k, replacement=True)
    return order_by_unit(experts_N[torch.randperm(tokens * top_k, device=device)], num_experts)


def experts(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [(16384, 2, 2048, 1408, 64, True), (16384, 2, 4096, 1792, 8, True)]
    more = [(32768, 1, 1024, 2816, 128, True), (16384, 2, 2048, 1408, 64, False)]
    sizes = [(32, 2, 16, 32, 4, True)] if tiny else sizes if quick else sizes + more
    for dtype in dtypes(tiny, quick):
        for tokens, top_k, width, ffn, num_experts, even in sizes:
            rows = tokens * top_k
            load = "even" if even else "uneven"
            label = f"T {tokens} K {top_k} D {width} F {ffn} E {num_experts} {load}"
            shape = {"tokens": tokens, "top_k": top_k, "num_experts": num_experts, "even": even}

            def make_linear(device, shape=shape, width=width, ffn=ffn, dtype=dtype):
                _, rows_E = routed_pairs(device, **shape)
                x = draw(device, dtype, shape["tokens"] * shape["top_k"], width)
                weight = draw(device, dtype, shape["num_experts"], 2 * ffn, width, scale=0.02)
                return (lambda x, w: grouped_linear(x, w, rows_E)), [x, weight]

            def make_ffn(device, shape=shape, width=width, ffn=ffn, dtype=dtype):
                pairs, rows_E = routed_pairs(device, **shape)
                tokens, top_k, count = shape["tokens"], shape["top_k"], shape["num_experts"]
                inputs = [
                    draw(device, dtype, tokens, width),
                    draw(device, dtype, count, 2 * ffn, width, scale=0.02),
                    draw(device, dtype, count, width, ffn, scale=0.02),
                    draw(device, torch.float32, tokens, top_k),
                ]

                def call(x, up, down, w):
                    return expert_feed_forward(
                        x, up, down, pairs_N=pairs, rows_per_expert_E=rows_E, weights_TK=w,
                        top_k=top_k,
                    )  # fmt: skip

                return call, inputs

            def make_permute(device, shape=shape, width=width, dtype=dtype):
                pairs, _ = routed_pairs(device, **shape)
                tokens, top_k = shape["tokens"], shape["top_k"]
                return (lambda x: permute(x, pairs, top_k)), [draw(device, dtype, tokens, width)]

            def make_unpermute(device, shape=shape, width=width, dtype=dtype):
                pairs, _ = routed_pairs(device, **shape)
                places = (shape["tokens"], shape["top_k"])
                inputs = [draw(device, dtype, pairs.shape[0], width)]
                inputs.append(draw(device, torch.float32, *places))
                return (lambda y, w: unpermute(y, pairs, w, places)), inputs

            product = 2.0 * rows * width * 2 * ffn
            torch_too = {"triton": "triton", "torch": "torch", "reference": "reference"}
            goal = 0.75 if even and dtype == torch.bfloat16 else None
            yield Case(
                "grouped_linear", label, dtype, make_linear, product, 2 * product, "flops",
                torch_too, goal,
            )  # fmt: skip
            # Under "torch" the op is its composition: permute, grouped_mm, activation, unpermute.
            yield Case(
                "expert_feed_forward", label, dtype, make_ffn, product * 1.5, product * 3, "flops",
                torch_too, goal,
            )  # fmt: skip
            row = width * dtype.itemsize
            gathered = (rows + min(rows, tokens)) * row
            yield Case("permute", label, dtype, make_permute, gathered, gathered)
            summed = (rows + tokens) * row
            yield Case("unpermute", label, dtype, make_unpermute, summed, (2 * rows + tokens) * row)


def attention(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [([4096] * 4, 16, 16, 128), ([8192, 4096, 2048, 1024, 1024], 32, 8, 128)]
    more = [([2048] * 16, 16, 16, 64), ([65536], 16, 4, 128)]
    sizes = [([24, 8], 2, 1, 16)] if tiny else sizes if quick else sizes + more
    for dtype in dtypes(tiny, quick):
        for lengths, heads, kv_heads, head_dim in sizes:
            if dtype == torch.float32 and max(lengths) > 8192:
                continue
            pairs = sum(n * (n + 1) / 2 for n in lengths)
            label = f"{len(lengths)} x {max(lengths)} H {heads}/{kv_heads} h {head_dim}"

            def make(
                device, half, lengths=lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                dtype=dtype,
            ):  # fmt: skip
                layout = TokenLayout.from_lengths(lengths, device=device)
                queries, keys = layout, None
                if half:
                    # Every second token executes, as in SkipLayer.
                    index = torch.arange(0, layout.tokens, 2, device=device)
                    starts = (layout.cu_seqlens + 1) // 2
                    queries, keys = layout.take(index, starts, (max(lengths) + 1) // 2), layout
                inputs = [draw(device, dtype, queries.tokens, heads, head_dim)]
                inputs += [draw(device, dtype, layout.tokens, kv_heads, head_dim) for _ in "kv"]

                def call(q, k, v):
                    return varlen_attention(q, k, v, queries=queries, keys=keys)

                return call, inputs

            flops = 4.0 * heads * head_dim * pairs
            libraries = {n: n for n in ("triton", "torch", "flash", "reference")}
            yield Case(
                "varlen_attention", label, dtype, lambda d, m=make: m(d, False), flops, 2.5 * flops,
                "flops", libraries,
            )  # fmt: skip
            yield Case(
                "varlen_cross_attention", label, dtype, lambda d, m=make: m(d, True), flops / 2,
                1.25 * flops, "flops",
            )  # fmt: skip


class _Part(torch.autograd.Function):
    """What a rank of a ring computes with the keys of another, as if these were all keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
        ctx.blocks = choose("ring_attention", q).function()
        out, lse = ctx.blocks.attend(q, k, v, pair)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pair = pair
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (grad * out).sum(-1)
        return *ctx.blocks.backward(q, grad.to(q.dtype), lse, delta, k, v, ctx.pair), None


def ring_parts(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [(8192, 32, 8, 128), (4096, 16, 16, 128), (16384, 16, 4, 64)]
    sizes = [(24, 2, 1, 16)] if tiny else sizes[:1] if quick else sizes
    for dtype in dtypes(tiny, quick):
        for tokens, heads, kv_heads, head_dim in sizes:

            def make(
                device, tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                dtype=dtype,
            ):  # fmt: skip
                # The later half of a sequence meets the earlier one: no pair is masked.
                positions = torch.arange(2 * tokens, device=device)
                halves = (positions, torch.zeros_like(positions), (tokens, tokens))
                layout = RingLayout.of(*halves, None)
                pair = Pair(layout, layout, 1, 0)
                inputs = [draw(device, dtype, tokens, heads, head_dim)]
                inputs += [draw(device, dtype, tokens, kv_heads, head_dim) for _ in "kv"]
                return (lambda q, k, v: _Part.apply(q, k, v, pair)), inputs

            flops = 4.0 * heads * head_dim * tokens**2
            yield Case(
                "ring_attention", f"T {tokens} H {heads}/{kv_heads} h {head_dim}", dtype, make,
                flops, 2.5 * flops, "flops",
            )  # fmt: skip


def parameter_tokens(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [(16384, 1024, 4096), (16384, 2048, 2048), (65536, 768, 768), (8192, 4096, 16384)]
    sizes = [(32, 16, 24)] if tiny else sizes[:2] if quick else sizes
    for dtype in dtypes(tiny, quick):
        for tokens, width, count in sizes:

            def make(device, tokens=tokens, width=width, count=count, dtype=dtype):
                inputs = [draw(device, dtype, tokens, width)]
                inputs += [draw(device, dtype, count, width, scale=0.02) for _ in "kv"]
                return (lambda x, k, v: parameter_attention(x, k, v, scale=count**0.5)), inputs

            flops = 4.0 * tokens * width * count
            goal = 0.6 if dtype == torch.bfloat16 else None
            yield Case(
                "parameter_attention", f"T {tokens} D {width} n {count}", dtype, make, flops,
                2 * flops, "flops", {n: n for n in ("triton", "torch", "reference")}, goal,
            )  # fmt: skip


def routing(tiny: bool, quick: bool) -> Iterator[Case]:
    sizes = [(8, 4096), (1, 65536)] if not tiny else [(2, 64)]
    for batch, seq_len in sizes:

        def make_top(device, batch=batch, seq_len=seq_len):
            scores = torch.randn(batch, seq_len, device=device)
            return (lambda: highest_columns(scores, seq_len // 8)), []

        def make_order(device, batch=batch, seq_len=seq_len):
            units = torch.randint(64, (2 * batch * seq_len,), device=device)
            return (lambda: order_by_unit(units, 64)[0]), []

        label, tokens = f"B {batch} S {seq_len}", batch * seq_len
        yield Case("highest_columns", label, torch.float32, make_top, 4 * tokens + tokens, 0)
        yield Case("order_by_unit", f"N {2 * tokens}", torch.float32, make_order, 32 * tokens, 0)


def losses(tiny: bool, quick: bool) -> Iterator[Case]:
    tokens, vocabulary = (32, 64) if tiny else (16384, 32768 if quick else 131072)
    for dtype in dtypes(tiny, quick):

        def make(device, dtype=dtype):
            targets = torch.randint(vocabulary, (tokens,), device=device)
            # As a model calls it: the logits are nobody else's.
            return (lambda x: cross_entropy(x.view_as(x), targets, overwrite=True)), [
                draw(device, dtype, tokens, vocabulary)
            ]

        size = tokens * vocabulary * dtype.itemsize
        yield Case(
            "cross_entropy", f"T {tokens} V {vocabulary}", dtype, make, size, 2 * size,
            backends={n: n for n in ("torch", "reference")},
        )  # fmt: skip
