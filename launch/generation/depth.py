"""Options of launch.generate that change how deep tokens go: early exit and SkipDecode."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculative import ExitAdapter, Speculator
from launch.data.text import Tokenizer
from launch.run.errors import BadInput
from launch.run.terminal import shown

_METADATA = "exit_adapter"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this file."""
    group = parser.add_argument_group("depth")
    group.add_argument(
        "--exit-adapter",
        metavar="FILE",
        help="draft with the model's first layers and this adapter (launch.train_exit), verify\n"
        "with all of them: the text of greedy decoding, sooner; needs --temperature 0",
    )
    group.add_argument(
        "--draft-threshold",
        type=float,
        default=0.6,
        help="least probability of a draft to draft further",
    )
    group.add_argument("--max-draft", type=int, default=6, help="most tokens drafted at once")
    group.add_argument(
        "--compare",
        action="store_true",
        help="also decode plainly, and tell the speed-up and whether the texts are the same",
    )
    group.add_argument(
        "--skip-decode",
        metavar="FIRST:LAST",
        help="run FIRST layers for the first new token, falling to LAST at --max-tokens",
    )


def wanted(options: argparse.Namespace) -> bool:
    """Whether some option of this file asks for another depth.

    Raises:
        BadInput: when they exclude one another or other options.
    """
    if options.exit_adapter is None and options.skip_decode is None:
        if options.compare:
            raise BadInput("--compare: needs --exit-adapter or --skip-decode")
        return False
    if options.exit_adapter is not None and options.skip_decode is not None:
        raise BadInput("--exit-adapter and --skip-decode: give one of them")
    if options.exit_adapter is not None and options.temperature != 0:
        raise BadInput(f"--temperature={options.temperature}: must be 0 with --exit-adapter")
    if options.show_routing or options.allow_non_causal:
        word = "--show-routing" if options.show_routing else "--allow-non-causal"
        raise BadInput(f"{word}: cannot be combined with --exit-adapter or --skip-decode")
    return True


def decode(
    options: argparse.Namespace,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
) -> None:
    """Generate at the depth asked for; text to standard output, the summary to standard error."""
    try:
        begun = time.perf_counter()
        if options.exit_adapter is not None:
            tokens, told = _speculate(options, model, tokenizer, prompt)
        else:
            tokens, told = _skip(options, model, tokenizer, prompt, sampling)
        seconds = time.perf_counter() - begun
        print(shown(tokenizer.decode(prompt + tokens), sys.stdout))
        line = f"{len(tokens)} tokens in {seconds:.2f} s, {len(tokens) / seconds:.0f} tokens/s"
        print(f"{line}, {told}", file=sys.stderr)
        if options.compare:
            print(_comparison(options, model, tokenizer, prompt, sampling, tokens, seconds))
    except ValueError as error:
        raise BadInput(f"{error}") from None


def _speculate(
    options: argparse.Namespace, model: Decoder, tokenizer: Tokenizer, prompt: list[int]
) -> tuple[list[int], str]:
    adapter = load_adapter(Path(options.exit_adapter), model)
    speculator = Speculator(
        model, adapter, threshold=options.draft_threshold, max_draft=options.max_draft
    )
    *_, made = speculator.generate(
        prompt, max_new_tokens=options.max_tokens, vocab_size=tokenizer.vocab_size
    )
    return made.tokens, (
        f"{made.accepted} of {made.drafted} drafts accepted ({made.acceptance:.0%}), "
        f"{made.tokens_per_round:.2f} tokens a pass through the late layers"
    )


def _skip(
    options: argparse.Namespace,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
) -> tuple[list[int], str]:
    try:
        first, last = (int(number) for number in options.skip_decode.split(":"))
    except ValueError:
        raise BadInput(f"--skip-decode={options.skip_decode}: must be FIRST:LAST") from None
    schedule = SkipDecode(len(model.layers), first, last, options.max_tokens)
    (tokens,) = generate_at_depth(
        model,
        [prompt],
        schedule,
        max_new_tokens=options.max_tokens,
        sampling=sampling,
        generator=_generator(options, model),
        vocab_size=tokenizer.vocab_size,
    )
    depths = [schedule.depth(position) for position in range(1, len(tokens))]
    mean = sum(depths) / max(len(depths), 1)
    return tokens, f"{mean:.2f} of {len(model.layers)} layers a token"


def _comparison(
    options: argparse.Namespace,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    tokens: list[int],
    seconds: float,
) -> str:
    begun = time.perf_counter()
    *_, made = generate(
        model,
        [prompt],
        max_new_tokens=options.max_tokens,
        sampling=sampling,
        generator=_generator(options, model),
        vocab_size=tokenizer.vocab_size,
    )
    plain = time.perf_counter() - begun
    same = "the same text" if made.tokens[0] == tokens else "another text"
    return f"plain decoding: {plain:.2f} s, {same}; speed-up {plain / seconds:.2f}x"


def _generator(options: argparse.Namespace, model: Decoder) -> torch.Generator:
    return torch.Generator(model.embedding.weight.device).manual_seed(options.seed)


def save_adapter(adapter: ExitAdapter, path: Path) -> None:
    """Write an adapter, with what it takes to build it."""
    about = {"exit_layer": adapter.exit_layer}
    save_file(dict(adapter.state_dict()), path, metadata={_METADATA: json.dumps(about)})


def load_adapter(path: Path, model: Decoder) -> ExitAdapter:
    """Read an adapter for a model, onto the model's device.

    Raises:
        BadInput: no such file, or it is not an adapter of this model.
    """
    if not path.is_file():
        raise BadInput(f"--exit-adapter={path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
        adapter = ExitAdapter.of(model, int(about["exit_layer"]))
        adapter.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--exit-adapter={path}: is not an adapter of this model: {reason}"
        ) from None
    return adapter.to(model.embedding.weight.device)
