"""DeepSeek Sparse Attention on grouped-query attention: lightning indexer, top-k selection, attention over it.

The indexer's input is detached: its loss never trains the base. Each index key is rotated once, at its own position,
before it is cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from dsa_export.config import DSAConfig
from dsa_export.model.attention.base import NOTHING, AttentionTrace, Call
from dsa_export.model.attention.dense import DenseAttention
from dsa_export.model.cache import CacheEntry
from dsa_export.model.norm import HeadRMSNorm
from dsa_export.model.standard_ops import dense_attention, rotary, visible_attention
from dsa_export.selection import KEY_TYPES
from dsa_export.topk import topk_per_layer
from plugins.index_topk import index_scores, index_topk
from plugins.index_topk.op import check_options
from plugins.index_topk.rounding import round_keys, round_queries, unrounded_keys
from plugins.sparse_attention import sparse_attention

Scored = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""index_q, index_weights, index_k and index_scale as dsa::IndexTopK takes them."""

STORED_KEYS = {"model": None, "fp8": torch.float8_e4m3fn, "int8": torch.uint8}
"""Cached types of the index keys; None is the model's."""


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

    def forward(
        self, hidden: Tensor, q_BSE: Tensor, call: Call, queries: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, S, E] → index_q [B, S, Hi, Di], index_weights [B, S, Hi], index_k [B, S, Di] of this call.

        queries: the tokens that the first two are of, in place of all S.
        """
        index_k = self.keys(hidden, call)
        hidden, q_BSE, cos, sin = hidden.detach(), q_BSE.detach(), *call.index_rope
        if queries is not None:
            hidden, q_BSE, cos, sin = hidden[:, queries], q_BSE[:, queries], cos[:, queries], sin[:, queries]
        index_q = rotary(self.q_proj(hidden), cos, sin, heads=self.heads) if self.own_queries else q_BSE
        # Under autocast what is rotated comes out in fp32, and so must the weights.
        index_weights = self.weights_proj(hidden).to(index_q.dtype) * (self.heads**-0.5 * self.dim**-0.5)
        return index_q.unflatten(-1, (self.heads, self.dim)), index_weights, index_k

    def keys(self, hidden: Tensor, call: Call) -> Tensor:
        """hidden [B, S, E] → index_k [B, S, Di]."""
        return rotary(self.k_norm(self.k_proj(hidden.detach())), *call.index_rope, heads=1)

    @torch.no_grad()
    def start_from(self, attention: DenseAttention) -> None:
        """Starts from query heads of the attention, evenly spread, and the mean of its KV heads: less is left to learn.

        Of a head larger than the indexer's every D/Di-th rotation is taken: the indexer's frequencies (with YaRN nearly
        so). Where there is no such part (Di does not divide D) the indexer stays random. It has no biases to take.
        """
        D = attention.head_size
        if D % self.dim:
            return
        first_of_pairs = torch.arange(0, D // 2, D // self.dim)
        rows = torch.cat([first_of_pairs, first_of_pairs + D // 2])

        def part(projection: nn.Linear, norm: nn.Module) -> Tensor:
            """[heads, Di, E], times the weights of Qwen3's norm over each head."""
            heads = projection.weight.unflatten(0, (-1, D))[:, rows].to(self.k_proj.weight)
            return heads * norm.weight[rows, None].to(heads) if isinstance(norm, HeadRMSNorm) else heads

        self.k_proj.weight.copy_(part(attention.k_proj, attention.k_norm).mean(0))
        if self.own_queries:
            heads = torch.linspace(0, attention.query_heads - 1, min(self.heads, attention.query_heads)).round().long()
            queries = part(attention.q_proj, attention.q_norm)[heads].flatten(0, 1)
            self.q_proj.weight[: len(queries)] = queries


class SparseAttention(DenseAttention):
    """`sparse` = False lets the core see everything (warm-up: the dense teacher; engines: while caches are short); the
    indexer's keys are still cached, and it is observed."""

    ADDED: ClassVar[tuple[str, ...]] = (".indexer.",)

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        super().check(config)
        for name, choices in (("index_queries", ("own", "shared")), ("index_keys", KEY_TYPES)):
            if getattr(config, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
        for name in ("index_heads", "index_dim", "index_share"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        if config.index_share > config.num_hidden_layers:
            raise ValueError(f"index_share = {config.index_share} exceeds the {config.num_hidden_layers} layers")
        if config.index_dim % 2:
            raise ValueError(f"index_dim must be even (half-split RoPE), got {config.index_dim}")
        shared = (config.num_attention_heads, config.head_size)
        if config.index_queries == "shared" and (config.index_heads, config.index_dim) != shared:
            raise ValueError(f"index_queries='shared' needs (index_heads, index_dim) = {shared}")
        if config.index_keys != "model" and config.index_pool > 1:
            raise ValueError(
                f"index_keys = {config.index_keys} excludes index_pool = {config.index_pool}: "
                "means are cached unrounded"
            )
        topk = topk_per_layer(config.index_topk, config.num_hidden_layers)
        for layer, k in enumerate(topk):
            try:
                check_options(k, config.index_sinks, config.index_window, config.index_pool)
            except ValueError as error:
                raise ValueError(f"index_topk and the options of the selection do not fit: {error}") from None
            if k != topk[leader(config, layer)]:
                raise ValueError(
                    f"index_share = {config.index_share} needs one index_topk for layers that share a selection, got "
                    f"{topk[leader(config, layer)]} for layer {leader(config, layer)} and {k} for layer {layer}"
                )

    def __init__(self, config: DSAConfig, layer: int):
        super().__init__(config, layer)
        self.leader = leader(config, layer)
        self.followed = self.leads and layer + 1 < config.num_hidden_layers and leader(config, layer + 1) == layer
        if self.leads:
            self.indexer = Indexer(config)
        self.topk = config.topk_per_layer[layer]
        self.sinks, self.window, self.pool = config.index_sinks, config.index_window, config.index_pool
        self.key_type = config.index_keys
        self.sparse = True

    def start_from_dense(self) -> None:
        if self.leads:
            self.indexer.start_from(self)

    @property
    def leads(self) -> bool:
        """Whether this layer has an indexer: without one it follows its leader's selection."""
        return self.leader == self.layer

    @classmethod
    def cache_layout(cls, config: DSAConfig, layer: int) -> list[CacheEntry]:
        entries = super().cache_layout(config, layer)
        if leader(config, layer) != layer:
            return entries
        entries.append(CacheEntry("index", 1, config.index_dim, dtype=STORED_KEYS[config.index_keys]))
        if config.index_keys != "model":
            entries.append(CacheEntry("index_scale", 1, 1, dtype=torch.float32))
        if config.index_pool > 1:
            # The single keys are kept beside the means: a group's mean changes until the group is complete.
            entries.append(CacheEntry("pooled", 1, config.index_dim, stride=config.index_pool))
        return entries

    def wants_whole_cache(self, new: Tensor) -> bool:
        return self.sparse and new.is_cuda  # the kernels do not look at free rows, but would copy a slice

    def attend(
        self, hidden: Tensor, q_BSE: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.sparse and call.observer is None:
            if self.leads and call.caches is not None:
                self.cached_keys(self.indexer.keys(hidden, call), call)
            return dense_attention(q, k, v, call.kv_lengths, self.scale), {}
        value_norms = partial(self.value_norms, v)
        if self.leads:
            trace, scored = self.index(hidden, q_BSE, q, k, value_norms, call)
            if self.sparse:
                with torch.no_grad():
                    indices = self.select(scored, call) if call.selector is None else call.selector(trace)
                trace = replace(trace, indices=indices)
            if self.followed:  # set once: gradient checkpointing runs a layer twice
                call.handed_on.setdefault(self.layer, trace.for_followers(observed=call.observer is not None))
        else:
            trace = replace(call.handed_on[self.leader], layer=self.layer, q=q, k=k, value_norms=value_norms)
        if self.sparse:
            assert trace.indices is not None
            core = masked_attention if self.training else sparse_attention
            output = core(q, k, v, trace.indices, self.scale)
        else:
            output = dense_attention(q, k, v, call.kv_lengths, self.scale)
        return output, call.observer(trace) if call.observer else {}

    def index(
        self,
        hidden: Tensor,
        q_BSE: Tensor,
        q: Tensor,
        k: Tensor,
        value_norms: Callable[[], Tensor],
        call: Call,
        queries: slice | None = None,
    ) -> tuple[AttentionTrace, Scored]:
        """Runs the indexer, and caches its keys: the layer's trace without a selection, and what that is made from.

        queries: see Indexer.
        """
        index_q, index_weights, index_k = self.indexer(hidden, q_BSE, call, queries)
        scored = self.scored(index_q, index_weights, index_k, call)
        scored_k = index_k
        if call.caches is None or call.observer or call.selector:
            if self.pool > 1:
                scored_k = scored[2].repeat_interleave(self.pool, dim=1)[:, : k.shape[2]]
            elif call.caches is not None:
                scored_k = unrounded_keys(scored[2], scored[3])
        again = None
        if call.observer:
            # Without the observer: one that keeps traces would be kept by them.
            unseen = replace(call, observer=None, handed_on={})
            again = lambda rows: self.index(hidden, q_BSE, q[:, :, rows], k, value_norms, unseen, rows)[0]  # noqa: E731
        indexed = (index_q, index_weights, index_k, scored_k)
        lengths = (call.lengths, call.kv_lengths)
        return AttentionTrace(self.layer, q, k, value_norms, *indexed, None, *lengths, self.scale, again), scored

    def scored(self, index_q: Tensor, index_weights: Tensor, index_k: Tensor, call: Call) -> Scored:
        """Caches this call's index keys [B, S, Di], and returns what the scores are computed from.

        Returns: index_q [B, S, Hi, Di] and index_weights [B, S, Hi] as they are, or for keys in int8 rounded with them;
            all keys that are scored [B, G, Di]; their scales [B, G], of keys in 8 bits.
        """
        if self.key_type == "int8":
            index_q, index_weights = round_queries(index_q, index_weights)
        return index_q, index_weights, *self.cached_keys(index_k, call)

    def cached_keys(self, index_k: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """Caches this call's index keys [B, S, Di]: all keys that are scored [B, G, Di], and scales, see scored()."""
        if self.key_type != "model":
            rounded, scales = round_keys(index_k, self.key_type)
            scales = self.store("index_scale", scales[:, None, :, None], call).squeeze(3).squeeze(1)  # no copy in ONNX
            return self.store("index", rounded.unsqueeze(1), call).squeeze(1), scales
        keys = self.store("index", index_k.unsqueeze(1), call).squeeze(1)
        if self.pool > 1:
            S = index_k.shape[1]
            means = pool_keys(keys, call.kv_lengths - S, S, call.lengths, self.pool)
            keys = self.store("pooled", means.unsqueeze(1), call, stride=self.pool).squeeze(1)
        return keys, None

    def select(self, scored: Scored, call: Call) -> Tensor:
        """indices [B, S, K] int32, see dsa::IndexTopK."""
        index_q, index_weights, keys, scales = scored
        options = (self.sinks, self.window, self.pool)
        return index_topk(index_q, index_weights, keys, call.kv_lengths, self.topk, *options, scales)

    @torch.no_grad()
    def reselect(self, trace: AttentionTrace) -> tuple[Tensor, Tensor]:
        """What the indexer itself selects in a call without cache [B, S, K], and the scores [B, S, S] fp32 of it.

        A token has the score of its group.
        """
        B, S = trace.index_k.shape[:2]
        call = Call(
            rope=(NOTHING, NOTHING),
            index_rope=(NOTHING, NOTHING),
            kv_lengths=torch.full((B,), S, device=trace.index_k.device),
            lengths=trace.lengths,
            caches=None,
        )
        scored = self.scored(trace.index_q, trace.index_weights, trace.index_k, call)
        scores = index_scores(*scored).repeat_interleave(self.pool, dim=-1)[..., :S]
        return self.select(scored, call), scores


def leader(config: DSAConfig, layer: int) -> int:
    """The layer whose selection a layer follows."""
    return layer - layer % config.index_share


def pool_keys(keys: Tensor, past: Tensor, S: int, lengths: Tensor, pool: int) -> Tensor:
    """Means of the groups that the S tokens after `past` [B] lie in, from the first such group on: [B, R, Di].

    keys [B, C, Di]: all single keys, this call's included, of which `lengths` [B] are valid. An incomplete group has
    the mean of what is there; one behind the end is 0.
    """
    R = (S + pool - 2) // pool + 1
    ends = past + lengths
    slots = (past // pool * pool)[:, None] + torch.arange(R * pool, device=keys.device)
    valid = (slots < ends[:, None])[..., None]
    rows = keys.gather(1, slots.clamp(max=keys.shape[1] - 1)[..., None].expand(-1, -1, keys.shape[2]))
    sums = torch.where(valid, rows, 0).float().unflatten(1, (R, pool)).sum(2)
    counts = valid.float().unflatten(1, (R, pool)).sum(2)
    return (sums / counts.clamp(min=1)).to(keys.dtype)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> Tensor:
    """sparse_attention() as a mask over dense scores: the same function of its inputs, faster to train at short S."""
    C = k.shape[2]
    mask = torch.zeros(*indices.shape[:2], C + 1, dtype=torch.bool, device=q.device)
    mask.scatter_(-1, torch.where(indices < 0, C, indices).long(), True)
    return visible_attention(q, k, v, mask[..., :C], scale)
