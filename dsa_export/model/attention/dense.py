"""Dense grouped-query attention: the projections, and a core that sees the whole cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsa_export.config import DSAConfig
from dsa_export.model.attention.base import Call
from dsa_export.model.cache import CacheEntry
from dsa_export.model.norm import HeadRMSNorm
from dsa_export.model.standard_ops import dense_attention, rotary, split_heads
from dsa_export.topk import topk_per_layer


class DenseAttention(nn.Module):
    """Qwen2's attention, or Llama's (qkv_bias=False), or Qwen3's (qk_norm=True as well).

    Other grouped-query variants override cache_layout() and attend().
    """

    DENSE: ClassVar[str] = "dense"
    """The variant in VARIANTS that sees everything, on the same parameters less the added ones."""
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of the parameters that a dense checkpoint lacks and its conversion initialises."""

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        """Raises ValueError, naming the option, for a configuration that the variant cannot take."""
        if config.kv_lora_rank:
            raise ValueError(
                f"attention={config.attention!r} has no latent rows (kv_lora_rank): use 'mla' or 'mla-dsa'"
            )

    @classmethod
    def topk_per_layer(cls, config: DSAConfig) -> tuple[int, ...]:
        """Rows of K and V that a query of each layer attends to at most where the variant selects."""
        return topk_per_layer(config.index_topk, config.num_hidden_layers)

    def __init__(self, config: DSAConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.query_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_size
        self.scale = self.head_size**-0.5
        query_size, kv_size = self.query_heads * config.head_size, self.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = HeadRMSNorm(config.head_size, config.rms_norm_eps)
            self.k_norm = HeadRMSNorm(config.head_size, config.rms_norm_eps)

    def start_from_dense(self) -> None:
        """Sets the added parameters after a dense checkpoint was loaded, where random ones are no good start."""

    @classmethod
    def cache_layout(cls, config: DSAConfig, layer: int) -> list[CacheEntry]:
        heads = config.num_key_value_heads
        return [CacheEntry("key", heads, config.head_size), CacheEntry("value", heads, config.head_size)]

    def forward(self, hidden: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [B, S, E] → (output [B, S, E], the observer's scalars)."""
        q_BSE = rotary(self.q_norm(self.q_proj(hidden)), *call.rope, heads=self.query_heads)
        q = split_heads(q_BSE, self.query_heads)
        k_BSE = rotary(self.k_norm(self.k_proj(hidden)), *call.rope, heads=self.kv_heads)
        k = split_heads(k_BSE, self.kv_heads)
        v = split_heads(self.v_proj(hidden), self.kv_heads)
        k, v = self.store("key", k, call), self.store("value", v, call)
        output, aux = self.attend(hidden, q_BSE, q, k, v, call)
        return self.o_proj(output.transpose(1, 2).flatten(-2)), aux

    def store(self, name: str, new: Tensor, call: Call, stride: int = 1) -> Tensor:
        """Caches this call's rows and returns all rows; without a cache this call's rows are all there is."""
        if call.caches is None:
            return new
        return call.caches[self.layer].update(name, new, stride, whole=self.wants_whole_cache(new))

    def wants_whole_cache(self, new: Tensor) -> bool:
        """Whether store() returns the free rows of the cache too."""
        return False

    def attend(
        self, hidden: Tensor, q_BSE: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The core: q [B, Hq, S, D] (also as q_BSE, heads not split), k and v [B, Hkv, C, D] → [B, Hq, S, D]."""
        return dense_attention(q, k, v, call.kv_lengths, self.scale), {}

    @torch.no_grad()
    def value_norms(self, v: Tensor) -> Tensor:
        """‖W_O,h v‖ of each query head h and row of v [B, Hkv, C, D]: [B, Hq, C] fp32, at least 1e-9."""
        with torch.autocast(v.device.type, enabled=False):
            maps = self.value_maps().float()
            squares = maps.transpose(-1, -2) @ maps  # ‖M v‖² = v · MᵀM v: little work, however large the output
            rows = v.float().repeat_interleave(len(maps) // v.shape[1], dim=1)
            return (rows @ squares * rows).sum(-1).clamp(min=1e-18).sqrt()

    def value_maps(self) -> Tensor:
        """What takes each query head's sum of rows of v to the layer's output: [Hq, E, D]."""
        projection: Any = self.o_proj
        output = projection.weight
        if type(projection) is not nn.Linear:  # with an adapter, beside which the matrix may be held in bf16
            output = output.float() + projection.get_delta_weight(*projection.active_adapters)
        return output.unflatten(1, (self.query_heads, -1)).transpose(0, 1)
