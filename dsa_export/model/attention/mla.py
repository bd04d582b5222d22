"""Multi-head latent attention (DeepSeek-V3's), always in its multi-query form, and DeepSeek Sparse Attention on it.

One latent row per token stands for the keys and values of all heads; it is the cache. `kv_b_proj` would expand it to
k_h = [W_k,h c, r] and v_h = W_v,h c (c the latent [R], r the rotated part [P] that all heads share). Instead its key
part is absorbed into the queries and its value part is applied to what attention sums up:

    q_h · k_h = [W_k,hᵀ q_nope, q_rope] · [c, r]        Σ p v_h = W_v,h (Σ p c)

So attention is grouped-query attention with one KV head of size R + P: the same cores, operators and indexer as
elsewhere, and the same function with and without a cache. The row goes in as key and as value, and the P last outputs
are dropped: P / R more multiplications (1/8 in DeepSeek-V3), while a slice of the cache would copy all of it at
every step.

Shapes: B batch, S query tokens, C cache capacity, H heads, R = kv_lora_rank, P = qk_rope_head_dim,
N = qk_nope_head_dim, V = v_head_dim. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; parameter names as in
transformers' deepseek_v3.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from dsa_export.config import DSAConfig
from dsa_export.model.attention.base import Call
from dsa_export.model.attention.dense import DenseAttention
from dsa_export.model.attention.dsa import SparseAttention
from dsa_export.model.cache import CacheEntry
from dsa_export.model.norm import RMSNorm
from dsa_export.model.standard_ops import rotary, split_heads

NORM_EPS = 1e-6
"""Of the norms inside attention, whatever the model's rms_norm_eps."""


class LatentAttention(DenseAttention):
    """Sees the whole cache: the dense twin."""

    DENSE: ClassVar[str] = "mla"

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"attention={config.attention!r} needs {name}, at least 1, got {getattr(config, name)}"
                )
        if config.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {config.qk_rope_head_dim}")
        for name, only in (("qkv_bias", False), ("qk_norm", False), ("num_key_value_heads", 1)):
            if getattr(config, name) != only:
                raise ValueError(f"attention={config.attention!r} needs {name}={only}, got {getattr(config, name)}")
        if config.index_queries != "own":
            raise ValueError(f"index_queries={config.index_queries!r}: absorbed queries cannot be shared, only 'own'")

    def __init__(self, config: DSAConfig, layer: int):
        nn.Module.__init__(self)  # of DenseAttention only the methods
        self.layer = layer
        self.query_heads, self.kv_heads = config.num_attention_heads, 1
        self.latent_size, self.rope_size = config.kv_lora_rank, config.qk_rope_head_dim
        self.nope_size, self.value_size = config.qk_nope_head_dim, config.v_head_dim
        self.interleaved = config.rope_interleave
        self.scale = softmax_scale(config)
        query_size = self.query_heads * (self.nope_size + self.rope_size)
        self.low_rank_queries = config.q_lora_rank > 0
        if self.low_rank_queries:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.latent_size + self.rope_size, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent_size, NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent_size, self.query_heads * (self.nope_size + self.value_size), bias=False)
        self.o_proj = nn.Linear(self.query_heads * self.value_size, config.hidden_size, bias=False)

    @classmethod
    def cache_layout(cls, config: DSAConfig, layer: int) -> list[CacheEntry]:
        return [CacheEntry("latent", 1, config.head_size)]

    def forward(self, hidden: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [B, S, E] → (output [B, S, E], the observer's scalars)."""
        expand = self.kv_b_proj.weight.unflatten(0, (self.query_heads, -1))  # [H, N + V, R]; runtimes fold its parts
        expand_keys, expand_values = expand[:, : self.nope_size], expand[:, self.nope_size :]
        q_BSE = self.queries(hidden)
        q_nope, q_rope = q_BSE.unflatten(-1, (self.query_heads, -1)).split([self.nope_size, self.rope_size], dim=-1)
        q_absorbed = q_nope.transpose(1, 2) @ expand_keys  # [B, H, S, R]
        q_rotated = split_heads(self.rotate(q_rope.flatten(-2), call, self.query_heads), self.query_heads)
        q = torch.cat((q_absorbed, q_rotated), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(hidden).split([self.latent_size, self.rope_size], dim=-1)
        row = torch.cat((self.kv_a_layernorm(latent), self.rotate(k_rope, call, 1)), dim=-1)
        rows = self.store("latent", row.unsqueeze(1), call)  # [B, 1, C, R + P]

        output, aux = self.attend(hidden, q_BSE, q, rows, rows, call)  # [B, H, S, R + P]
        values = output[..., : self.latent_size] @ expand_values.transpose(-1, -2)  # [B, H, S, V]
        return self.o_proj(values.transpose(1, 2).flatten(-2)), aux

    def value_maps(self) -> Tensor:
        expand_values = self.kv_b_proj.weight.unflatten(0, (self.query_heads, -1))[:, self.nope_size :]
        maps = super().value_maps().float() @ expand_values.float()  # [H, E, R]
        return nn.functional.pad(maps, (0, self.rope_size))

    def queries(self, hidden: Tensor) -> Tensor:
        """hidden [B, S, E] → [B, S, H * (N + P)], neither rotated nor absorbed."""
        if self.low_rank_queries:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        return self.q_proj(hidden)

    def rotate(self, x: Tensor, call: Call, heads: int) -> Tensor:
        return rotary(x, *call.rope, heads=heads, interleaved=self.interleaved)


class SparseLatentAttention(SparseAttention, LatentAttention):
    """The indexer and the selection of SparseAttention over the rows of LatentAttention."""

    def start_from_dense(self) -> None:
        """Keys that are made from latent rows have no part that the indexer could start from: it stays random."""


def softmax_scale(config: DSAConfig) -> float:
    """1 / √(N + P), times the square of YaRN's mscale_all_dim correction where the RoPE parameters have one."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    return scale
