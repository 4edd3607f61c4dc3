"""Does drafting with early layers make greedy decoding faster, with the same text?

Trains a small byte-level decoder on the default data, then an adapter behind each exit layer, and
decodes held-out prompts plainly and self-speculatively, in interleaved rounds. Reported for each
exit layer and confidence threshold: whether every text is the same, the share of accepted drafts,
tokens for each pass through the late layers (the prompt's is one), and plain time over speculative
time. With `--checkpoint`, the model of a run instead. About three minutes on one core.

    python benchmarks/self_speculative.py [--checkpoint RUN] [--quick]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleave, median_ratio, medians, save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.speculation.controllers import Confidence
from adaptive.models.decoder.speculation.drafts import ExitDraft
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter, distil_adapter
from adaptive.models.decoder.speculative import Speculation, speculate
from launch.checkpoint.files import load_model
from launch.data.text import Corpus, TextConfig

PROMPT, NEW = 48, 96


def rows(corpus: Corpus, steps: int, batch: int) -> Iterator[Tensor]:
    for step in range(steps):
        picked = [corpus.train_row(0, step * batch + row) for row in range(batch)]
        yield torch.from_numpy(np.stack(picked))


def trained(corpus: Corpus, steps: int, config: DecoderConfig) -> tuple[Decoder, float]:
    """A dense decoder after some steps, and its last loss."""
    torch.manual_seed(0)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    loss = torch.zeros(())
    for step, ids in enumerate(rows(corpus, steps, 8)):
        rate = min((step + 1) / 20, 1.0) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        loss = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), loss.item()


def plain(model: Decoder, prompts: list[list[int]], out: list[list[int]]) -> Callable[[], None]:
    def run() -> None:
        out.clear()
        for prompt in prompts:
            *_, made = generate(
                model, [prompt], max_new_tokens=NEW, sampling=Sampling(temperature=0)
            )
            out.append(made.tokens[0])

    return run


def speculative(
    model: Decoder,
    adapter: ExitAdapter,
    threshold: float,
    prompts: list[list[int]],
    out: list[Speculation],
) -> Callable[[], None]:
    def run() -> None:
        out.clear()
        for prompt in prompts:
            *_, made = speculate(
                model,
                [prompt],
                ExitDraft(adapter),
                max_new_tokens=NEW,
                controller=Confidence(threshold, 5),
                sampling=Sampling(temperature=0),
            )
            out.append(made)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="a run's folder, in place of a model trained here")
    parser.add_argument("--steps", type=int, default=200, help="of training the model")
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    seq_len = 160
    begun = time.perf_counter()
    if arguments.checkpoint:
        found, config = load_model(arguments.checkpoint)
        assert isinstance(found, Decoder)
        model, loss, corpus = found, None, Corpus(config.data)
    else:
        corpus = Corpus(TextConfig(seq_len=seq_len, validation_rows=16))
        dim, layers, steps = (32, 4, 5) if quick else (128, 8, arguments.steps)
        sizes = DecoderConfig(dim=dim, num_layers=layers, num_heads=4, max_seq_len=seq_len)
        model, loss = trained(corpus, steps, sizes)
    count = 2 if quick else 6
    prompts = [corpus.validation_row(row)[:PROMPT].tolist() for row in range(count)]
    depth = len(model.layers)
    exits = [depth // 4, depth // 2] if not quick else [1]
    texts: list[list[int]] = []
    cases: dict[str, Callable[[], Any]] = {"plain": plain(model, prompts, texts)}
    made: dict[str, list[Speculation]] = {}
    agreement = {}
    for exit_layer in exits:
        torch.manual_seed(0)
        adapter = ExitAdapter.of(model, exit_layer)
        batches = (ids[:, :-1] for ids in rows(corpus, 5 if quick else 80, 8))
        *_, (_, same) = distil_adapter(model, adapter, batches, learning_rate=2e-3)
        agreement[exit_layer] = round(same, 3)
        for threshold in (0.0, 0.6):
            name = f"exit {exit_layer}, threshold {threshold}"
            made[name] = []
            cases[name] = speculative(model, adapter, threshold, prompts, made[name])
    seconds = interleave(cases, rounds=2 if quick else 5, warmup=1)
    middle = medians(seconds)
    results: dict[str, Any] = {"plain": {"seconds": round(middle["plain"], 4)}}
    for name, drafts in made.items():
        drafted, accepted = sum(d.drafted for d in drafts), sum(d.accepted for d in drafts)
        results[name] = {
            "seconds": round(middle[name], 4),
            "speed_up": round(median_ratio(seconds, "plain", name), 3),
            "same_text": [d.tokens[0] for d in drafts] == texts,
            "acceptance": round(accepted / max(drafted, 1), 3),
            "tokens_per_round": round(
                sum(len(d.tokens[0]) for d in drafts) / max(sum(d.rounds for d in drafts), 1), 2
            ),
        }
        print(f"{name:28s} {results[name]}")
    if not quick:
        about = {
            "model": {"dim": model.config.dim, "layers": depth, "training_loss": loss},
            "prompts": count,
            "new_tokens": NEW,
            "same_token_in_training": agreement,
            "seconds_in_all": round(time.perf_counter() - begun),
            "claim": "same_text everywhere",
        }
        save("self_speculative", {**about, "results": results})


if __name__ == "__main__":
    main()
