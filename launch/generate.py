"""Sample from a checkpoint: `python -m launch.generate RUN --prompt 'def '`.

Text streams to the terminal; a last line on standard error tells how fast it came and what it
cost. `--show-routing` colours every token by how many layers computed it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

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
from launch.checkpoint.models import (
    SavedDecoder,
    SavedModel,
    add_checkpoint,
    add_device,
    load_language_model,
)
from launch.data.prompts import first_tokens
from launch.data.tokenizer import Tokenizer
from launch.generation import depth, hub, prompts
from launch.generation.text import RoutingWriter, TextWriter
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts, check_seed

_CALIBRATION_ROWS = 16


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.generate",
        description=__doc__,
    )
    add_checkpoint(parser)
    parser.add_argument("--prompt", default="def ", help="text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens to draw")
    parser.add_argument(
        "--ignore-end", action="store_true", help="go on where the model ends the text"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    add_device(parser)
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
    prompts.add_options(parser)
    depth.add_options(parser)
    return parser


@program
def main(arguments: list[str] | None = None) -> None:
    options = arguments_parser().parse_args(arguments)
    try:
        write_text(options)
    except BrokenPipeError:
        # Who read the text has seen enough; what is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_text(options: argparse.Namespace) -> None:
    """Load, check, generate, print."""
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise BadInput(f"--{str(error).replace('_', '-', 1)}") from None
    check_counts(options, "max_tokens")
    check_seed(options.seed)
    many, other_depth = prompts.wanted(options), depth.wanted(options)
    saved = load_language_model(options.checkpoint, device=options.device)
    model = saved.model
    if not isinstance(saved, SavedDecoder) and (many or other_depth or options.show_routing):
        name = "several prompts" if many else "--show-routing"
        name = "options of depth" if other_depth else name
        raise BadInput(f"{options.checkpoint}: is a model of transformers, which takes no {name}")
    looking_ahead = non_causal_layers(model)
    if looking_ahead and not options.allow_non_causal:
        raise BadInput(
            f"{options.checkpoint}: {looking_ahead[0]} chooses tokens by looking at later ones "
            "(it has no predictor), so it cannot sample; --allow-non-causal does so nevertheless"
        )
    data = saved.config.data
    tokenizer = Tokenizer(data.tokenizer, data.end_of_text)
    if many and isinstance(saved, SavedDecoder):
        _calibrate(options, saved)
        prompts.write_all(options, saved, tokenizer, sampling)
        return
    # Bytes, whatever they are: a prompt cut in the middle of a character is still a prompt.
    given = sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt)
    prompt = first_tokens(data, tokenizer, given, where="--prompt")
    if isinstance(model, Decoder):
        try:
            check_prompts(model, [prompt])
        except ValueError as error:
            raise BadInput(f"--{error}") from None
    _calibrate(options, saved)
    end = None if options.ignore_end else tokenizer.end
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(options.seed)
    if not isinstance(model, Decoder):
        hub.write_text(
            saved,
            prompt,
            tokenizer,
            sampling,
            generator,
            max_tokens=options.max_tokens,
            end=end,
            cached=not looking_ahead,
        )
        return
    if other_depth:
        depth.decode(options, model, tokenizer, prompt, sampling)
        return
    begun, made = time.perf_counter(), None
    writer = RoutingWriter if options.show_routing else TextWriter
    out = writer(tokenizer, sys.stdout, layers=len(model.layers), end=end)
    try:
        for made in generate(
            model,
            [prompt],
            max_new_tokens=options.max_tokens,
            sampling=sampling,
            generator=generator,
            vocab_size=tokenizer.vocab_size,
            cached=not looking_ahead,
            end=end,
        ):
            out.show(made)
    finally:
        out.close()
    assert made is not None
    print(summary(model, made, seconds=time.perf_counter() - begun), file=sys.stderr)


def _calibrate(options: argparse.Namespace, saved: SavedModel) -> None:
    if not options.calibrate:
        return
    for name, threshold in calibrate_on_held_out(saved).items():
        print(f"calibrated {name}: threshold {threshold:+.3f}", file=sys.stderr)


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


def calibrate_on_held_out(saved: SavedModel) -> dict[str, float]:
    """Thresholds from the held-out rows of the run's own data, as training shows them."""
    task, device = saved.task, next(saved.model.parameters()).device
    rows = range(min(_CALIBRATION_ROWS, task.validation_rows))
    batches = [task.on_device(task.validation_batch(range(n, n + 1)), device) for n in rows]
    return calibrate(saved.model, batches, forward=lambda b: task.validation_sums(saved.model, b))


if __name__ == "__main__":
    main()
