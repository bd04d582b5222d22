"""dsa::SparseAttention: contract, torch forms and ONNX function body, side by side.

Shapes: B batch, S query tokens, C cache capacity, Hq/Hkv query/KV heads (group G = Hq / Hkv), D head size, K = k.

    q           [B, Hq, S, D]   fp32 | fp16 | bf16, rotated
    k_cache     [B, Hkv, C, D]  same dtype
    v_cache     [B, Hkv, C, D]  same dtype
    indices     [B, S, K]       int32, one set per query token, shared by all heads; an entry outside [0, C) is skipped,
                                an entry that stands twice counts twice
    output      [B, Hq, S, D]   same dtype; a row without any valid index is 0

Only the K selected rows enter the matrix products. Softmax in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.registry import PLUGIN_ATTRIBUTES

GATHER_BYTES = 128 * 2**20
"""Upper bound of the gathered K and V rows that the torch form holds at a time (tiles of query tokens)."""

# Skipped entries read row 0 (which must be finite: it is written by the first token) and get probability 0.
FUNCTION_BODY = """
SparseAttention <scale, plugin_version, plugin_namespace>
    (q, k_cache, v_cache, indices) => (output)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_1 = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    B_Hkv = Shape <start = 0, end = 2> (k_cache)
    B = Shape <start = 0, end = 1> (k_cache)
    S_K = Shape <start = 1, end = 3> (indices)
    D = Shape <start = 3, end = 4> (q)
    S_D = Shape <start = 2, end = 4> (q)

    slots = Cast <to = 7> (indices)
    C_1 = Shape <start = 2, end = 3> (k_cache)
    C = Squeeze (C_1)
    last = Sub (C, one)
    inside = Clip (slots, zero, last)
    valid = Equal (slots, inside)
    flat_shape = Concat <axis = 0> (B, one_1, minus_one, one_1)
    flat = Reshape (inside, flat_shape)
    per_head_shape = Concat <axis = 0> (B_Hkv, one_1, one_1)
    per_head = Expand (flat, per_head_shape)
    k_rows = GatherND <batch_dims = 2> (k_cache, per_head)
    v_rows = GatherND <batch_dims = 2> (v_cache, per_head)
    rows_shape = Concat <axis = 0> (B_Hkv, S_K, D)
    k_selected = Reshape (k_rows, rows_shape)
    v_selected = Reshape (v_rows, rows_shape)

    group_shape = Concat <axis = 0> (B_Hkv, minus_one, S_D)
    q_grouped = Reshape (q, group_shape)
    q_by_token = Transpose <perm = [0, 1, 3, 2, 4]> (q_grouped)
    k_transposed = Transpose <perm = [0, 1, 2, 4, 3]> (k_selected)
    dots = MatMul (q_by_token, k_transposed)
    dots_f = Cast <to = 1> (dots)
    scale_f = Constant <value_float : float = @scale> ()
    scores = Mul (dots_f, scale_f)
    axes = Constant <value_ints = [1, 3]> ()
    valid_row = Unsqueeze (valid, axes)
    lowest = Constant <value_float = -3.4e38> ()
    masked = Where (valid_row, scores, lowest)
    softmax = Softmax <axis = -1> (masked)
    nothing = Constant <value_float = 0.0> ()
    probabilities_f = Where (valid_row, softmax, nothing)
    probabilities = CastLike (probabilities_f, q)
    by_token = MatMul (probabilities, v_selected)
    grouped = Transpose <perm = [0, 1, 3, 2, 4]> (by_token)
    q_shape = Shape (q)
    output = Reshape (grouped, q_shape)
}
"""


def sparse_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    """The definition, one query and head at a time in fp32: slow, and obviously right."""
    B, Hq, S, D = q.shape
    Hkv, C = k_cache.shape[1:3]
    output = torch.zeros(B, Hq, S, D)
    for b in range(B):
        for t in range(S):
            rows = [s for s in indices[b, t].tolist() if 0 <= s < C]
            if not rows:
                continue
            for h in range(Hq):
                keys, values = (cache[b, h // (Hq // Hkv), rows].float() for cache in (k_cache, v_cache))
                output[b, h, t] = torch.softmax(keys @ q[b, h, t].float() * scale, dim=0) @ values
    return output.to(q.dtype)


def sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Attention of every query token over its selected rows. Shapes: see the top of this file."""
    B, Hq, S, D = q.shape
    Hkv = k_cache.shape[1]
    K = indices.shape[-1]
    if Hq % Hkv:
        raise ValueError(f"query heads ({Hq}) must be a multiple of KV heads ({Hkv})")
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "dsa::SparseAttention",
            (q, k_cache, v_cache, indices),
            {"scale": float(scale), **PLUGIN_ATTRIBUTES},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
    tile = max(1, GATHER_BYTES // (2 * B * Hkv * K * D * q.element_size()))
    return torch.cat([_attend(q[:, :, t : t + tile], k_cache, v_cache, indices[:, t : t + tile], scale)
                      for t in range(0, S, tile)], dim=2)  # fmt: skip


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    B, Hq, S, D = q.shape
    Hkv, C = k_cache.shape[1:3]
    valid = (indices >= 0) & (indices < C)
    slots = torch.where(valid, indices, 0).long()
    rows = torch.arange(B, device=q.device)[:, None, None]
    # Advanced indices around the head slice come first: [B, S, K, Hkv, D].
    k_BSHKD = k_cache[rows, :, slots].transpose(2, 3)
    v_BSHKD = v_cache[rows, :, slots].transpose(2, 3)
    v_BSHKD = v_BSHKD.masked_fill(~valid[:, :, None, :, None], 0)
    q_BSHGD = q.view(B, Hkv, Hq // Hkv, S, D).permute(0, 3, 1, 2, 4)
    scores = (q_BSHGD @ k_BSHKD.transpose(-1, -2)).float() * scale
    valid_row = valid[:, :, None, None, :]
    probabilities = torch.softmax(scores.masked_fill(~valid_row, torch.finfo(torch.float32).min), dim=-1)
    probabilities = probabilities.masked_fill(~valid_row, 0).to(q.dtype)
    return (probabilities @ v_BSHKD).permute(0, 2, 3, 1, 4).reshape(B, Hq, S, D)
