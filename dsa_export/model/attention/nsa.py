"""Native Sparse Attention (arXiv 2502.11089) on grouped-query attention: three branches, summed by learned gates.

    compression   attention over one row per block of l tokens, a new block every d tokens
    selection     attention over the n blocks of l' tokens that the compression finds important
    window        attention over the last w tokens

Each branch has keys and values of its own; the queries are shared. Every KV head selects for itself. The selection has
no gradient: the compression branch learns what matters by attending, and the selection follows it.

Shapes: B batch, S tokens of this call, C cache capacity, Hq/Hkv query/KV heads (group G), D head size, R compressed
rows. Compressed row r is the block that *ends* with stripe r, the tokens r d .. (r + 1) d - 1: it holds the tokens
(r + 1) d - l .. (r + 1) d - 1 and is visible from position (r + 1) d - 1 on, if r >= l / d - 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_export.config import DSAConfig
from dsa_export.model.attention.base import Call
from dsa_export.model.attention.dense import DenseAttention
from dsa_export.model.attention.dsa import masked_attention
from dsa_export.model.cache import CacheEntry
from dsa_export.model.standard_ops import gather_rows, rotary, split_heads, visible_attention
from dsa_export.selection import NSA_OPTIONS
from plugins.block_topk import block_importance, block_topk
from plugins.block_topk.op import FORCED_BLOCKS
from plugins.sparse_attention import sparse_attention
from plugins.sparse_attention.op import scaled_dots

BRANCHES = ("compression", "selection", "window")
START_GATE = 3.0
"""On a dense checkpoint's weights the gates start at sigmoid(3) = 0.95 for the selection and sigmoid(-3) = 0.05 for the
others. Selection and window then add up to dense attention while a text is short enough for both to see all of it."""


class KeysValues(nn.Module):
    """The projections of a branch, of the same shapes as the layer's own."""

    def __init__(self, config: DSAConfig, bias: bool):
        super().__init__()
        size = config.num_key_value_heads * config.head_size
        self.k_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=bias)


class Compressor(nn.Module):
    """A block of l rows becomes one: their mean, plus an MLP over all of them. Starts as the mean."""

    def __init__(self, block: int, dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block, dim))
        self.up_proj = nn.Linear(block * dim, dim)
        self.down_proj = nn.Linear(dim, dim)

    def reset(self) -> None:
        nn.init.zeros_(self.position)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, blocks: Tensor) -> Tensor:
        """[..., l, D] → [..., D]; `position` tells the places within the block apart."""
        blocks = blocks + self.position
        return blocks.mean(-2) + self.down_proj(F.silu(self.up_proj(blocks.flatten(-2))))


class Compression(KeysValues):
    """The compression branch: its projections, and what makes one row of a block."""

    def __init__(self, config: DSAConfig, bias: bool):
        super().__init__(config, bias)
        self.key = Compressor(config.nsa_block_size, config.head_size)
        self.value = Compressor(config.nsa_block_size, config.head_size)


class NativeSparseAttention(DenseAttention):
    """The layer's own k_proj and v_proj serve the selection: with it alone, and everything selected, this is dense."""

    ADDED: ClassVar[tuple[str, ...]] = (".compression.", ".window.", ".branch_gates.")

    @classmethod
    def check(cls, config: DSAConfig) -> None:
        super().check(config)
        for name in NSA_OPTIONS:
            value = getattr(config, name)
            if value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("nsa_block_size", "nsa_selection_size"):
            if getattr(config, name) % config.nsa_stride:
                raise ValueError(f"nsa_stride={config.nsa_stride} must divide {name}={getattr(config, name)}")
        if config.nsa_selected_blocks < FORCED_BLOCKS:
            raise ValueError(
                f"nsa_selected_blocks must be at least {FORCED_BLOCKS} (the first block and the two most recent are "
                f"always selected), got {config.nsa_selected_blocks}"
            )

    @classmethod
    def topk_per_layer(cls, config: DSAConfig) -> tuple[int, ...]:
        return (config.nsa_selected_blocks * config.nsa_selection_size,) * config.num_hidden_layers

    def __init__(self, config: DSAConfig, layer: int):
        super().__init__(config, layer)
        self.block, self.stride = config.nsa_block_size, config.nsa_stride
        self.selection_size, self.selected_blocks = config.nsa_selection_size, config.nsa_selected_blocks
        self.window_size = config.nsa_window
        bias = self.k_proj.bias is not None
        self.compression = Compression(config, bias)
        self.window = KeysValues(config, bias)
        self.branch_gates = nn.Linear(config.hidden_size, len(BRANCHES) * self.query_heads)

    def start_from_dense(self) -> None:
        for branch in (self.compression, self.window):
            branch.k_proj.load_state_dict(self.k_proj.state_dict())
            branch.v_proj.load_state_dict(self.v_proj.state_dict())
        with torch.no_grad():
            self.branch_gates.weight.zero_()
            for name, bias in zip(BRANCHES, self.branch_gates.bias.chunk(len(BRANCHES)), strict=True):
                bias.fill_(START_GATE if name == "selection" else -START_GATE)

    @classmethod
    def cache_layout(cls, config: DSAConfig, layer: int) -> list[CacheEntry]:
        heads, dim = config.num_key_value_heads, config.head_size
        return [
            *super().cache_layout(config, layer),
            # In these, the heads of the keys stand before those of the values.
            CacheEntry("window", 2 * heads, dim, recent=config.nsa_window - 1),
            # What is to be compressed, one row per token; a call reads from the first block that it ends on.
            CacheEntry("block", 2 * heads, dim, recent=config.nsa_block_size - 1),
            CacheEntry("compressed", 2 * heads, dim, stride=config.nsa_stride),
        ]

    def attend(
        self, hidden: Tensor, q_BSE: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        past = call.kv_lengths - q.shape[2]
        positions = past[:, None] + torch.arange(q.shape[2], device=q.device)  # [B, S]
        compressed, probabilities = self.attend_compressed(hidden, q, positions, call)
        outputs = (
            compressed,
            self.attend_selected(q, k, v, probabilities, call),
            self.attend_window(hidden, q, positions, call),
        )
        gates = torch.sigmoid(self.branch_gates(hidden)).transpose(1, 2).unsqueeze(-1).chunk(len(BRANCHES), dim=1)
        gated = [gate * output for gate, output in zip(gates, outputs, strict=True)]  # gates [B, Hq, S, 1]
        return gated[0] + gated[1] + gated[2], {}

    # ------------------------------------------------------------ compression

    def attend_compressed(self, hidden: Tensor, q: Tensor, positions: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """→ [B, Hq, S, D], and the probabilities of the compressed rows, summed over each group: [B, Hkv, S, R]."""
        k, v = self.compressed_rows(hidden, positions[:, 0], call)
        ends = (torch.arange(k.shape[2], device=q.device) + 1) * self.stride - 1
        visible = (ends <= positions[..., None]) & (ends >= self.block - 1)
        output, probabilities = grouped_attention(q, k, v, visible, self.scale)
        return output, probabilities.sum(2)

    def compressed_rows(self, hidden: Tensor, past: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Keys and values of all compressed rows, [B, Hkv, R, D], after those that this call touches are made.

        These are the rows of the stripes that hold the call's tokens; what is incomplete is made again by a later call.
        A compressed key is rotated once, at the position of its block's last token.
        """
        projected = torch.cat([self.compression.k_proj(hidden), self.compression.v_proj(hidden)], dim=-1)
        tokens = self.store("block", split_heads(projected, 2 * self.kv_heads), call)

        rows = (hidden.shape[1] + 2 * self.stride - 2) // self.stride  # as many as S tokens can touch
        row_ends = (past // self.stride + 1)[:, None] * self.stride  # [B, rows], the position behind the last token
        row_ends = row_ends + torch.arange(rows, device=hidden.device) * self.stride
        slots = row_ends[..., None] - self.block + torch.arange(self.block, device=hidden.device)
        keys, values = gather_rows(tokens, slots.flatten(1)).unflatten(2, (-1, self.block)).chunk(2, dim=1)
        keys, values = self.compression.key(keys), self.compression.value(values)
        # The last token of a block that is complete after this call belongs to this call: its angles are at hand.
        cos, sin = gather_rows(torch.stack(call.rope, dim=1), row_ends - 1 - past[:, None]).unbind(1)
        keys = self.k_norm(keys.transpose(1, 2).flatten(-2))
        keys = split_heads(rotary(keys, cos, sin, self.kv_heads), self.kv_heads)
        keys, values = self.store("compressed", torch.cat([keys, values], dim=1), call, self.stride).chunk(2, dim=1)
        return keys, values

    # ------------------------------------------------------------ selection

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor, call: Call) -> Tensor:
        """The KV heads go into the batch: each has its own indices, and the operator takes one set per token."""
        with torch.no_grad():
            importance = block_importance(probabilities, self.block, self.stride, self.selection_size)
            indices = block_topk(importance, call.kv_lengths, self.selected_blocks, self.selection_size)
        core = masked_attention if self.training else sparse_attention
        output = core(
            q.unflatten(1, (self.kv_heads, -1)).flatten(0, 1),
            k.flatten(0, 1).unsqueeze(1),
            v.flatten(0, 1).unsqueeze(1),
            indices.flatten(0, 1),
            self.scale,
        )
        return output.unflatten(0, (-1, self.kv_heads)).flatten(1, 2)

    # ------------------------------------------------------------ window

    def attend_window(self, hidden: Tensor, q: Tensor, positions: Tensor, call: Call) -> Tensor:
        """Of the cache only the rows that some query of this call sees are read: S + w - 1 consecutive ones."""
        k_BSE = rotary(self.k_norm(self.window.k_proj(hidden)), *call.rope, heads=self.kv_heads)
        new = [split_heads(x_BSE, self.kv_heads) for x_BSE in (k_BSE, self.window.v_proj(hidden))]
        rows, slots = self.store("window", torch.cat(new, dim=1), call), positions
        if call.caches is not None:
            before = torch.arange(1 - self.window_size, 0, device=q.device)
            slots = torch.cat([positions[:, :1] + before, positions], dim=1)
            rows = gather_rows(rows, slots)
        k, v = rows.chunk(2, dim=1)
        back = positions[:, :, None] - slots[:, None]
        visible = (back >= 0) & (back < self.window_size) & (slots[:, None] >= 0)
        return visible_attention(q, k, v, visible, self.scale)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked attention that also tells its probabilities; a query that sees nothing gets 0.

    q [B, Hq, S, D], k and v [B, Hkv, N, D], visible [B, S, N] → [B, Hq, S, D], probabilities [B, Hkv, G, S, N] fp32.
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    visible = visible[:, None, None]
    scores = scaled_dots(grouped, k.unsqueeze(2), scale)
    probabilities = torch.softmax(torch.where(visible, scores, torch.finfo(torch.float32).min), dim=-1)
    probabilities = torch.where(visible, probabilities, 0.0)
    return (probabilities.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2), probabilities
