"""Write a decoder, or what task hub_lm trained, as a model of transformers.

    python -m launch.convert to_transformers RUN --output FOLDER

FOLDER gets config.json, safetensors (sharded, with an index, if large) and the tokenizer, and loads
by AutoModelForCausalLM and AutoTokenizer; where layers route tokens, after `import adaptive.hub`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adaptive.models.decoder.model import DecoderConfig
from launch.checkpoint.files import find_checkpoint, load_model, read_whole
from launch.checkpoint.models import add_checkpoint
from launch.checkpoint.published import SHARD_BYTES, save_hub, write_published
from launch.data.tokenizer import Tokenizer
from launch.run.config import load_saved
from launch.run.errors import BadInput, as_bad_input
from launch.run.writable import check_folder
from launch.tasks.language_model import LanguageModelTask
from launch.tasks.registry import make_task


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="largest file of weights"
    )


def convert(options: argparse.Namespace) -> Path:
    """Read, write; returns the folder."""
    output: Path = options.output
    if output.exists():
        raise BadInput(f"--output={output}: exists; give a new folder")
    if options.shard_bytes < 1:
        raise BadInput(f"--shard-bytes={options.shard_bytes}: must be at least 1")
    check_folder("--output", output)
    folder = find_checkpoint(options.checkpoint)
    task = make_task(load_saved(folder))
    config, data = task.config.model, task.config.data
    if not isinstance(task, LanguageModelTask):
        raise BadInput(f"{options.checkpoint}: holds no language model")
    tokenizer = Tokenizer(data.tokenizer, data.end_of_text)
    if not isinstance(config, DecoderConfig):
        model, _ = load_model(folder)
        return save_hub(model, output, tokenizer=tokenizer, shard_bytes=options.shard_bytes)
    whole = read_whole(folder, moments=False)
    with as_bad_input(options.checkpoint):
        return write_published(
            whole.weights, config, output, tokenizer=tokenizer, shard_bytes=options.shard_bytes
        )
