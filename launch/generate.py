"""Sample from a checkpoint: `python -m launch.generate RUN --prompt 'def '`.

Text streams to the terminal; a last line on standard error tells how fast it came and what it
cost. `--show-routing` colours every token by how many layers computed it.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

import torch

from adaptive.blocks.calibration import calibrate
from adaptive.models.decoder.generate import (
    Generation,
    Sampling,
    check_prompts,
    generate,
    non_causal_layers,
)
from adaptive.models.decoder.model import Decoder
from launch.checkpoint.files import load_model
from launch.data.text import Corpus, Tokenizer
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts, check_seed
from launch.run.sections import RunConfig
from launch.run.terminal import shown, visible
from launch.tasks import decode_depth

_CALIBRATION_ROWS = 16


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.generate",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--prompt", default="def ", help="text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default cuda where there is one")
    parser.add_argument(
        "--show-routing", action="store_true", help="colour tokens by the layers that computed them"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="set predictor thresholds on held-out text so that the trained share executes",
    )
    parser.add_argument(
        "--allow-non-causal",
        action="store_true",
        help="sample from a model whose routing looks at later tokens; computes the whole prefix\n"
        "at every step, and the text is not what the model was trained to write",
    )
    decode_depth.add_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    with exit_on_bad_input():
        options = arguments_parser().parse_args(arguments)
        try:
            sample(options)
        except BrokenPipeError:
            # Who read the text has seen enough; what is left to flush goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sample(options: argparse.Namespace) -> None:
    """Load, check, generate, print."""
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise BadInput(f"--{str(error).replace('_', '-', 1)}") from None
    check_counts(options, "max_tokens")
    check_seed(options.seed)
    other_depth = decode_depth.wanted(options)
    device = chosen_device(options.device)
    model, config = load_model(options.checkpoint)
    if not isinstance(model, Decoder):
        raise BadInput(f"{options.checkpoint}: holds a {type(model).__name__}, not a text decoder")
    looking_ahead = non_causal_layers(model)
    if looking_ahead and not options.allow_non_causal:
        raise BadInput(
            f"{options.checkpoint}: {looking_ahead[0]} chooses tokens by looking at later ones "
            "(it has no predictor), so it cannot sample; --allow-non-causal does so nevertheless"
        )
    model = model.to(device)
    tokenizer = Tokenizer(config.data.tokenizer)
    # Bytes, whatever they are: a prompt cut in the middle of a character is still a prompt.
    given = sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt)
    prompt = tokenizer.encode_prompt(given)
    try:
        check_prompts(model, [prompt])
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    if options.calibrate:
        thresholds = calibrate_on_held_out(model, config)
        for name, threshold in thresholds.items():
            print(f"calibrated {name}: threshold {threshold:+.3f}", file=sys.stderr)
    if other_depth:
        decode_depth.decode(options, model, tokenizer, prompt, sampling)
        return
    generator = torch.Generator(device).manual_seed(options.seed)
    begun, made = time.perf_counter(), None
    writer = RoutingWriter if options.show_routing else TextWriter
    out = writer(tokenizer, sys.stdout, layers=len(model.layers))
    try:
        for made in generate(
            model,
            [prompt],
            max_new_tokens=options.max_tokens,
            sampling=sampling,
            generator=generator,
            vocab_size=tokenizer.vocab_size,
            cached=not looking_ahead,
        ):
            out.show(made)
    finally:
        out.close()
    assert made is not None
    print(summary(model, made, seconds=time.perf_counter() - begun), file=sys.stderr)


def summary(model: Decoder, made: Generation, *, seconds: float) -> str:
    """Speed, operations and routing of a generation, in one line."""
    drawn = sum(map(len, made.tokens))
    computed = [count for layers in made.layers for count in layers]
    executed, nominal = made.executed_flops(model), made.nominal_flops(model)
    share = executed / nominal
    held = "" if made.key_values is None else f", cache {made.key_values.bytes / 2**20:.2f} MiB"
    return (
        f"{drawn} tokens in {seconds:.1f} s, {drawn / seconds:.0f} tokens/s, "
        f"{executed / len(computed) / 1e6:.2f} MFLOP a token executed ({share:.0%} of dense), "
        f"{sum(computed) / len(computed):.2f} of {len(model.layers)} layers a token{held}"
    )


def calibrate_on_held_out(model: Decoder, config: RunConfig) -> dict[str, float]:
    """Thresholds from the held-out rows of the run's own data."""
    corpus = Corpus(config.data)
    rows = [corpus.validation_row(i) for i in range(min(_CALIBRATION_ROWS, corpus.validation_rows))]
    device = model.embedding.weight.device
    return calibrate(model, [torch.as_tensor(row[None, :-1]).long().to(device) for row in rows])


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        BadInput: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device={name}: {str(error).splitlines()[0]}") from None
    return device


class TextWriter:
    """Writes tokens as soon as they are whole characters: what is written is always valid UTF-8."""

    def __init__(self, tokenizer: Tokenizer, out: TextIO, *, layers: int) -> None:
        self._out, self._layers = out, layers
        self._decode = streaming_decoder(tokenizer)
        self._shown = 0

    def show(self, made: Generation) -> None:
        """Write what is new of the first sequence."""
        tokens = made.prompts[0] + made.tokens[0]
        while self._shown < self._ready(made):
            self._write(self._decode(tokens[self._shown], False), made)
            self._shown += 1
        self._out.flush()

    def close(self) -> None:
        """Write what was held back of an unfinished character."""
        if self._shown:
            self._out.write(self._decode(None, True) + "\n")
            self._out.flush()

    def _ready(self, made: Generation) -> int:
        return len(made.prompts[0]) + len(made.tokens[0])

    def _write(self, text: str, made: Generation) -> None:
        self._out.write(shown(text, self._out))


class RoutingWriter(TextWriter):
    """Colours tokens by the number of layers that computed them: from blue, few, to red, all.

    That is known only when the token has gone through the model, so the last one drawn is missing.
    """

    # Of the 256-colour terminal palette: as distinct as backgrounds under black text can be.
    _COLOURS = (39, 45, 50, 48, 83, 118, 190, 226, 220, 214, 208, 203)

    def _ready(self, made: Generation) -> int:
        return len(made.layers[0])

    def _write(self, text: str, made: Generation) -> None:
        if not text:
            return
        computed = made.layers[0][self._shown]
        place = (computed - made.always) / max(self._layers - made.always, 1)
        colour = self._COLOURS[round(place * (len(self._COLOURS) - 1))]
        for part in text.splitlines(keepends=True):
            body = visible(part.rstrip("\r\n"))
            coloured = f"\x1b[48;5;{colour};30m{body}\x1b[0m" if body else ""
            self._out.write(coloured + ("\n" if part.endswith("\n") else ""))


def streaming_decoder(tokenizer: Tokenizer) -> Callable[[int | None, bool], str]:
    """(token or None, whether it is the last) -> text that is complete by then."""
    if tokenizer.name == "bytes":
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token, last: decoder.decode(b"" if token is None else bytes([token]), last)
    # A tokenizer may write a token otherwise at the beginning of a text: what was written last is
    # decoded again before what is new.
    context: list[int] = []
    waiting: list[int] = []

    def decode(token: int | None, last: bool) -> str:
        nonlocal context, waiting
        waiting += [] if token is None else [token]
        before = tokenizer.decode(context)
        text = tokenizer.decode(context + waiting)
        # A character cut short shows as a replacement: it waits for the token that completes it.
        if not last and (text.endswith("\ufffd") or len(text) <= len(before)):
            return ""
        context, waiting = waiting or context, []
        return text[len(before) :]

    return decode


if __name__ == "__main__":
    main()
