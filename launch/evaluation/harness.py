"""lm-evaluation-harness over our models: registers the model `adaptive`.

    import launch.evaluation.harness
    lm_eval.simple_evaluate(model="adaptive", model_args="pretrained=runs/mod_lm", tasks=[…])

Scores are those of the class `hf` on the same weights: prompts, windows and stops are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

# Asked for by name, the harness's own are registered only as long as there are no others.
import lm_eval.models  # noqa: F401
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from launch.evaluation.scoring import Window, open_scorer, windows_of
from launch.run.errors import BadInput


@register_model("adaptive")
class AdaptiveModel(TemplateLM):
    """A run, a checkpoint, or a folder of transformers, adapted or not.

    Args:
        pretrained: where it lies, as `launch.evaluate` takes it.
        batch_size: texts of one forward.
        max_length: tokens read at once; None: the model's length.
        device: None: the best there is.

    Attributes:
        operations: of each task asked so far, (executed, of a dense model); NaN: not counted.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        device: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scorer = open_scorer(pretrained, device=device)
        self.tokens = self.scorer.tokenizer
        self.operations: dict[str, tuple[float, float]] = {}
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.max_length = self.scorer.max_length if max_length is None else int(max_length)
        if not 1 <= self.max_length <= self.scorer.max_length or self.batch_size < 1:
            raise BadInput(
                f"max_length={max_length}, batch_size={batch_size}: must be at least 1, and "
                f"max_length at most {self.scorer.max_length}"
            )

    @property
    def eot_token_id(self) -> int:
        return self.tokens.needed_end

    @property
    def prefix_token_id(self) -> int:
        """What a text is behind: what the tokenizer begins texts with, or the end of another."""
        return (self.tokens.encode_prompt(b"") or [self.eot_token_id])[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokens.name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        begins = self.tokens.encode_prompt(b"")
        ids = self.tokens.encode_prompt(string.encode())
        if begins and (add_special_tokens is False or ids[1:2] == begins):
            return ids[len(begins) :]  # not at all, or not twice
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _text, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise BadInput(
                    f"a continuation of {len(continuation)} tokens: must be at most "
                    f"max_length={self.max_length}"
                )
            ids = [*context, *continuation][-self.max_length - 1 :]
            windows.append(Window(ids, len(continuation)))
        out = [(-math.inf, False)] * len(windows)
        # The longest together, as they would otherwise be padded.
        order = sorted(range(len(windows)), key=lambda n: -len(windows[n].ids))
        for some in self._batches(order):
            for number, said in zip(
                some, self.scorer.predict([windows[n] for n in some]), strict=True
            ):
                out[number] = (-float(said.losses.double().sum()), bool(said.likeliest.all()))
                self.cache_hook.add_partial("loglikelihood", requests[number][0], out[number])
        return out

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        def ask(some: list[Any]) -> list[Any]:
            return super(AdaptiveModel, self).loglikelihood(some, disable_tqdm=disable_tqdm)

        return self._by_task(requests, ask)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return self._by_task(requests, self._rolling)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return self._by_task(requests, self._generated)

    def _rolling(self, requests: list[Any]) -> list[float]:
        out = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = list(
                windows_of(
                    ids, self.prefix_token_id, context=self.max_length, stride=self.max_length
                )
            )
            total = 0.0
            for some in self._batches(range(len(windows))):
                said = self.scorer.predict([windows[n] for n in some])
                total -= sum(float(one.losses.double().sum()) for one in said)
            out.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return out

    def _generated(self, requests: list[Any]) -> list[str]:
        out = []
        for request in requests:
            context, given = request.args
            if given.get("do_sample") or float(given.get("temperature") or 0) > 0:
                raise BadInput(
                    "generate_until: draws the likeliest token; leave do_sample and temperature out"
                )
            stops = given.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            count = int(given.get("max_gen_toks", given.get("max_new_tokens", 256)))
            room = self.max_length - count
            if room < 1:
                raise BadInput(f"max_gen_toks={count}: must be below max_length={self.max_length}")
            prompt = self.tok_encode(context)[-room:]
            text = ""
            for ids in self.scorer.continued(prompt, count):
                text = self.tokens.decode(ids)
                if any(stop and stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            out.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into `config`: each task's operations, and their share of dense."""
        counted = {
            task: {"executed": executed, "share_of_dense": executed / nominal}
            for task, (executed, nominal) in self.operations.items()
            if math.isfinite(executed) and nominal > 0
        }
        return {"operations": counted}

    def _by_task(self, requests: Any, ask: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers in the order of the requests, each task's operations apart."""
        tasks: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            tasks.setdefault(str(request.task_name), []).append(number)
        out: list[Any] = [None] * len(requests)
        for task, numbers in tasks.items():
            before = self.scorer.executed, self.scorer.nominal
            for number, answer in zip(numbers, ask([requests[n] for n in numbers]), strict=True):
                out[number] = answer
            executed, nominal = self.operations.get(task, (0.0, 0.0))
            self.operations[task] = (
                executed + self.scorer.executed - before[0],
                nominal + self.scorer.nominal - before[1],
            )
        return out

    def _batches(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        return [
            numbers[start : start + self.batch_size]
            for start in range(0, len(numbers), self.batch_size)
        ]
