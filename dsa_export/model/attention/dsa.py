"""DeepSeek Sparse Attention on grouped-query attention: lightning indexer, top-k selection, attention over it.

The indexer's input is detached: its loss never trains the base. Each index key is rotated once, at its own position,
before it is cached.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_export.config import DSAConfig
from dsa_export.model.attention.base import AttentionTrace, Call
from dsa_export.model.attention.dense import DenseAttention
from dsa_export.model.cache import CacheEntry
from dsa_export.model.standard_ops import dense_attention, rotary
from dsa_export.topk import topk_per_layer
from plugins.index_topk import index_topk
from plugins.sparse_attention import sparse_attention


class Indexer(nn.Module):
    """Lightning indexer: its own small queries (or the main ones), one key per token, one weight per head."""

    def __init__(self, config: DSAConfig):
        super().__init__()
        self.heads, self.dim = config.index_heads, config.index_dim
        self.own_queries = config.index_queries == "own"
        if self.own_queries:
            self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def forward(self, hidden: Tensor, q_BSE: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, S, E] → index_q [B, S, Hi, Di], index_weights [B, S, Hi], index_k [B, S, Di] of this call."""
        hidden = hidden.detach()
        if self.own_queries:
            index_q = rotary(self.q_proj(hidden), *call.index_rope, heads=self.heads)
        else:
            index_q = q_BSE.detach()
        index_k = rotary(self.k_norm(self.k_proj(hidden)), *call.index_rope, heads=1)
        index_weights = self.weights_proj(hidden) * (self.heads**-0.5 * self.dim**-0.5)
        return index_q.unflatten(-1, (self.heads, self.dim)), index_weights, index_k


class SparseAttention(DenseAttention):
    """`sparse` = False lets the core see everything (warm-up: the dense teacher); the indexer is still observed."""

    ADDED: ClassVar[tuple[str, ...]] = (".indexer.",)

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        super().check(config)
        if config.index_queries not in ("own", "shared"):
            raise ValueError(f"index_queries must be 'own' or 'shared', got {config.index_queries!r}")
        for name in ("index_heads", "index_dim"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        topk_per_layer(config.index_topk, config.num_hidden_layers)
        if config.index_dim % 2:
            raise ValueError(f"index_dim must be even (half-split RoPE), got {config.index_dim}")
        shared = (config.num_attention_heads, config.head_size)
        if config.index_queries == "shared" and (config.index_heads, config.index_dim) != shared:
            raise ValueError(f"index_queries='shared' needs (index_heads, index_dim) = {shared}")

    def __init__(self, config: DSAConfig, layer: int):
        super().__init__(config, layer)
        self.indexer = Indexer(config)
        self.topk = config.topk_per_layer[layer]
        self.sparse = True

    @classmethod
    def cache_layout(cls, config: DSAConfig) -> list[CacheEntry]:
        return [*super().cache_layout(config), CacheEntry("index", 1, config.index_dim)]

    def attend(
        self, hidden: Tensor, q_BSE: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        index_q, index_weights, index_k = self.indexer(hidden, q_BSE, call)
        all_index_k = self.store("index", index_k.unsqueeze(1), call).squeeze(1)
        if call.caches is not None and (call.observer or call.selector):
            raise ValueError("an observer or a selector needs a call without cache")
        trace = AttentionTrace(
            self.layer, q, k, index_q, index_weights, index_k, None, call.lengths, self.scale
        )  # fmt: skip
        if self.sparse:
            with torch.no_grad():
                if call.selector is None:
                    indices = index_topk(index_q, index_weights, all_index_k, call.kv_lengths, self.topk)
                else:
                    indices = call.selector(trace)
            trace = replace(trace, indices=indices)
            core = masked_attention if self.training else sparse_attention
            output = core(q, k, v, indices, self.scale)
        else:
            output = dense_attention(q, k, v, call.kv_lengths, self.scale)
        return output, call.observer(trace) if call.observer else {}


def masked_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> Tensor:
    """sparse_attention() as a mask over dense scores: the same function of its inputs, faster to train at short S."""
    C = k.shape[2]
    mask = torch.zeros(*indices.shape[:2], C + 1, dtype=torch.bool, device=q.device)
    mask.scatter_(-1, torch.where(indices < 0, C, indices).long(), True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :, :C], scale=scale, enable_gqa=True)
