"""The standard operators of the graphs, each in its torch form and its ONNX form (opset 24).

Shapes: B batch, S query tokens of this call, C cache capacity, H heads, Hq/Hkv query/KV heads, D head size, E = H D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.registry import ONNX_OPSET


def _onnx(op_type: str, inputs: tuple[Tensor | None, ...], attributes: dict, like: Tensor, shape=None) -> Tensor:
    return torch.onnx.ops.symbolic(
        op_type, inputs, attributes, dtype=like.dtype, shape=shape or like.shape, version=ONNX_OPSET
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNormalization over the last axis, computed in fp32, result in x's dtype; a single kernel on a GPU."""
    if torch.onnx.is_in_onnx_export():
        return _onnx("RMSNormalization", (x, weight), {"axis": -1, "epsilon": eps, "stash_type": 1}, like=x)
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x [B, S, heads * D] with cos, sin [B, S, D/2].

    Pairs are the two halves of a head (i, i + D/2), or neighbours (2i, 2i + 1) if interleaved.
    """
    if torch.onnx.is_in_onnx_export():
        return _onnx("RotaryEmbedding", (x, cos, sin), {"num_heads": heads, "interleaved": int(interleaved)}, like=x)
    first, second = x.unflatten(-1, (heads, -1, 2) if interleaved else (heads, 2, -1)).unbind(-1 if interleaved else -2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1 if interleaved else -2)
    return rotated.flatten(-3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] → [B, heads, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def write_cache(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """Writes update [B, H, S, D] into cache [B, H, C, D], row b from slot write_indices[b] on: TensorScatter.

    Outside an export the cache is updated in place and returned.
    """
    if torch.onnx.is_in_onnx_export():
        return _onnx("TensorScatter", (cache, update, write_indices), {"axis": -2, "mode": "linear"}, like=cache)
    B, H, S, _ = update.shape
    rows = torch.arange(B, device=cache.device)[:, None, None]
    heads = torch.arange(H, device=cache.device)[:, None]
    slots = write_indices[:, None, None] + torch.arange(S, device=cache.device)
    cache[rows, heads, slots] = update.to(cache.dtype)  # through a transposed view, torch.compile would copy the cache
    return cache


def gather_rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows of cache [B, H, C, D] at slots [B, N], the same for all heads → [B, H, N, D].

    Slots outside [0, C) read its ends.
    """
    slots = slots.clamp(0, cache.shape[2] - 1)
    if torch.onnx.is_in_onnx_export():
        B, H, _, D = cache.shape
        indices = slots[:, None, :, None].expand(B, H, slots.shape[1], 1)
        return _onnx("GatherND", (cache, indices), {"batch_dims": 2}, like=cache, shape=(B, H, slots.shape[1], D))
    return cache.gather(2, slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3]))


def dense_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_lengths: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention over the whole cache: q [B, Hq, S, D], caches [B, Hkv, C, D] → [B, Hq, S, D].

    Query t of row b stands at position kv_lengths[b] - S + t and sees the slots up to its own.
    """
    if torch.onnx.is_in_onnx_export():
        inputs = (q, k_cache, v_cache, None, None, None, kv_lengths)
        return _onnx("Attention", inputs, {"is_causal": 1, "scale": scale}, like=q)
    S, C = q.shape[2], k_cache.shape[2]
    grouped = q.shape[1] != k_cache.shape[1]
    if S == C:  # a call without past: row t sees slots 0..t
        return F.scaled_dot_product_attention(q, k_cache, v_cache, is_causal=True, scale=scale, enable_gqa=grouped)
    positions = kv_lengths[:, None] - S + torch.arange(S, device=q.device)
    visible = torch.arange(C, device=q.device) <= positions[:, None, :, None]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=visible, scale=scale, enable_gqa=grouped)


def visible_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Grouped-query attention of each query to the rows that it may see, at least one.

    q [B, Hq, S, D], k and v [B, Hkv, N, D], visible [B, S, N] bool → [B, Hq, S, D].
    """
    mask = visible[:, None]
    if torch.onnx.is_in_onnx_export():
        return _onnx("Attention", (q, k, v, mask), {"scale": scale}, like=q)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
