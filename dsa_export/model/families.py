"""The model families of transformers that can be converted, and how their configurations and DSAConfig translate.

All of them are one decoder (`decoder.py`) with options, under transformers' own parameter names. What the decoder lacks
is refused here, naming the option. To support one more family is an entry in FAMILIES.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.activations import ACT2FN

from dsa_export.config import DSAConfig
from dsa_export.model.attention import VARIANTS
from dsa_export.model.rope import check_rope

COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Fields of the same name and meaning everywhere; what a configuration lacks, or holds as None, is left out."""

LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
"""The same of latent attention."""


@dataclass(frozen=True)
class Family:
    """title: for people. stock: transformers' configuration class, which AutoModelForCausalLM knows the model of."""

    title: str
    stock: type[PreTrainedConfig]
    fixed: Mapping[str, Any]
    """DSAConfig's fields that are the same for every checkpoint of the family."""
    demanded: Mapping[str, Any] = field(default_factory=dict)
    """Options of the stock configuration, and the one value that the decoder can take."""
    restored: Callable[[DSAConfig], Mapping[str, Any]] = lambda config: {}
    """Fields of the stock configuration that DSAConfig does not keep, from the ones that it does."""
    fields: tuple[str, ...] = COMMON
    """Those that pass unchanged."""
    dense: str = "dense"
    """The attention variant that the stock model has."""
    sparse: str = "dsa"
    """The variant that it is converted to unless told otherwise."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2 and Qwen2.5", Qwen2Config, {"qkv_bias": True}),
    "qwen3": Family("Qwen3", Qwen3Config, {"qkv_bias": False, "qk_norm": True}, {"attention_bias": False}),
    "llama": Family("Llama", LlamaConfig, {"qkv_bias": False}, {"attention_bias": False, "mlp_bias": False}),
    "deepseek_v3": Family(
        "DeepSeek-V3 without experts",
        DeepseekV3Config,
        {"qkv_bias": False, "num_key_value_heads": 1, "head_dim": None},
        {"attention_bias": False},
        lambda c: {
            "num_key_value_heads": c.num_attention_heads,
            "first_k_dense_replace": c.num_hidden_layers,
            "q_lora_rank": c.q_lora_rank or None,
        },
        fields=COMMON + LATENT,
        dense="mla",
        sparse="mla-dsa",
    ),
}
"""By transformers' model_type."""


def check(config: PreTrainedConfig) -> None:
    """Raises ValueError, in one line, for a stock configuration that cannot be converted; it names the option."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        supported = ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
        raise ValueError(f"{config.model_type!r} models are not supported; these are: {supported}")
    for option, only in family.demanded.items():
        value = getattr(config, option, only)
        if value != only:
            raise ValueError(f"{option}={value!r} is not supported in {family.title}, only {only!r}")
    layers = config.num_hidden_layers
    if getattr(config, "first_k_dense_replace", layers) < layers:
        raise ValueError(
            f"first_k_dense_replace={config.first_k_dense_replace} makes mixture-of-experts layers, which are not "
            f"supported: only {layers}, the number of layers"
        )
    check_shared(config)


def check_shared(config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the option, for what neither a stock configuration nor one of ours may have."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError("sliding-window layers (use_sliding_window) are not supported")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not known")
    pad = config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:  # -1 is the last, as torch has it
        raise ValueError(f"pad_token_id={pad} is no token: vocab_size is {config.vocab_size}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantised checkpoints (quantization_config) are not supported: convert the original weights")
    check_rope(config.rope_parameters)


def dsa_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """DSAConfig's fields for the stock model, dense attention included. Raises ValueError as check() does."""
    check(config)
    family = FAMILIES[config.model_type]
    return {**_given(config, family), **family.fixed, "family": config.model_type, "attention": family.dense}


def dense_config(config: PreTrainedConfig) -> DSAConfig:
    """The dense model's configuration, of a stock model or of one of ours. Raises ValueError as check() does."""
    if isinstance(config, DSAConfig):
        return DSAConfig(**{**config.to_dict(), "attention": VARIANTS[config.attention].DENSE})
    return DSAConfig(**dsa_fields(config))


def stock_config(config: DSAConfig) -> PreTrainedConfig:
    """The stock configuration of the model that a checkpoint of ours was converted from."""
    family = FAMILIES[config.family]
    return family.stock(**{**_given(config, family), **family.demanded, **family.restored(config)})


def _given(config: PreTrainedConfig, family: Family) -> dict[str, Any]:
    values = {name: getattr(config, name, None) for name in family.fields}
    return copy.deepcopy({name: value for name, value in values.items() if value is not None})
