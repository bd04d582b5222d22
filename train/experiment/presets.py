"""The decoders of the experiment and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsa_export.config import DSAConfig
from plugins.block_topk.op import FORCED_BLOCKS

NSA_BLOCK = 16
"""Tokens of NSA's compressed and selected blocks; the first block and the two most recent are always selected."""


@dataclass(frozen=True)
class Preset:
    """One decoder, its indexer and its training; every attention of the experiment takes the same."""

    name: str
    length: int = 128  # T, tokens per window, and the model's positions
    feed_forward: str = "moe"
    hidden_size: int = 256
    heads: int = 8  # of queries, and as many of keys and values
    layers: int = 6
    expert_size: int = 512
    experts: int = 4
    active: int = 2
    vocabulary: int = 4096
    index_heads: int = 4
    index_dim: int = 64
    topk: int | tuple[int, ...] = 64
    tokens_per_update: int = 2048
    warm_up_updates: int = 200
    warmup_lr: float = 1e-3
    steps: int = 3000
    lr: float = 3e-3
    held_out: int = 64  # windows

    @property
    def batch_size(self) -> int:
        """Windows per update."""
        return max(1, self.tokens_per_update // self.length)

    @property
    def mean_topk(self) -> int:
        return self.topk if isinstance(self.topk, int) else round(sum(self.topk) / len(self.topk))

    def config(self) -> DSAConfig:
        """The dense model, with the options of the others: NSA selects about as many tokens as DSA.

        A plain feed-forward is as large as a token's experts together: the same work per token.
        Raises ValueError for fields that exclude each other.
        """
        return DSAConfig(
            attention="dense",
            feed_forward=self.feed_forward,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.active * self.expert_size,
            moe_intermediate_size=self.expert_size,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            index_heads=self.index_heads,
            index_dim=self.index_dim,
            index_topk=self.topk if isinstance(self.topk, int) else list(self.topk),
            nsa_block_size=NSA_BLOCK,
            nsa_stride=NSA_BLOCK // 2,
            nsa_selection_size=NSA_BLOCK,
            nsa_selected_blocks=max(FORCED_BLOCKS, self.mean_topk // NSA_BLOCK),
            nsa_window=max(NSA_BLOCK, self.mean_topk // 2),
        )


def _presets() -> dict[str, Preset]:
    """GLM4-MoE in small at six lengths, and each with a plain feed-forward. k is an eighth of the long ones."""
    presets = {}
    for feed_forward, family in (("moe", "glm4-moe"), ("gated", "plain")):
        for length in (128, 256, 512, 1024, 2048, 4096):
            name = family if length == 128 else f"{family}-{length}"
            presets[name] = Preset(name, length, feed_forward, topk=max(64, length // 8))
    return presets


PRESETS = _presets()


def quick(preset: Preset) -> Preset:
    """The same experiment on a model that is trained in half a minute."""
    return replace(
        preset,
        hidden_size=128,
        heads=4,
        layers=2,
        expert_size=128,
        vocabulary=1024,
        index_dim=32,
        tokens_per_update=max(1024, preset.length),
        warm_up_updates=20,
        steps=120,
        held_out=16,
    )
