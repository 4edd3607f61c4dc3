"""How well a model predicts texts: `python -m launch.evaluate RUN --data SOURCE`

RUN is a run, a checkpoint, or a folder of transformers (adapted models too). SOURCE is what
data.path takes; give several, each is measured alone. Every document is read alone, behind an end
of text, in windows of --context tokens that score --stride tokens each; every token is scored once.
Prints the loss (nats a token), bits a byte of the text, perplexity, and what a token cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoint.models import add_device
from launch.data.text import TextConfig
from launch.evaluation.documents import read_documents
from launch.evaluation.scoring import Scorer, Window, before_text, open_scorer, windows_of
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts
from launch.run.trust import add_trust_option
from launch.run.writable import check_file, write_text_whole

_CONTEXT, _SPOKEN = 1024, 5.0


@dataclass
class Measured:
    """What was measured of one source.

    Attributes:
        data: the source.
        documents, tokens, bytes: read; tokens are those scored.
        nats: sum of their losses.
        executed, nominal: operations, and those of a dense model; NaN: not counted.
        seconds: spent in the model.
    """

    data: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    executed: float = 0.0
    nominal: float = 0.0
    seconds: float = 0.0

    def result(self) -> dict[str, Any]:
        """As it is written; null where nothing is known."""
        loss = self.nats / max(self.tokens, 1)
        counted = math.isfinite(self.executed) and self.nominal > 0
        return {
            "data": self.data,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": loss,
            "bits_per_byte": self.nats / math.log(2) / max(self.bytes, 1),
            "perplexity": math.exp(loss) if loss < 700 else None,
            "operations_per_token": self.executed / max(self.tokens, 1) if counted else None,
            "share_of_dense": self.executed / self.nominal if counted else None,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m launch.evaluate", description=__doc__)
    add_trust_option(parser)
    parser.add_argument("model", help="a run, a checkpoint, or a folder of transformers")
    parser.add_argument("--data", action="append", required=True, help="as data.path; repeatable")
    parser.add_argument(
        "--text-field", default=TextConfig().text_field, help="column that is the text"
    )
    parser.add_argument(
        "--context", type=int, help=f"tokens read at once; default: the model's, to {_CONTEXT}"
    )
    parser.add_argument("--stride", type=int, help="tokens scored a window; default: half of it")
    parser.add_argument("--documents", type=int, help="the first so many of each source")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of one forward")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_device(parser)
    return parser


@program
def main(arguments: list[str] | None = None) -> None:
    """Measure every source, print, write."""
    options = arguments_parser().parse_args(arguments)
    check_counts(options, "context", "stride", "documents", "batch_size")
    if options.output is not None:
        check_file("--output", options.output)
    scorer = open_scorer(options.model, device=options.device)
    context = min(scorer.max_length, _CONTEXT) if options.context is None else options.context
    if context > scorer.max_length:
        raise BadInput(f"--context={context}: must be at most {scorer.max_length}, the model's")
    stride = max(context // 2, 1) if options.stride is None else options.stride
    if stride > context:
        raise BadInput(f"--stride={stride}: must be at most --context={context}")
    if not scorer.causal:
        print("note: routing looks at later tokens, so that this is no loss of prediction")
    found = [
        measure(scorer, data, context=context, stride=stride, options=options)
        for data in options.data
    ]
    print(f"context {context}, stride {stride}")
    print(table([one.result() for one in found]))
    if options.output is not None:
        said = {
            "model": options.model,
            "context": context,
            "stride": stride,
            "causal": scorer.causal,
            "sources": [one.result() for one in found],
        }
        write_text_whole(options.output, json.dumps(said, indent=2) + "\n")


def measure(
    scorer: Scorer, data: str, *, context: int, stride: int, options: argparse.Namespace
) -> Measured:
    """Losses of the documents of one source.

    Raises:
        BadInput: it holds none, or cannot be read.
    """
    total, said = Measured(data), time.perf_counter()

    def pieces() -> Iterator[Window]:
        documents = read_documents(data, scorer.tokenizer, text_field=options.text_field)
        for document in itertools.islice(documents, options.documents):
            before = before_text(document.ids, scorer.tokenizer)
            total.documents += 1
            total.bytes += document.bytes
            if before is None:
                first = scorer.tokenizer.decode(document.ids[:1])
                total.bytes -= len(first.encode()) if first else 0
            yield from windows_of(document.ids, before, context=context, stride=stride)

    for batch in _batched(pieces(), options.batch_size):
        begun, executed, nominal = time.perf_counter(), scorer.executed, scorer.nominal
        for prediction in scorer.predict(batch):
            total.nats += float(prediction.losses.double().sum())
            total.tokens += len(prediction.losses)
        now = time.perf_counter()
        total.seconds += now - begun
        total.executed += scorer.executed - executed
        total.nominal += scorer.nominal - nominal
        if now - said > _SPOKEN:
            said = now
            loss, rate = total.nats / total.tokens, total.tokens / total.seconds
            print(
                f"{data}: {total.documents:,} documents, {total.tokens:,} tokens, "
                f"loss {loss:.4f}, {rate:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    if not total.tokens:
        raise BadInput(f"--data={data}: holds no token to score")
    return total


def table(results: list[dict[str, Any]]) -> str:
    """Results as lines of a terminal."""
    heads = ("tokens", "loss", "bits a byte", "perplexity", "MFLOP a token", "of dense", "tokens/s")
    lines = [f"{'':24s}" + "".join(f"{head:>15s}" for head in heads)]
    for one in results:
        flops, share = one["operations_per_token"], one["share_of_dense"]
        perplexity = one["perplexity"]
        cells = (
            f"{one['tokens']:,}",
            f"{one['loss']:.4f}",
            f"{one['bits_per_byte']:.4f}",
            "" if perplexity is None else f"{perplexity:,.2f}",
            "not counted" if flops is None else f"{flops / 1e6:,.2f}",
            "" if share is None else f"{share:.1%}",
            f"{one['tokens_per_second']:,.0f}",
        )
        lines.append(f"{one['data'][-24:]:24s}" + "".join(f"{cell:>15s}" for cell in cells))
    return "\n".join(lines)


def _batched(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while batch := list(itertools.islice(windows, size)):
        yield batch


if __name__ == "__main__":
    main()
