"""Encode documents once: `python -m launch.encode SOURCE --output FOLDER --tokenizer DIR`

Writes FOLDER/train and FOLDER/validation, each a .bin and .idx that Megatron reads too. Train on
them by data.path=FOLDER and the same data.tokenizer. All cores work; what is interrupted goes on
where it stopped, by the same command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from launch.data.conversations import Conversations
from launch.data.encoding import Encoding, encode_into
from launch.data.sources import find_files
from launch.data.text import TextConfig
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.terminal import command
from launch.run.writable import check_folder


def arguments_parser() -> argparse.ArgumentParser:
    """The options, named as the keys of section data are."""
    usual = TextConfig()
    parser = OneLineParser(prog="python -m launch.encode", description=__doc__)
    parser.add_argument("source", help="a file, a folder or a glob, as data.path")
    parser.add_argument("--output", required=True, help="folder of the encoded text")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or where tokenizer.json is")
    parser.add_argument("--end-of-text", help="the token between documents; its own by default")
    parser.add_argument("--text-field", default=usual.text_field, help="column that is the text")
    parser.add_argument(
        "--conversations", action="store_true", help="rows are conversations, not texts"
    )
    parser.add_argument(
        "--chat-template", choices=["plain", "tokenizer"], default="plain", help="how they look"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=usual.validation_fraction,
        help="share of the documents that is held out",
    )
    return parser


@program
def main(arguments: list[str] | None = None) -> None:
    """Encode, or say that it is done."""
    options = arguments_parser().parse_args(arguments)
    try:
        TextConfig(path=options.source, validation_fraction=options.validation_fraction)
    except ValueError as error:
        raise BadInput(f"--{str(error).replace('_', '-')}") from None
    check_folder("--output", options.output)
    output = Path(options.output)
    tokenizer = Tokenizer(options.tokenizer, options.end_of_text)
    chat = Conversations(options.chat_template, tokenizer) if options.conversations else None
    wanted = Encoding(
        find_files(options.source),
        tokenizer,
        options.text_field,
        chat,
        options.validation_fraction,
    )
    held = [file for file in wanted.files if file.kind == "ids"]
    if held:
        raise BadInput(f"{held[0].path}: holds token ids already: train on it by data.path")
    if output.is_dir() and any(output.iterdir()):
        if _key_in(output) != wanted.key:
            raise BadInput(f"--output={output}: holds something else: give another folder")
    else:
        if output.is_dir():
            output.rmdir()
        encode_into(wanted, output)
    meta = json.loads((output / "meta.json").read_text(encoding="utf-8"))
    for split, tokens in meta["tokens"].items():
        print(f"{output / split}: {tokens:,} tokens in {meta['documents'][split]:,} documents")
    settings = [f"data.path={output}", f"data.tokenizer={options.tokenizer}"]
    if options.end_of_text is not None:
        settings.append(f"data.end_of_text={options.end_of_text}")
    if options.conversations:
        settings += ["data.conversations=true", "data.packing=documents"]
    print(f"train on it: {command('launch.start', '--config', 'RECIPE.yaml', *settings)}")


def _key_in(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return str(found["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    main()
