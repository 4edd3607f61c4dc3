"""A causal language model of transformers as a run's model: its configuration, what it builds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from adaptive.blocks.method import METHODS, Method
from adaptive.hub import adapt
from adaptive.hub.exits import EarlyExitConfig
from adaptive.hub.flops import count_rules
from launch.checkpoint.files import named_tensors
from launch.checkpoint.published import SETTINGS, read_settings
from launch.run.errors import BadInput
from launch.run.terminal import announced

transformers.utils.logging.disable_progress_bar()
_FORBID = {"extra": "forbid"}
ADAPTED = "adaptive"  # model_type of what was adapted already

# Where nothing is given: about as large as recipe mod_lm's decoder, on bytes.
_SMALL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class DistillConfig:
    """Learning from the model as it was before it was adapted, which is held on every rank.

    Attributes:
        weight: share of the loss that is its cross-entropy to the dense model's distribution of
            the next token (less that one's entropy), from 0 to 1; the rest is of the text.
        temperature: divides both models' logits; the term is multiplied by its square.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight={self.weight}: must be in (0, 1]")
        if not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(f"temperature={self.temperature}: must be from 0.001 to 1000")


@dataclass(frozen=True)
class HubModelConfig:
    """A causal language model of transformers, and the methods that are put into it.

    Attributes:
        pretrained: folder of `save_pretrained` whose weights a run begins with; null: weights are
            drawn. Only a new run and one that distils read it: checkpoints are whole.
        settings: keys of the model's config.json. Without model_type they are laid over those of
            `pretrained`, or of a small Llama on bytes; a run.yaml has all of them.
        adapt: {METHOD: {layers, options}}, as `adaptive.hub.adapt` takes them, in this order;
            METHOD: null takes one out.
        old_rate: share of train.learning_rate at which weights learn that the model had before it
            was adapted, from 0 to 1; 0: they stay as they are, and have no gradients.
        distill: weight and temperature of learning from the model as it was; null: none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _FORBID

    pretrained: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    adapt: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    old_rate: float = 1.0
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.old_rate <= 1:
            raise ValueError(f"old_rate={self.old_rate}: must be from 0 to 1")
        # All that rebuilds the model is written down with it: a checkpoint needs no other folder.
        settings = {**self._own_settings(), **self.settings}
        object.__setattr__(self, "settings", settings)
        given = {name: options for name, options in self.adapt.items() if options is not None}
        object.__setattr__(self, "adapt", given)
        kind = settings.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"settings.model_type={kind!r}: must be one that transformers has")
        text = self.configuration().get_text_config()
        for name in ("vocab_size", "num_hidden_layers"):
            if not isinstance(getattr(text, name, None), int):
                raise ValueError(f"settings.model_type={kind!r}: must be of a language model")

    def _own_settings(self) -> dict[str, Any]:
        if "model_type" in self.settings:
            return {}
        if self.pretrained is None:
            return _SMALL
        folder = Path(self.pretrained).expanduser()
        if not (folder / SETTINGS).is_file():
            raise ValueError(
                f"pretrained={self.pretrained}: must be a folder with {SETTINGS}, as "
                "save_pretrained and launch.convert to_transformers write it"
            )
        return read_settings(folder)

    @property
    def vocab_size(self) -> int:
        return int(self.configuration().get_text_config().vocab_size)

    @property
    def max_seq_len(self) -> int:
        text = self.configuration().get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or 2**20)

    @property
    def methods(self) -> tuple[type[Method], ...]:
        """Those that are put into the model."""
        served = (*METHODS, EarlyExitConfig)
        return tuple(method for method in served if method.name in self.adapt)

    def configuration(self) -> PreTrainedConfig:
        """The settings as transformers has them.

        Raises:
            ValueError: it cannot read them.
        """
        kind = self.settings["model_type"]
        try:
            found: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(dict(self.settings))
        except Exception as error:  # its validators raise anything
            raise ValueError(f"settings: {' '.join(str(error).split())}") from None
        return found

    def dense(self) -> PreTrainedModel:
        """The model before it is adapted, float32, drawn from torch's default generator."""
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.configuration(), dtype=torch.float32
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"model.settings: {' '.join(str(error).split())}") from None
        return model

    def dense_pretrained(self) -> PreTrainedModel:
        """The model before it is adapted, with the weights of `pretrained`, float32.

        Raises:
            BadInput: they cannot be read, or are of another model.
        """
        folder = Path(str(self.pretrained)).expanduser()
        try:
            with announced(f"reading {folder}"):
                read: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=self.configuration(),
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises anything
            said = " ".join(str(error).split())
            raise BadInput(f"model.pretrained={self.pretrained}: cannot be read: {said}") from None
        model: PreTrainedModel = read[0]
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if read[1].get(key):
                raise BadInput(
                    f"model.pretrained={self.pretrained}: is of another model than model.settings: "
                    f"{key.replace('_', ' ')}: {sorted(map(str, read[1][key]))[0]}"
                )
        return model

    def adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The dense model with the methods in it, its old weights marked by their rate.

        Raises:
            ValueError: a method cannot stand there.
        """
        old = {name for name, _ in model.named_parameters()}
        for method, options in self.adapt.items():
            model = adapt(model, method, **(options or {}))
        count_rules(model)
        for name, parameter in model.named_parameters():
            if name in old:
                parameter.rate = self.old_rate  # type: ignore[attr-defined]
                parameter.requires_grad_(bool(self.old_rate))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise BadInput("model.old_rate=0: leaves nothing to train, model.adapt adds no weights")
        return model

    def first_weights(self, seed: int) -> dict[str, Tensor] | None:
        """What a run begins with: pretrained weights, and what the methods add to them.

        Args:
            seed: of what they draw.
        """
        if self.pretrained is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return named_tensors(self.adapted(self.dense_pretrained()))

    def teacher(self, seed: int) -> PreTrainedModel:
        """The dense model that a run began with, without gradients, in evaluation mode.

        Args:
            seed: of the run, whose weights were drawn where there are no pretrained ones.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.dense() if self.pretrained is None else self.dense_pretrained()
        return model.eval().requires_grad_(False)
