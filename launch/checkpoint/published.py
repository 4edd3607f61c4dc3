"""Folders as transformers' `save_pretrained` writes them, read and written as our decoders.

    config.json                     the settings
    model.safetensors               the weights, or
    model-00001-of-00002.safetensors, …, model.safetensors.index.json
    tokenizer.json, tokenizer_config.json, …

Every file is read once, a tensor at a time. Nothing in a folder is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaptive.models.decoder.model import DecoderConfig
from adaptive.models.weights.transformers import (
    decoder_config,
    from_transformers,
    to_transformers,
    transformers_settings,
)
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput, as_bad_input
from launch.run.plain_data import read_json
from launch.run.terminal import announced
from launch.run.writable import follow_umask, write_text_whole

SETTINGS, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9
_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def is_published(path: Path) -> bool:
    """Whether a model of transformers lies there: a folder with config.json, or a gguf file."""
    return (path / SETTINGS).is_file() or path.suffix == ".gguf"


def read_published(path: Path) -> tuple[dict[str, Tensor], DecoderConfig]:
    """Whole float32 weights under our names, and the decoder's configuration.

    Args:
        path: a folder, or a gguf file (read by transformers and the package gguf).

    Raises:
        BadInput: it cannot be read, or holds what a Decoder cannot be.
    """
    if path.suffix == ".gguf":
        return _read_gguf(path)
    with as_bad_input(path), announced(f"reading {path}"):
        try:
            config = decoder_config(read_settings(path))
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{SETTINGS}: holds a value of another kind: {error}") from None
        return from_transformers(_tensors(path), config, dtype=torch.float32), config


def read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        BadInput: it is none.
    """
    return _json_object(folder / SETTINGS, "the settings of a model")


def write_published(
    weights: Mapping[str, Tensor],
    config: DecoderConfig,
    folder: Path,
    *,
    tokenizer: Tokenizer | None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a decoder as a model of transformers; all of the folder or nothing.

    Args:
        weights: under our names, tied ones once or twice.
        config: of the decoder.
        folder: must not exist.
        tokenizer: goes with it; None: none does.
        shard_bytes: largest file of weights, but for a larger tensor.

    Raises:
        ValueError: no model of transformers computes the same.
    """
    settings = transformers_settings(config)
    named = to_transformers(weights, config)
    if tokenizer is not None:
        settings |= {"eos_token_id": tokenizer.end}
    with _whole_folder(folder) as part:
        write_text_whole(part / SETTINGS, json.dumps(settings, indent=2) + "\n")
        _write_shards(named, part, shard_bytes)
        if tokenizer is not None:
            write_tokenizer(tokenizer, part)
    return folder


def save_hub(model: Any, folder: Path, *, tokenizer: Tokenizer, shard_bytes: int) -> Path:
    """Write a model of transformers, adapted or not; see `write_published`."""
    with _whole_folder(folder) as part:
        model.save_pretrained(part, max_shard_size=shard_bytes)
        write_tokenizer(tokenizer, part)
    return folder


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it that becomes `folder` when all of it is written."""
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def copy_tokenizer(source: Path, folder: Path) -> str | None:
    """Copy what a published model brings of a tokenizer; `data.tokenizer` for it, None: nothing."""
    if source.suffix == ".gguf":
        import transformers

        transformers.AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name
        ).save_pretrained(folder)
    elif not (source / "tokenizer.json").is_file():
        return None
    else:
        _copy_files(source, folder)
    return str(folder.resolve())


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as transformers reads one; bytes become a vocabulary of 256."""
    if tokenizer.name == "bytes":
        end: str | None = "\0"
        text = json.dumps(_byte_level(), ensure_ascii=False)
        write_text_whole(folder / "tokenizer.json", text)
    else:
        _copy_files(tokenizer.path.parent, folder)
        end = None if tokenizer.end is None else tokenizer.token(tokenizer.end)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        write_text_whole(file, json.dumps(said, indent=2) + "\n")


def _read_gguf(file: Path) -> tuple[dict[str, Tensor], DecoderConfig]:
    if not file.is_file():
        raise BadInput(f"{file}: no such file")
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise BadInput(
            f"{file}: needs the package {error.name}: pip install 'adaptive-transformers[demo]'"
        ) from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except Exception as error:  # transformers raises anything
        raise BadInput(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    with as_bad_input(file):
        # The weights are plain numbers by now.
        config = decoder_config(model.config.to_dict() | {"quantization_config": None})
        return from_transformers(model.state_dict(), config), config


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder, each file read once."""
    index = folder / INDEX
    if index.is_file():
        names = _json_object(index, "a weight_map").get("weight_map")
        if not isinstance(names, dict):
            raise BadInput(f"{index}: must hold a weight_map")
        files = sorted({str(name) for name in names.values()})
        for name in files:
            if Path(name).name != name:
                raise BadInput(f"{index}: {name}: must be a file beside it")
            if not (folder / name).is_file():
                raise BadInput(f"{folder / name}: no such file, and {INDEX} names it")
    elif (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder}: has no *.safetensors")
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)
        except SafetensorError as error:
            raise BadInput(f"{folder / name}: cannot be read: {error}") from None


def _write_shards(named: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in named.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = [WEIGHTS] if len(shards) == 1 else files
    for file, names in zip(files, shards, strict=True):
        tensors = {name: named[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        follow_umask(folder / file)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        said = {"metadata": {"total_size": total}, "weight_map": where}
        write_text_whole(folder / INDEX, json.dumps(said, indent=2) + "\n")


def _copy_files(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in _OF_TOKENIZERS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _byte_level() -> dict[str, Any]:
    """The tokenizer.json of bytes: id n is byte n, and a NUL is the end of a text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Byte-level vocabularies call the others by the characters from 256 on.
    others = (n for n in range(256) if n not in plain)
    called = {n: chr(n) for n in plain} | {n: chr(256 + i) for i, n in enumerate(others)}
    called[0] = "\0"
    end = {"id": 0, "content": "\0", "special": True}
    way = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "pre_tokenizer": way,
        "decoder": way,
        "model": {
            "type": "BPE",
            "vocab": {text: byte for byte, text in sorted(called.items())},
            "merges": [],
        },
    }


def _json_object(file: Path, what: str) -> dict[str, Any]:
    try:
        found = read_json(file)
    except (ValueError, OSError) as error:
        raise BadInput(f"{file}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file}: must hold {what}")
    return found
