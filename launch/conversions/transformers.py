"""Begin a run with a model of transformers.

    python -m launch.convert transformers MODEL --output RUN

MODEL is a folder as `save_pretrained` writes it (config.json, *.safetensors, tokenizer.json), or a
.gguf file: Llama, Mistral, Qwen 2 and 3, Phi-3, Mixtral, Qwen 2 and 3 with experts, OLMoE, and
those of `adaptive.hub`. RUN is sampled by launch.generate, trained on by the line that is printed,
and taken by every other conversion.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from launch.checkpoint.beginning import begin_run, check_new_run
from launch.checkpoint.published import copy_tokenizer, is_published, read_published
from launch.run.config import load_config
from launch.run.errors import BadInput


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of transformers, or a .gguf file")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the run"
    )
    parser.add_argument("--config", metavar="YAML", help="recipe of everything but the model")


def convert(options: argparse.Namespace) -> Path:
    """Read, begin the run; returns its checkpoint."""
    source, output = options.model.expanduser(), options.output
    check_new_run(output, source=source)
    if not is_published(source):
        raise BadInput(f"{source}: must be a folder with config.json, or a .gguf file")
    run = load_config(options.config, [f"output={output}"])
    weights, model = read_published(source)
    tokenizer = copy_tokenizer(source, output / "tokenizer")
    data = replace(run.data, seq_len=min(run.data.seq_len, model.max_seq_len))
    if tokenizer is None:
        print(f"{source}: has no tokenizer.json: give the run data.tokenizer", flush=True)
    else:
        data = replace(data, tokenizer=tokenizer, end_of_text=None)
    if model.tie_embeddings:
        del weights["output.weight"]
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{count:,} parameters, {model.num_layers} layers of width {model.dim}", flush=True)
    return begin_run(run, weights, output=output, model=model, data=data)
