"""Options of launch.generate that change what computes a token: speculation and SkipDecode."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from adaptive.models.decoder.decode_depth import SkipDecode, generate_at_depth
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculation.controllers import Confidence, Controller, Fixed, Thompson
from adaptive.models.decoder.speculation.drafts import (
    Draft,
    ExitDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
)
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter
from adaptive.models.decoder.speculation.trees import Budgeted, Independent, Shape
from adaptive.models.decoder.speculative import VERIFICATIONS, speculate
from adaptive.models.decoder.tree_speculation import speculate_trees
from launch.checkpoint.models import load_decoder
from launch.data.text import Tokenizer
from launch.run.errors import BadInput
from launch.run.plain_data import json_value
from launch.run.terminal import shown

_METADATA = "exit_adapter"
_TREE_RULES = ("k_seq", "recursive")
_CONTROLLERS = ("confidence", "fixed", "thompson")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this file."""
    group = parser.add_argument_group("depth")
    group.add_argument(
        "--draft",
        metavar="exit|ngram|recycling|CHECKPOINT",
        help="draft cheaply and verify several tokens at once, the same text or distribution:\n"
        "the first layers (with --exit-adapter), what followed the last tokens before in the\n"
        "text, what the model found likeliest before, or a smaller model of the same tokenizer",
    )
    group.add_argument(
        "--exit-adapter", metavar="FILE", help="of --draft exit: an adapter by launch.train_exit"
    )
    group.add_argument(
        "--verification",
        choices=(*VERIFICATIONS, *_TREE_RULES),
        default="chain",
        help="of drafts; greedy is for --temperature 0 only, where both are the same; k_seq and\n"
        "recursive are of --tree, and make it of independent chains of --max-draft tokens",
    )
    group.add_argument(
        "--controller",
        choices=_CONTROLLERS,
        default="confidence",
        help="how much is drafted: while a draft is likely (--draft-threshold), always\n"
        "--max-draft, or as much as pays by measured times and acceptance: perhaps nothing",
    )
    group.add_argument(
        "--draft-threshold",
        type=float,
        default=0.6,
        help="least probability of a draft to draft further",
    )
    group.add_argument("--max-draft", type=int, default=6, help="most tokens drafted at once")
    group.add_argument(
        "--tree",
        type=int,
        metavar="NODES",
        help="draft a tree of so many tokens at most, several for a place, verified in one pass",
    )
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
    if options.exit_adapter is not None and options.draft is None:
        options.draft = "exit"
    if options.draft is None and options.tree is not None:
        raise BadInput("--tree: needs --draft")
    if options.draft is None and options.skip_decode is None:
        if options.compare:
            raise BadInput("--compare: needs --draft or --skip-decode")
        return False
    if options.draft is not None and options.skip_decode is not None:
        raise BadInput("--draft and --skip-decode: give one of them")
    if (options.draft == "exit") != (options.exit_adapter is not None):
        raise BadInput("--exit-adapter: needs --draft exit, and --draft exit needs it")
    if options.draft is not None and options.verification == "greedy" and options.temperature != 0:
        raise BadInput(f"--temperature={options.temperature}: must be 0 with --verification greedy")
    if options.verification in _TREE_RULES and options.tree is None:
        raise BadInput(f"--verification={options.verification}: needs --tree")
    if options.tree is not None:
        chains = options.verification in _TREE_RULES
        least, what = (max(options.max_draft, 1), "--max-draft") if chains else (1, "1")
        if options.tree < least:
            raise BadInput(f"--tree={options.tree}: must be at least {what}")
    if options.show_routing or options.allow_non_causal:
        word = "--show-routing" if options.show_routing else "--allow-non-causal"
        raise BadInput(f"{word}: cannot be combined with --draft or --skip-decode")
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
        draft = None if options.draft is None else load_draft(options, model)
        begun = time.perf_counter()
        if draft is not None:
            tokens, told = _speculate(options, model, tokenizer, prompt, sampling, draft)
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


def load_draft(options: argparse.Namespace, model: Decoder) -> Draft:
    """What `--draft` names, on the model's device.

    Raises:
        BadInput: no such adapter or checkpoint.
        ValueError: a model that cannot sample.
    """
    if options.draft == "exit":
        return ExitDraft(load_adapter(Path(options.exit_adapter), model))
    if options.draft == "ngram":
        return NgramDraft()
    if options.draft == "recycling":
        return RecyclingDraft()
    device = str(model.embedding.weight.device)
    return ModelDraft(load_decoder(options.draft, device=device).model)


def _controller(options: argparse.Namespace) -> Controller:
    if options.controller == "fixed":
        return Fixed(options.max_draft)
    if options.controller == "thompson":
        return Thompson(options.max_draft, seed=options.seed)
    return Confidence(options.draft_threshold, options.max_draft)


def _shape(options: argparse.Namespace) -> Shape:
    if options.verification in _TREE_RULES:
        length = options.max_draft
        return Independent(options.tree // max(length, 1), length, rule=options.verification)
    return Budgeted(options.tree)


def _speculate(
    options: argparse.Namespace,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    draft: Draft,
) -> tuple[list[int], str]:
    common: dict[str, Any] = {
        "max_new_tokens": options.max_tokens,
        "controller": _controller(options),
        "sampling": sampling,
        "generator": _generator(options, model),
        "vocab_size": tokenizer.vocab_size,
        "end": None if options.ignore_end else tokenizer.end,
    }
    if options.tree is not None:
        *_, made = speculate_trees(model, [prompt], draft, shape=_shape(options), **common)
    else:
        verification = options.verification
        *_, made = speculate(model, [prompt], draft, verification=verification, **common)
    return made.tokens[0], (
        f"{made.accepted} of {made.drafted} drafts accepted ({made.acceptance:.0%}), "
        f"{made.tokens_per_round:.2f} tokens a pass through the whole model"
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
        end=None if options.ignore_end or options.draft is None else tokenizer.end,
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
            about = json_value((file.metadata() or {})[_METADATA])
        adapter = ExitAdapter.of(model, int(about["exit_layer"]))
        adapter.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--exit-adapter={path}: is not an adapter of this model: {reason}"
        ) from None
    return adapter.to(model.embedding.weight.device)
