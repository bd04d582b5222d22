"""Configuration of a dense or sparse Qwen2.5 model."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from dsa_export.topk import topk_per_layer


class DSAConfig(Qwen2Config):
    """Qwen2's configuration plus the attention variant and the lightning indexer.

    Args:
        attention: "dense" or "dsa" (a name in dsa_export.model.attention.VARIANTS).
        index_heads: Hi, query heads of the indexer.
        index_dim: Di, their size (even).
        index_topk: k, keys selected per query token: one number, or a list of one number per layer.
        index_queries: "own" (a projection of the indexer's) or "shared" (the main attention's rotated queries, as in
            the original reproduction; needs index_heads = num_attention_heads and index_dim = head size).

    Raises ValueError for values that exclude each other, naming the option.
    """

    model_type = "dsa_qwen2"

    def __init__(
        self,
        attention: str = "dsa",
        index_heads: int = 8,
        index_dim: int = 64,
        index_topk: int | list[int] = 512,
        index_queries: str = "own",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.attention = attention
        self.index_heads = index_heads
        self.index_dim = index_dim
        self.index_topk = index_topk
        self.index_queries = index_queries
        self._check()

    @property
    def topk_per_layer(self) -> tuple[int, ...]:
        return topk_per_layer(self.index_topk, self.num_hidden_layers)

    @property
    def head_size(self) -> int:
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    def _check(self) -> None:
        if self.attention not in ("dense", "dsa"):
            raise ValueError(f"attention must be 'dense' or 'dsa', got {self.attention!r}")
        if self.index_queries not in ("own", "shared"):
            raise ValueError(f"index_queries must be 'own' or 'shared', got {self.index_queries!r}")
        for name in ("index_heads", "index_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        topk_per_layer(self.index_topk, self.num_hidden_layers)
        if self.index_dim % 2:
            raise ValueError(f"index_dim must be even (half-split RoPE), got {self.index_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        shared = (self.num_attention_heads, self.head_size)
        if self.index_queries == "shared" and (self.index_heads, self.index_dim) != shared:
            raise ValueError(f"index_queries='shared' needs (index_heads, index_dim) = {shared}")
        if "sliding_attention" in (self.layer_types or []):
            raise ValueError("sliding-window layers (use_sliding_window) are not supported")
