"""Families of transformers that a Decoder can be: their settings and their tensors' names.

One table serves both directions. What a family writes into config.json, it reads back as the same
decoder; that is how `family_of` finds the family of a decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models.decoder.model import DecoderConfig
from adaptive.models.decoder.rope_scaling import RopeScaling


@dataclass(frozen=True)
class ExpertNames:
    """How a family calls its experts.

    Attributes:
        router: the router's weight, in a layer.
        expert: one expert's weights, by its number and the part.
        gate, up, down: the parts.
        count, width, renormalize: settings: how many, how wide, whether the chosen weights sum to
            1 (None: they do).
        shared: the setting of the shared expert's width; None: there is none.
        sparse: has the settings decoder_sparse_step and mlp_only_layers.
        jitter: has router_jitter_noise.
        balance: the default of router_aux_loss_coef.
    """

    router: str = "mlp.gate.weight"
    expert: str = "mlp.experts.{}.{}.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    renormalize: str | None = "norm_topk_prob"
    shared: str | None = None
    sparse: bool = True
    jitter: bool = False
    balance: float = 0.001


@dataclass(frozen=True)
class Family:
    """Models that transformers has one class for.

    Attributes:
        name: `model_type`.
        architecture: the class.
        bias: of queries, keys and values alone: always, never, or by a setting whose default is
            True.
        qk_norm: as of DecoderConfig.
        any_head_dim: a head may have another width than D / heads.
        experts: their names; None: all feed-forwards are dense.
        windows: sliding windows in all layers, or in those that the setting layer_types names.
        fused: queries, keys and values are one tensor, and so are gate and up.
        defaults: of settings that a config.json may leave out, where they are not `_DEFAULTS`.
    """

    name: str
    architecture: str
    bias: bool | str = False
    qk_norm: bool | Literal["projection"] = False
    any_head_dim: bool = True
    experts: ExpertNames | None = None
    windows: Literal["all", "listed"] | None = None
    fused: bool = False
    defaults: Mapping[str, Any] | None = None


_MIXTRAL = ExpertNames(
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{}.{}.weight",
    "w1",
    "w3",
    "w2",
    count="num_local_experts",
    width="intermediate_size",
    renormalize=None,
    sparse=False,
    jitter=True,
)
FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM"),
    Family(
        "mistral",
        "MistralForCausalLM",
        windows="all",
        defaults={"max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        bias=True,
        windows="listed",
        defaults={"max_position_embeddings": 32768},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qk_norm=True,
        windows="listed",
        defaults={"max_position_embeddings": 32768},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        any_head_dim=False,
        windows="all",
        fused=True,
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        experts=_MIXTRAL,
        windows="all",
        defaults={
            "max_position_embeddings": 4096 * 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        bias="qkv_bias",
        experts=ExpertNames(shared="shared_expert_intermediate_size"),
        defaults={"max_position_embeddings": 32768},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=ExpertNames(),
        defaults={"max_position_embeddings": 32768},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        qk_norm="projection",
        any_head_dim=False,
        experts=ExpertNames(width="intermediate_size", sparse=False, balance=0.01),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
)

_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "sliding_window": None,
}
_PLAIN = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "quantization_config": (None,),
}


def family_named(name: Any) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: none of ours.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"model_type={name!r}: must be one of {known}")


def read_settings(settings: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        ValueError: names the setting that is missing or that a Decoder cannot express.
    """
    family = family_named(settings.get("model_type"))
    given = _DEFAULTS | dict(family.defaults or {}) | _present(settings)
    width = "intermediate_size"
    for name in (*_SETTINGS, width):
        if name not in given:
            raise ValueError(f"{name}: missing from the settings")
    plain_here = _PLAIN if family.bias else _PLAIN | {"attention_bias": (False,)}
    for name, plain in plain_here.items():
        if given.get(name, plain[0]) not in plain:
            raise ValueError(f"{name}={given[name]!r}: must be {plain[0]!r}")
    counts = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", width)
    for name in (*counts, "max_position_embeddings"):
        _check_count(given, name)
    for name in ("num_key_value_heads", "head_dim", "decoder_sparse_step"):
        if name in given:
            _check_count(given, name)
    base, scaling = _rotary(given)
    window, layers = _window(family, given, settings)
    length = given["max_position_embeddings"]
    heads, dim = given["num_attention_heads"], given["hidden_size"]
    head_dim = given.get("head_dim")
    bias = given.get(family.bias, True) if isinstance(family.bias, str) else family.bias
    config = DecoderConfig(
        **{ours: given[theirs] for theirs, ours in _SETTINGS.items()}
        # Before a scaling by length begins, nothing differs.
        | {"max_seq_len": length},
        sliding_window=window,
        window_layers=layers,
        num_kv_heads=given.get("num_key_value_heads") or heads,
        head_dim=None if head_dim in (None, dim // heads) else head_dim,
        ffn_dim=given[width],
        rope_base=base,
        rope_scaling=scaling,
        attention_bias=bias,
        qk_norm=family.qk_norm,
    )
    experts = None if family.experts is None else _read_experts(family.experts, given)
    return config if experts is None else config.with_method(experts)


def family_of(config: DecoderConfig) -> Family:
    """The family that computes what a decoder computes.

    Args:
        config: with no method but experts.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        try:
            again = read_settings(write_settings(family, config))
        except ValueError:
            continue
        if _function(again) == _function(config):
            return family
    raise ValueError(
        "no model of transformers that is known here computes what this decoder does: dense ones "
        "are Llama, Mistral (sliding_window in every layer), Qwen 2 (biases) and Qwen 3 (qk_norm), "
        "both with window_layers too, all with rms norms; those with experts "
        "have a linear router, softmax and SwiGLU, and are Mixtral (experts in every layer, "
        "renormalised), Qwen3-MoE (qk_norm), OLMoE (qk_norm=projection) or Qwen2-MoE (a shared "
        "expert with its gate)"
    )


def write_settings(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder as one of a family: all that the family can say of it."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        known = ("rope_type", "factor", *_OF_SCALING[scaling.rope_type])
        rope = _present({name: getattr(scaling, name) for name in known})
    settings: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for theirs, ours in _SETTINGS.items()},
        "intermediate_size": config.ffn_width,
        "num_key_value_heads": config.kv_heads,
        "rope_theta": config.rope_base,
        "rope_parameters": {**rope, "rope_theta": config.rope_base},
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
    if scaling is not None:
        settings["rope_scaling"] = rope  # transformers 4 reads this
    if family.any_head_dim:
        settings["head_dim"] = config.head_dim or config.dim // config.num_heads
    if config.sliding_window is not None and family.windows is not None:
        settings["sliding_window"] = config.sliding_window
        if family.windows == "listed":
            slides = [config.window(n) is not None for n in range(config.num_layers)]
            kinds = [f"{'sliding' if one else 'full'}_attention" for one in slides]
            settings |= {"use_sliding_window": True, "layer_types": kinds}
    if isinstance(family.bias, str):
        settings[family.bias] = config.attention_bias
    experts: MixtureOfExpertsConfig | None = config.mixture_of_experts
    if family.experts is None or experts is None:
        if family.experts is not None:
            raise ValueError(f"model_type={family.name}: needs experts")
        return settings
    names, width = family.experts, experts.ffn_dim or config.ffn_width
    settings |= {
        names.count: experts.num_experts,
        names.width: width,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": experts.balance_coefficient,
    }
    if names.renormalize is not None:
        settings[names.renormalize] = _renormalizes(experts)
    if names.shared is not None:
        settings[names.shared] = experts.shared_experts * width
    if names.jitter:
        settings["router_jitter_noise"] = experts.jitter
    if names.sparse:
        routed = experts.routed_layers(config.num_layers)
        settings["decoder_sparse_step"] = 1
        settings["mlp_only_layers"] = [n for n in range(config.num_layers) if n not in routed]
    return settings


# A stranger's settings must not make tables or tensors of sizes that nobody has.
_MOST, _MOST_EXPERTS = 2**31 - 1, 2**16
_LENGTH = "original_max_position_embeddings"
_OF_SCALING = {
    "linear": (),
    "llama3": (_LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": (_LENGTH, "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


def _present(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that are null, which stand for a default."""
    return {name: value for name, value in settings.items() if value is not None}


def _check_count(given: Mapping[str, Any], name: str) -> None:
    value, most = given.get(name), _MOST_EXPERTS if name.endswith("_experts") else _MOST
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name}={value!r}: must be a whole number between 1 and {most}")


def _rotary(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters={rope!r}: must be a dictionary")
    base = float(rope.get("rope_theta") or given["rope_theta"])
    partial = rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if partial != 1:
        raise ValueError(f"partial_rotary_factor={partial}: must be 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    # "dynamic" changes nothing within max_position_embeddings, the longest sequence here.
    if kind in ("default", "dynamic"):
        return base, None
    if kind not in _OF_SCALING:
        known = ", ".join(("default", "dynamic", *_OF_SCALING))
        raise ValueError(f"rope_type={kind!r}: must be one of {known}")
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name):
            raise ValueError(f"rope_scaling.{name}={rope[name]}: must be left out")
    length = given.get(_LENGTH, given["max_position_embeddings"])
    found = {_LENGTH: length} | _present(rope)
    options = {n: found[n] for n in ("factor", *_OF_SCALING[kind]) if n in found}
    for name in ("factor", *(n for n in _OF_SCALING[kind] if kind == "llama3")):
        if name not in options:
            raise ValueError(f"rope_scaling.{name}: missing from the settings")
    return base, RopeScaling(rope_type=kind, **options)


def _window(
    family: Family, given: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[int | None, list[int] | None]:
    """Positions that a token sees, and the layers of which that holds (None: all)."""
    window = settings["sliding_window"] if "sliding_window" in settings else given["sliding_window"]
    slides = given.get("use_sliding_window", family.windows == "all")
    kinds = given.get("layer_types")
    if window is None or not (slides or "sliding_attention" in (kinds or ())):
        return None, None
    _check_count({"sliding_window": window}, "sliding_window")
    if window >= given["max_position_embeddings"]:
        return None, None
    if family.windows is None:
        raise ValueError(f"sliding_window={window}: must be null for model_type={family.name}")
    count = given["num_hidden_layers"]
    if family.windows == "all":
        return window, None
    if kinds is None:
        layers = list(range(given.get("max_window_layers", 28), count))
    else:
        layers = [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not layers:
        return None, None
    return window, None if layers == list(range(count)) else layers


def _read_experts(names: ExpertNames, given: Mapping[str, Any]) -> MixtureOfExpertsConfig | None:
    needed = [names.count, names.width, "num_experts_per_tok"]
    # Some files call them as other families do.
    other = "num_experts" if names.count == "num_local_experts" else "num_local_experts"
    if names.count not in given and other in given:
        given = {**given, names.count: given[other]}
    for name in [*needed, *([] if names.shared is None else [names.shared])]:
        if name not in given:
            raise ValueError(f"{name}: missing from the settings")
        _check_count(given, name)
    layers = range(given["num_hidden_layers"])
    routed = list(layers)
    if names.sparse:
        step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
        routed = [n for n in layers if n not in dense and (n + 1) % step == 0]
    if not routed:
        return None
    top_k, width = given["num_experts_per_tok"], given[names.width]
    renormalize = names.renormalize is None or bool(given.get(names.renormalize, False))
    if renormalize and top_k < 2:
        # There it has weight 1, whatever its probability, and no router learns.
        raise ValueError(
            f"num_experts_per_tok={top_k}: must be 2 or more, "
            "one expert a token has another weight there"
        )
    shared = 0 if names.shared is None else given[names.shared]
    if shared % width:
        raise ValueError(f"{names.shared}={shared}: must be a multiple of {names.width}={width}")
    return MixtureOfExpertsConfig(
        num_experts=given[names.count],
        top_k=top_k,
        schedule="all" if routed == list(layers) else routed,
        ffn_dim=None if width == given["intermediate_size"] else width,
        renormalize=None if renormalize == (top_k > 1) else renormalize,
        balance_coefficient=given.get("router_aux_loss_coef", names.balance),
        jitter=given.get("router_jitter_noise", 0.0) if names.jitter else 0.0,
        shared_experts=shared // width,
        shared_gate=shared > 0,
    )


def _renormalizes(experts: MixtureOfExpertsConfig) -> bool:
    return experts.top_k > 1 if experts.renormalize is None else experts.renormalize


def _function(config: DecoderConfig) -> DecoderConfig:
    """The configuration of what a decoder computes in evaluation, written in one way."""
    config = replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        ffn_dim=config.ffn_width,
        window_layers=None
        if config.sliding_window is None
        else [n for n in range(config.num_layers) if config.window(n) is not None],
        recompute=False,
    )
    experts: MixtureOfExpertsConfig | None = config.mixture_of_experts
    if experts is None:
        return config
    usual = MixtureOfExpertsConfig()
    training = ("capacity_factor", "jitter", "balance_coefficient", "z_coefficient")
    frozen = ("freeze_router", "freeze_experts")
    changes: dict[str, Any] = {name: getattr(usual, name) for name in (*training, *frozen)}
    if experts.choice == "expert":  # whose capacity is not of training alone
        changes.pop("capacity_factor")
    return config.with_method(
        replace(
            experts,
            schedule=experts.routed_layers(config.num_layers),
            ffn_dim=experts.ffn_dim or config.ffn_width,
            renormalize=_renormalizes(experts),
            **changes,
        )
    )
