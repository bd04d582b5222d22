"""Configuration of a dense or sparse model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

KINDS: dict[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "str": str}
"""Annotations of DSAConfig's options whose values are checked against them: JSON may hold anything."""


@strict
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
        index_keys: "model" (index keys are cached in the model's type), "fp8" (e4m3, one scale per key; for torch) or
            "int8" (8 bits, one scale per key, queries of 7 bits; for torch and ONNX Runtime).
        nsa_block_size, nsa_stride: l and d of native sparse attention, tokens of a compressed block and from one to
            the next. d divides l and nsa_selection_size.
        nsa_selection_size, nsa_selected_blocks: l' and n, tokens of a selected block and blocks per query; the first
            and the two most recent blocks are always among them.
        nsa_window: w, tokens of its sliding window.
        num_experts: N, experts of feed_forward="moe" (GLM4-MoE's block), all in every layer.
        num_experts_per_tok: K of them that a token passes through.
        moe_intermediate_size: I, the size of an expert.
        n_shared_experts: experts beside them that every token passes through; 0: none.
        routed_scaling_factor: what the weights of a token's experts add up to.
        router_aux_loss_coef: factor of the loss "balance" that training adds, so that all experts are used; 0: none.

    Raises ValueError for values that exclude each other, naming the option.
    """

    model_type = "dsa_qwen2"

    family: str = "qwen2"
    qkv_bias: bool = True
    qk_norm: bool = False
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = False
    attention: str = "dsa"
    feed_forward: str = "gated"
    index_heads: int = 8
    index_dim: int = 64
    index_topk: int | list[int] = 512
    index_queries: str = "own"
    index_sinks: int = 0
    index_window: int = 0
    index_pool: int = 1
    index_share: int = 1
    index_keys: str = "model"
    nsa_block_size: int = 32
    nsa_stride: int = 16
    nsa_selection_size: int = 64
    nsa_selected_blocks: int = 16
    nsa_window: int = 512
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    n_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    router_aux_loss_coef: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    @property
    def topk_per_layer(self) -> tuple[int, ...]:
        """Tokens that a query attends to at most by selection, in every layer."""
        from dsa_export.model import attention

        return attention.VARIANTS[self.attention].topk_per_layer(self)

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

    def check(self) -> None:
        """Raises ValueError, naming the option, for what no model can be made of."""
        # The slots know what they can take; they are imported here because they import this module.
        from dsa_export.model import attention, families, feed_forward

        for option, kind in DSAConfig.__annotations__.items():
            value = getattr(self, option, None)
            if kind in KINDS and (not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "bool")):
                raise ValueError(f"{option} must be of type {kind}, got {value!r}")
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
        for option in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        families.check_shared(self)
        attention.VARIANTS[self.attention].check(self)
        feed_forward.VARIANTS[self.feed_forward].check(self)
