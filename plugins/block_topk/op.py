"""dsa::BlockTopK: contract, torch forms and ONNX function body, side by side; and the importance that it selects by.

Shapes: B batch, H KV heads, S query tokens, R compressed rows, J selection blocks, l / d / l' tokens of a compressed
block / of a stripe (the stride of the compressed blocks) / of a selection block, n blocks selected.

    importance     [B, H, S, J]     fp32; of block j, the tokens j l' .. (j + 1) l' - 1
    kv_lengths     [B]              int64; query t of row b stands at position kv_lengths[b] - S + t
    indices        [B, H, S, n l']  int32; the tokens of the selected blocks up to the query's own, -1 elsewhere

The first block, the query's own and the one before it are always selected; the others by importance; equal importance:
lower block first. (Native Sparse Attention, arXiv 2502.11089, equations 8 to 12.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.index_topk.op import topk_lowest_index_first
from plugins.registry import PLUGIN_ATTRIBUTES

FORCED_BLOCKS = 3
"""The first block, the query's own and the one before it."""
HIGHEST = 3.4e38

# Blocks that begin behind the query rank last; all their tokens are -1.
FUNCTION_BODY = """
BlockTopK <blocks, block_size, plugin_version, plugin_namespace>
    (importance, kv_lengths) => (indices)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zero_1 = Constant <value_ints = [0]> ()
    one_1 = Constant <value_ints = [1]> ()
    minus_one_1 = Constant <value_ints = [-1]> ()
    minus_one = Constant <value_int = -1> ()
    size = Constant <value_int : int = @block_size> ()
    S_1 = Shape <start = 2, end = 3> (importance)
    S = Squeeze (S_1)
    J_1 = Shape <start = 3, end = 4> (importance)
    J = Squeeze (J_1)

    past = Sub (kv_lengths, S_1)
    row_axes = Constant <value_ints = [1, 2, 3]> ()
    past_column = Unsqueeze (past, row_axes)
    steps = Range (zero, S, one)
    steps_column = Unsqueeze (steps, one_1)
    positions = Add (past_column, steps_column)
    own = Div (positions, size)
    numbers = Range (zero, J, one)
    is_first = Equal (numbers, zero)
    before = Sub (own, one)
    is_recent = GreaterOrEqual (numbers, before)
    always = Or (is_first, is_recent)
    visible = LessOrEqual (numbers, own)
    highest = Constant <value_float = 3.4e38> ()
    lowest = Constant <value_float = -3.4e38> ()
    raised = Where (always, highest, importance)
    masked = Where (visible, raised, lowest)
    blocks_s = Constant <value_int : int = @blocks> ()
    blocks_1 = Unsqueeze (blocks_s, zero_1)
    best, chosen = TopK <axis = -1, largest = 1, sorted = 0> (masked, blocks_1)

    starts = Mul (chosen, size)
    starts_column = Unsqueeze (starts, minus_one_1)
    offsets = Range (zero, size, one)
    tokens = Add (starts_column, offsets)
    positions_column = Unsqueeze (positions, minus_one_1)
    causal = LessOrEqual (tokens, positions_column)
    selected = Where (causal, tokens, minus_one)
    flat_shape = Constant <value_ints = [0, 0, 0, -1]> ()
    flat = Reshape (selected, flat_shape)
    indices = Cast <to = 6> (flat)
}
"""


def block_importance(probabilities: Tensor, block: int, stride: int, selection: int) -> Tensor:
    """Equation 9: what the compressed blocks say of the selection blocks.

    Each compressed block gives its probability to a selection block once for every stripe of `stride` tokens that the
    two share. `probabilities` [..., R]: row r is the block of `block` tokens that *ends* with stripe r (rows that are
    no whole block must be 0). Returns [..., J], J = ⌈R stride / selection⌉. Plain operators, the same in a graph.
    """
    overlapping, stripes = block // stride, selection // stride  # compressed blocks over a stripe; stripes in a block
    R = probabilities.shape[-1]
    J = (R + stripes - 1) // stripes
    # Stripe s lies in the blocks that end with the stripes s .. s + overlapping - 1.
    padded = F.pad(probabilities, (0, J * stripes + overlapping - 1 - R))
    per_stripe = padded[..., : J * stripes]
    for later in range(1, overlapping):
        per_stripe = per_stripe + padded[..., later : later + J * stripes]
    return per_stripe.unflatten(-1, (-1, stripes)).sum(-1)


def block_topk_reference(importance: Tensor, kv_lengths: Tensor, blocks: int, block_size: int) -> Tensor:
    """The definition, one query at a time: slow, and obviously right."""
    B, H, S, J = importance.shape
    indices = torch.full((B, H, S, blocks * block_size), -1, dtype=torch.int32)
    for b in range(B):
        for h in range(H):
            for t in range(S):
                position = int(kv_lengths[b]) - S + t
                own = position // block_size
                visible = range(min(own + 1, J))
                always = [j for j in visible if j in (0, own - 1, own)]
                others = sorted((-float(importance[b, h, t, j]), j) for j in visible if j not in always)
                chosen = [*always, *(j for _, j in others)][:blocks]
                tokens = [s for j in chosen for s in range(j * block_size, (j + 1) * block_size) if s <= position]
                indices[b, h, t, : len(tokens)] = torch.tensor(tokens)
    return indices


def block_topk(importance: Tensor, kv_lengths: Tensor, blocks: int, block_size: int) -> Tensor:
    """Selects `blocks` blocks of `block_size` tokens for every query token. Shapes: see the top of this file.

    In torch, `blocks` may exceed J (the row is padded with -1); the exported graph needs J >= blocks.
    Raises ValueError for fewer blocks than are always selected, and for arguments that do not fit the shape table.
    """
    if blocks < FORCED_BLOCKS or block_size < 1:
        raise ValueError(f"need blocks >= {FORCED_BLOCKS} and block_size >= 1, got {blocks} and {block_size}")
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "dsa::BlockTopK",
            (importance, kv_lengths),
            {"blocks": blocks, "block_size": block_size, **PLUGIN_ATTRIBUTES},
            dtype=torch.int32,
            shape=(*importance.shape[:3], blocks * block_size),
            version=1,
        )
    if importance.ndim != 4 or kv_lengths.shape != importance.shape[:1]:
        found = f"{tuple(importance.shape)}, {tuple(kv_lengths.shape)}"
        raise ValueError(f"need importance [B, H, S, J] and kv_lengths [B]; got {found}")
    if importance.dtype != torch.float32 or kv_lengths.dtype != torch.int64:
        raise ValueError(f"need importance fp32 and kv_lengths int64, got {importance.dtype}, {kv_lengths.dtype}")
    S, J = importance.shape[2:]
    steps = torch.arange(S, device=importance.device)
    positions = (kv_lengths[:, None] - S + steps)[:, None, :, None]
    own = positions // block_size
    numbers = torch.arange(J, device=importance.device)
    always = (numbers == 0) | (numbers >= own - 1)
    ranked = importance.masked_fill(always, HIGHEST).masked_fill(numbers > own, -HIGHEST)
    chosen = topk_lowest_index_first(ranked, min(blocks, J))
    tokens = (chosen * block_size)[..., None] + torch.arange(block_size, device=importance.device)
    indices = torch.where(tokens <= positions[..., None], tokens, -1).flatten(-2).to(torch.int32)
    return F.pad(indices, (0, blocks * block_size - indices.shape[-1]), value=-1)
