"""Configuration of a dense or sparse model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config

from dsa_export.topk import topk_per_layer


class DSAConfig(Qwen2Config):
    """Qwen2's configuration plus the family's options, the attention variant and the lightning indexer.

    Args:
        family: transformers' model_type of the stock model (a name in dsa_export.model.families.FAMILIES).
        qkv_bias: whether the projections of queries, keys and values have a bias.
        qk_norm: whether every head of queries and keys is RMS-normalised before its rotation.
        kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, rope_interleave: DeepSeek-V3's, for
            attention on latent rows ("mla", "mla-dsa"); 0 where there are none, q_lora_rank also where queries have
            no low-rank projection.
        attention: "dense", "dsa" … (a name in dsa_export.model.attention.VARIANTS).
        feed_forward: "gated" … (a name in dsa_export.model.feed_forward.VARIANTS).
        index_heads: Hi, query heads of the indexer.
        index_dim: Di, their size (even).
        index_topk: k, keys selected per query token: one number, or a list of one number per layer.
        index_queries: "own" (a projection of the indexer's) or "shared" (the main attention's rotated queries, as in
            the original reproduction; needs index_heads = num_attention_heads and index_dim = head size).
        index_sinks, index_window: the first and the last tokens that are always selected, counted in k.
        index_pool: m, tokens per selected group. Groups are scored by the mean of their index keys; the incomplete
            last one is always selected. Needs a k that m divides.
        index_share: n, layers that follow one selection: of n layers in a row the first has the indexer.
        index_keys: "model" (index keys are cached in the model's type) or "fp8" (e4m3 with one scale per key).

    Raises ValueError for values that exclude each other, naming the option.
    """

    model_type = "dsa_qwen2"

    def __init__(
        self,
        family: str = "qwen2",
        qkv_bias: bool = True,
        qk_norm: bool = False,
        kv_lora_rank: int = 0,
        q_lora_rank: int = 0,
        qk_nope_head_dim: int = 0,
        qk_rope_head_dim: int = 0,
        v_head_dim: int = 0,
        rope_interleave: bool = False,
        attention: str = "dsa",
        feed_forward: str = "gated",
        index_heads: int = 8,
        index_dim: int = 64,
        index_topk: int | list[int] = 512,
        index_queries: str = "own",
        index_sinks: int = 0,
        index_window: int = 0,
        index_pool: int = 1,
        index_share: int = 1,
        index_keys: str = "model",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.family = family
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.kv_lora_rank = kv_lora_rank
        self.q_lora_rank = q_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rope_interleave = rope_interleave
        self.attention = attention
        self.feed_forward = feed_forward
        self.index_heads = index_heads
        self.index_dim = index_dim
        self.index_topk = index_topk
        self.index_queries = index_queries
        self.index_sinks = index_sinks
        self.index_window = index_window
        self.index_pool = index_pool
        self.index_share = index_share
        self.index_keys = index_keys
        self._check()

    @property
    def topk_per_layer(self) -> tuple[int, ...]:
        return topk_per_layer(self.index_topk, self.num_hidden_layers)

    @property
    def head_size(self) -> int:
        """D, the width of the rows that the attention core multiplies: of one head, or of a latent row."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def rope_size(self) -> int:
        """How much of a row is rotated."""
        return self.qk_rope_head_dim or self.head_size

    def _check(self) -> None:
        # The slots know what they can take; they are imported here because they import this module.
        from dsa_export.model import attention, families, feed_forward

        known: dict[str, Mapping[str, Any]] = {
            "family": families.FAMILIES,
            "attention": attention.VARIANTS,
            "feed_forward": feed_forward.VARIANTS,
        }
        for option, values in known.items():
            value = getattr(self, option)
            if value not in values:
                names = ", ".join(map(repr, values))
                raise ValueError(f"{option} must be one of {names}, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if "sliding_attention" in (self.layer_types or []):
            raise ValueError("sliding-window layers (use_sliding_window) are not supported")
        attention.VARIANTS[self.attention].check(self)
        feed_forward.VARIANTS[self.feed_forward].check(self)
