"""Losses of every token of texts, by windows, with the operations that they took.

Shape legend: T packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.flops import records_by_module
from adaptive.models.decoder.generate import Sampling, generate, non_causal_layers
from adaptive.models.decoder.model import Decoder
from adaptive.models.weights.transformers import decoder_config, loaded
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.layout import TokenLayout
from adaptive.routing.tape import RoutingTape
from launch.checkpoint.models import SavedDecoder, choose_device, load_language_model
from launch.checkpoint.published import is_published, read_published, read_settings
from launch.data.tokenizer import Tokenizer
from launch.run.errors import BadInput

# Rows of logits in memory at once.
_ROWS = 2048


class Window(NamedTuple):
    """A text as the model sees it at once: it reads all ids but the last.

    Attributes:
        ids: what is read, and the last target.
        scored: how many targets, from the end, are this window's.
    """

    ids: list[int]
    scored: int


class Prediction(NamedTuple):
    """What a model says of a window's scored tokens.

    Attributes:
        losses: float32 [scored], nats.
        likeliest: bool [scored], whether the token is what the model would have drawn greedily.
    """

    losses: Tensor
    likeliest: Tensor


class Scorer(Protocol):
    """A language model that predicts.

    Attributes:
        tokenizer: its own.
        max_length: tokens that it reads at once.
        causal: whether what it says of a token depends on earlier ones alone.
        executed, nominal: operations so far, and those of a dense model; NaN: not counted.
    """

    tokenizer: Tokenizer
    max_length: int
    causal: bool
    executed: float
    nominal: float

    def predict(self, windows: Sequence[Window]) -> list[Prediction]: ...

    def continued(self, prompt: Sequence[int], count: int) -> Iterator[list[int]]:
        """The likeliest continuation, at most `count` tokens, as it grows; without an end."""
        ...


def windows_of(
    ids: Sequence[int], before: int | None, *, context: int, stride: int
) -> Iterator[Window]:
    """Windows in which every token is a target once; the first, where nothing is before it, never.

    The first window scores `context` tokens, each later one the next `stride`, behind as many
    others as fit.

    Args:
        ids: the text.
        before: the token that stands before a text; None: there is none.
        context: tokens that are read at once.
        stride: from 1 to `context`.
    """
    text = list(ids) if before is None else [before, *ids]
    start, end = 0, min(context, len(text) - 1)
    while start < end:
        yield Window(text[max(0, end - context) : end + 1], end - start)
        start, end = end, min(end + stride, len(text) - 1)


def before_text(ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """What stands before a text: the end of another, unless the tokenizer begins it itself."""
    begins = tokenizer.encode_prompt(b"")[:1]
    return None if begins and list(ids[:1]) == begins else tokenizer.end


def open_scorer(path: str, *, device: str | None = None) -> Scorer:
    """The model of a run, a checkpoint or a folder of transformers.

    Raises:
        BadInput: there is none, it is no language model, or it has no tokenizer.json.
    """
    folder = Path(path).expanduser()
    if not is_published(folder):
        saved = load_language_model(path, device=device)
        data = saved.config.data
        own = Tokenizer(data.tokenizer, data.end_of_text)
        if isinstance(saved, SavedDecoder):
            return DecoderScorer(saved.model, own)
        return HubScorer(saved.model, own)
    if folder.suffix == ".gguf":
        raise BadInput(f"{path}: make a run of it first: launch.convert transformers {path}")
    where = choose_device(device)
    tokenizer = Tokenizer(str(folder))
    try:
        decoder_config(read_settings(folder))
    except ValueError:
        return HubScorer(_read_hub(folder).to(where), tokenizer)
    weights, config = read_published(folder)
    return DecoderScorer(loaded(weights, config).to(where), tokenizer)


@dataclass
class DecoderScorer:
    """A decoder of ours; windows of a batch are packed, none is padded."""

    model: Decoder
    tokenizer: Tokenizer
    executed: float = 0.0
    nominal: float = 0.0

    def __post_init__(self) -> None:
        self.max_length = self.model.config.max_seq_len
        self.causal = not non_causal_layers(self.model)

    @torch.no_grad()
    def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        device = self.model.embedding.weight.device
        lengths = [len(window.ids) - 1 for window in windows]
        layout = TokenLayout.from_lengths(lengths, device=device)
        ids_T = torch.tensor([i for w in windows for i in w.ids[:-1]], device=device)
        with RoutingTape(self.model) as tape:
            hidden_TD, _ = self.model.hidden_states(ids_T[None], layout=layout)
        rows = [
            hidden[-w.scored :] for hidden, w in zip(hidden_TD.split(lengths), windows, strict=True)
        ]
        out = [_judged(self.model.output, part, w) for part, w in zip(rows, windows, strict=True)]
        records = records_by_module(self.model, tape.records)
        self.executed += self._operations(FlopCounter(records), layout, windows)
        self.nominal += self._operations(FlopCounter(nominal=True), layout, windows)
        return out

    def continued(self, prompt: Sequence[int], count: int) -> Iterator[list[int]]:
        end, made = self.tokenizer.end, None
        try:
            for made in generate(
                self.model,
                [prompt],
                max_new_tokens=count,
                sampling=Sampling(temperature=0),
                vocab_size=self.tokenizer.vocab_size,
                cached=self.causal,
                end=end,
            ):
                yield _without_end(made.tokens[0], end)
        finally:
            if made is not None:
                self.executed += made.executed_flops(self.model)
                self.nominal += made.nominal_flops(self.model)

    def _operations(
        self, counter: FlopCounter, layout: TokenLayout, windows: Sequence[Window]
    ) -> float:
        self.model.count_layers(counter, Work.of(layout))
        counter(self.model.output, Work.dense(1, sum(window.scored for window in windows)))
        return float(counter.total().forward)


class HubScorer:
    """A model of transformers, adapted or not; rows of a batch are padded on the right."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        import adaptive.hub.flops

        self.model = model.eval()
        self.tokenizer = tokenizer
        config = self.model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.causal = not non_causal_layers(self.model)
        self._count = adaptive.hub.flops.count_model
        known = adaptive.hub.flops.unknown_operations(self.model) is None
        self.executed = self.nominal = 0.0 if known else float("nan")

    @torch.no_grad()
    def predict(self, windows: Sequence[Window]) -> list[Prediction]:
        longest = max(len(window.ids) for window in windows) - 1
        ids_BS = torch.zeros(len(windows), longest, dtype=torch.long)
        mask_BS = torch.zeros_like(ids_BS)
        for row, window in enumerate(windows):
            length = len(window.ids) - 1
            ids_BS[row, :length] = torch.tensor(window.ids[:-1])
            mask_BS[row, :length] = 1
        device = self.model.device
        with RoutingTape(self.model) as tape:
            logits_BSV = self.model(
                input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False
            ).logits
        self._add(tape, Work.of([len(window.ids) - 1 for window in windows]))
        ends = [len(window.ids) - 1 for window in windows]
        rows = [
            logits_SV[end - window.scored : end]
            for logits_SV, end, window in zip(logits_BSV, ends, windows, strict=True)
        ]
        return [_judged(None, part, w) for part, w in zip(rows, windows, strict=True)]

    def continued(self, prompt: Sequence[int], count: int) -> Iterator[list[int]]:
        ids_1S = torch.tensor([list(prompt)], device=self.model.device)
        end = self.tokenizer.end
        with RoutingTape(self.model) as tape:
            made = self.model.generate(
                ids_1S,
                attention_mask=torch.ones_like(ids_1S),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        text = made[0, len(prompt) :].tolist()
        # The last token is never read; a token's logits are asked for once a forward.
        tokens = [len(prompt), *[1] * (len(text) - 1)]
        keys = list(itertools.accumulate(tokens))
        self._add(tape, Work.of(tokens, keys=keys), logits=Work.dense(1, len(text)))
        yield _without_end(text, end)

    def _add(self, tape: RoutingTape, work: Work, *, logits: Work | None = None) -> None:
        """Add operations of forwards on `work`, to what was executed and to the dense model's."""
        if math.isnan(self.executed):
            return
        records = records_by_module(self.model, tape.records)
        executed, nominal = FlopCounter(records), FlopCounter(nominal=True)
        for counter in (executed, nominal):
            self._count(self.model, counter, work, logits=logits)
        self.executed += float(executed.total().forward)
        self.nominal += float(nominal.total().forward)


def _read_hub(folder: Path) -> Any:
    """The causal language model of a folder, on the CPU in float32."""
    try:
        import transformers

        import adaptive.hub  # noqa: F401  (registers adapted models)
    except ImportError as error:
        raise BadInput(
            f"{folder}: needs the package {error.name}: pip install 'adaptive-transformers[hub]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises anything
        said = " ".join(str(error).split())
        raise BadInput(f"{folder}: cannot be read: {said}") from None


def _without_end(ids: list[int], end: int | None) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else list(ids)


def _judged(output: Any, rows: Tensor, window: Window) -> Prediction:
    """Losses and greedy choices of the last targets, from hidden states or (None) logits."""
    targets = torch.tensor(window.ids[-window.scored :], device=rows.device)
    losses, likeliest = [], []
    for some, wanted in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        logits_TV = (some if output is None else output(some)).float()
        losses.append(F.cross_entropy(logits_TV, wanted, reduction="none"))
        likeliest.append(logits_TV.argmax(-1) == wanted)
    return Prediction(torch.cat(losses).cpu(), torch.cat(likeliest).cpu())
