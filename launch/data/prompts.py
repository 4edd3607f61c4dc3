"""What a model goes on from, as training has shown it beginnings."""

from __future__ import annotations

import os

from launch.data.conversations import Conversations
from launch.data.text import TextConfig
from launch.data.tokenizer import Tokenizer


def first_tokens(
    data: TextConfig, tokenizer: Tokenizer, given: bytes, *, where: str = "prompt"
) -> list[int]:
    """Token ids of a prompt; of conversations, what an answer to it is behind.

    Args:
        data: that the model was trained on.
        tokenizer: of the data.
        given: the prompt, any bytes.
        where: the option it is from, for errors.
    """
    if data.conversations:
        chat = Conversations(data.chat_template, tokenizer)
        prompt = chat.ask(os.fsdecode(given), where=where)
        ids, _ = tokenizer.encode_learnt([(prompt, [])])[0]
        return [tokenizer.needed_end, *ids.tolist()]
    prompt_ids = tokenizer.encode_prompt(given)
    # Behind an end of text a text begins.
    if tokenizer.end is not None and (not prompt_ids or data.packing == "documents"):
        return [tokenizer.end, *prompt_ids]
    return prompt_ids
