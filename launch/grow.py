"""Grow the parameter tokens of a TokenFormer checkpoint; its function and its optimizer go on.

    python -m launch.grow runs/small --tokens 128 --ffn-tokens 512 --output runs/large

Works on a checkpoint of any ranks and ZeRO stage, and writes one that any can continue. The
source is only read. Prints a receipt: the largest change of the logits on held-out data, the
parameters before and after, what became of the moments, and the command that continues.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from launch.checkpoint.growth import grow_checkpoint
from launch.checkpoint.models import add_checkpoint
from launch.run.errors import OneLineParser, program
from launch.run.options import check_counts


@program
def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m launch.grow", description=__doc__)
    add_checkpoint(parser)
    for name, what in (
        ("tokens", "the projections"),
        ("ffn-tokens", "the feed-forwards"),
        ("output-tokens", "the output projections; default: --tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"parameter tokens of {what}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the grown run")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows to compare logits on")
    parser.add_argument("--steps", type=int, help="steps of the grown run; default: as before")
    if not torch.cuda.is_available():
        # A checkpoint's pickles load deepspeed, which would say that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options = parser.parse_args(arguments)
    check_counts(options, "rows", "steps", "tokens", "ffn_tokens", "output_tokens")
    receipt = grow_checkpoint(
        options.checkpoint,
        Path(options.output),
        tokens=options.tokens,
        ffn_tokens=options.ffn_tokens,
        output_tokens=options.output_tokens,
        rows=options.rows,
        steps=options.steps,
    )
    print(receipt)


if __name__ == "__main__":
    main()
