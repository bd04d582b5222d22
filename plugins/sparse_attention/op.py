"""dsa::SparseAttention: contract, torch forms and ONNX function body, side by side.

Shapes: B batch, S query tokens, C cache capacity, Hq/Hkv query/KV heads (group G = Hq / Hkv), D head size, K = k.

    q           [B, Hq, S, D]   fp32 | fp16 | bf16, rotated
    k_cache     [B, Hkv, C, D]  same dtype
    v_cache     [B, Hkv, C, D]  same dtype
    indices     [B, S, K]       int32, one set per query token, shared by all heads; an entry outside [0, C) is skipped,
                                an entry that stands twice counts twice
    output      [B, Hq, S, D]   same dtype; a row without any valid index is 0

Only the K selected rows enter the matrix products (but see FUNCTION_BODY for short caches). Softmax in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plugins import UnsupportedOnGPU
from plugins.registry import PLUGIN_ATTRIBUTES, shapes

GATHER_BYTES = 128 * 2**20
"""Upper bound of the gathered K and V rows that the torch form holds at a time (tiles of query tokens)."""

EIGHTH = 0.125

# A skipped entry reads row 0 in its place, which must be finite (the first token writes it), and gets probability 0.
# Where many queries select from few slots, the gathered copies cost more than the products that they save: the dense
# operator then runs under a mask, the logarithm of how often each slot was selected, and all rows must be finite. Up to
# C = 4 K it is the faster for 64 queries and more, for a single one up to K / 16 (measured in ONNX Runtime).
# The branches' outputs are fp32, because the text of a function must name their type.
FUNCTION_BODY = """
SparseAttention <scale, plugin_version, plugin_namespace>
    (q, k_cache, v_cache, indices) => (output)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    sixteen = Constant <value_int = 16> ()
    one_1 = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    same = Constant <value_ints = [0, 0]> ()
    Hkv = Shape <start = 1, end = 2> (k_cache)
    D = Shape <start = 3, end = 4> (k_cache)
    per_head_shape = Concat <axis = 0> (Hkv, one_1, one_1, one_1)
    by_head_shape = Concat <axis = 0> (same, Hkv, minus_one, D)
    tokens_shape = Concat <axis = 0> (same, minus_one, D)

    slots = Cast <to = 7> (indices)
    C_1 = Shape <start = 2, end = 3> (k_cache)
    C = Squeeze (C_1)
    last = Sub (C, one)
    inside = Clip (slots, zero, last)
    valid = Equal (slots, inside)
    readable = Where (valid, slots, zero)

    C_16 = Mul (C, sixteen)
    S_K = Shape <start = 1, end = 3> (indices)
    limits = Constant <value_ints = [64, 4611686018427387904]> ()
    limited = Min (S_K, limits)
    limit = ReduceProd <keepdims = 0> (limited)
    mask_is_cheaper = LessOrEqual (C_16, limit)
    output_f = If (mask_is_cheaper) <
        then_branch = masked () => (float[B, Hq, S, D] masked_output)
        {
            B_S = Shape <start = 0, end = 2> (indices)
            counts_shape = Concat <axis = 0> (B_S, C_1)
            none = ConstantOfShape (counts_shape)
            ones = Cast <to = 1> (valid)
            counts = ScatterElements <axis = -1, reduction = "add"> (none, readable, ones)
            bias = Log (counts)
            head_axis = Constant <value_ints = [1]> ()
            bias_row = Unsqueeze (bias, head_axis)
            mask = CastLike (bias_row, q)
            attended = Attention <scale : float = @scale> (q, k_cache, v_cache, mask)
            attended_f = Cast <to = 1> (attended)
            most = ReduceMax <keepdims = 1> (ones, minus_one)
            some = Cast <to = 9> (most)
            some_row = Unsqueeze (some, head_axis)
            nothing = Constant <value_float = 0.0> ()
            masked_output = Where (some_row, attended_f, nothing)
        },
        else_branch = gathered () => (float[B, Hq, S, D] gathered_output)
        {
            column_axes = Constant <value_ints = [1, 4]> ()
            column = Unsqueeze (readable, column_axes)
            per_head = Expand (column, per_head_shape)
            k_selected = GatherND <batch_dims = 2> (k_cache, per_head)
            v_selected = GatherND <batch_dims = 2> (v_cache, per_head)

            q_tokens = Transpose <perm = [0, 2, 1, 3]> (q)
            q_by_head = Reshape (q_tokens, by_head_shape)
            q_grouped = Transpose <perm = [0, 2, 1, 3, 4]> (q_by_head)
            eighth_f = Constant <value_float = 0.125> ()
            eighth = CastLike (eighth_f, q)
            q_eighth = Mul (q_grouped, eighth)
            k_transposed = Transpose <perm = [0, 1, 2, 4, 3]> (k_selected)
            dots = MatMul (q_eighth, k_transposed)
            dots_f = Cast <to = 1> (dots)
            scale_f = Constant <value_float : float = @scale> ()
            rest = Div (scale_f, eighth_f)
            scores = Mul (dots_f, rest)
            row_axes = Constant <value_ints = [1, 3]> ()
            valid_row = Unsqueeze (valid, row_axes)
            lowest = Constant <value_float = -3.4e38> ()
            masked = Where (valid_row, scores, lowest)
            softmax = Softmax <axis = -1> (masked)
            zero_f = Constant <value_float = 0.0> ()
            probabilities_f = Where (valid_row, softmax, zero_f)
            probabilities = CastLike (probabilities_f, q)
            o_grouped = MatMul (probabilities, v_selected)
            o_by_head = Transpose <perm = [0, 2, 1, 3, 4]> (o_grouped)
            o_tokens = Reshape (o_by_head, tokens_shape)
            o = Transpose <perm = [0, 2, 1, 3]> (o_tokens)
            gathered_output = Cast <to = 1> (o)
        }
    >
    output = CastLike (output_f, q)
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
    """Attention of every query token over its selected rows. Shapes: see the top of this file.

    Differentiable in q, k_cache and v_cache. CUDA tensors go to the GPU kernels, which have narrower limits
    (`check_cuda`); there is no slower path to fall back to.
    Raises ValueError for arguments that do not fit the shape table or the kernels.
    """
    Hq, Hkv = q.shape[1], k_cache.shape[1]
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
    if not q.dtype == k_cache.dtype == v_cache.dtype and torch.is_autocast_enabled(q.device.type):
        # In a call without cache: what was rotated is fp32, the values are not.
        q, k_cache, v_cache = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k_cache, v_cache))
    check(q, k_cache, v_cache, indices)
    return torch.ops.dsa.sparse_attention(q, k_cache, v_cache, indices, float(scale))


def check(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor) -> None:
    """Raises ValueError unless the arguments fit the table at the top of this file."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "indices": indices}
    if (q.ndim, k_cache.ndim, v_cache.ndim, indices.ndim) != (4, 4, 4, 3):
        raise ValueError(
            f"need q [B, Hq, S, D], k_cache and v_cache [B, Hkv, C, D], indices [B, S, K]; got {shapes(tensors)}"
        )
    B, _, S, D = q.shape
    if k_cache.shape != v_cache.shape or k_cache.shape[::3] != (B, D) or indices.shape[:2] != (B, S):
        raise ValueError(f"B, S, Hkv, C, D differ between the arguments: {shapes(tensors)}")
    if not q.is_floating_point() or not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            "q, k_cache and v_cache must have one floating-point dtype, got "
            f"{q.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if indices.dtype != torch.int32:
        raise ValueError(f"indices must be int32, got {indices.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")


def check_cuda(q: Tensor, k_cache: Tensor, indices: Tensor) -> None:
    """Raises UnsupportedOnGPU for what the GPU kernels do not support."""
    from plugins.sparse_attention import kernel

    B, Hq, S, D = q.shape
    Hkv, C = k_cache.shape[1:3]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedOnGPU(f"sparse_attention on a GPU needs fp32, fp16 or bf16, got {q.dtype}")
    if D % kernel.HEAD_SIZE_STEP or not kernel.MIN_HEAD_SIZE <= D <= kernel.MAX_HEAD_SIZE:
        sizes = f"{kernel.MIN_HEAD_SIZE} to {kernel.MAX_HEAD_SIZE}, a multiple of {kernel.HEAD_SIZE_STEP}"
        raise UnsupportedOnGPU(f"sparse_attention on a GPU needs a head size of {sizes}, got {D}")
    if Hq // Hkv > kernel.MAX_GROUP:
        limit = f"at most {kernel.MAX_GROUP} query heads per KV head"
        raise UnsupportedOnGPU(f"sparse_attention on a GPU takes {limit}, got {Hq // Hkv}")
    if not 1 <= indices.shape[-1] <= kernel.MAX_K:
        limit = f"1 to {kernel.MAX_K} indices per token"
        raise UnsupportedOnGPU(f"sparse_attention on a GPU takes {limit}, got {indices.shape[-1]}")
    if C > kernel.MAX_CAPACITY:
        raise UnsupportedOnGPU(f"sparse_attention on a GPU takes a capacity up to {kernel.MAX_CAPACITY}, got {C}")
    if B * S > kernel.MAX_TOKENS:
        raise UnsupportedOnGPU(
            f"sparse_attention on a GPU takes up to {kernel.MAX_TOKENS} query tokens a call, got {B * S}"
        )


@torch.library.custom_op("dsa::sparse_attention", mutates_args=(), device_types="cpu")
def _sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    return sparse_attention_torch(q, k_cache, v_cache, indices, scale)


@_sparse_attention.register_kernel("cuda")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    from plugins.sparse_attention import kernel

    check_cuda(q, k_cache, indices)
    q, k_cache, v_cache, indices = (t.contiguous() for t in (q, k_cache, v_cache, indices))
    with torch.cuda.device_of(q):
        return kernel.sparse_attention(q, k_cache, v_cache, indices, scale)


@_sparse_attention.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Gradients of the torch form, recomputed tile by tile: no tile's gathered rows outlive it."""
    q, k_cache, v_cache, indices = ctx.saved_tensors
    q_gradient = torch.zeros_like(q)
    k_gradient, v_gradient = (torch.zeros_like(cache, dtype=torch.float32) for cache in (k_cache, v_cache))
    for tile in _tiles(q, k_cache, indices.shape[-1]):
        with torch.enable_grad():
            q_leaf, k_leaf, v_leaf = (t.detach().requires_grad_() for t in (q[:, :, tile], k_cache, v_cache))
            output = _attend(q_leaf, k_leaf, v_leaf, indices[:, tile], ctx.scale)
        q_part, k_part, v_part = torch.autograd.grad(output, (q_leaf, k_leaf, v_leaf), gradient[:, :, tile])
        q_gradient[:, :, tile] = q_part
        k_gradient += k_part
        v_gradient += v_part
    return q_gradient, k_gradient.to(q.dtype), v_gradient.to(q.dtype), None, None


_sparse_attention.register_autograd(_backward, setup_context=_save)


def sparse_attention_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    """The torch form, on any device: tiles of query tokens, gathered rows of a tile in memory."""
    tiles = _tiles(q, k_cache, indices.shape[-1])
    if not tiles:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    return torch.cat([_attend(q[:, :, t], k_cache, v_cache, indices[:, t], scale) for t in tiles], dim=2)


def scaled_dots(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ in fp32. An eighth of q is exact in 16 bits, and keeps products within fp16 that the scale would."""
    return ((q * EIGHTH) @ k.transpose(-1, -2)).float() * (scale / EIGHTH)


def _tiles(q: Tensor, k_cache: Tensor, K: int) -> list[slice]:
    """Of the query tokens; none where there is nothing to attend to."""
    B, Hkv, C, D = k_cache.shape
    S = q.shape[2] if C else 0
    tile = max(1, GATHER_BYTES // max(2 * B * Hkv * K * D * q.element_size(), 1))
    return [slice(start, min(start + tile, S)) for start in range(0, S, tile)]


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
    q_BSHGD = q.reshape(B, Hkv, Hq // Hkv, S, D).permute(0, 3, 1, 2, 4)
    scores = scaled_dots(q_BSHGD, k_BSHKD, scale)
    valid_row = valid[:, :, None, None, :]
    probabilities = torch.softmax(scores.masked_fill(~valid_row, torch.finfo(torch.float32).min), dim=-1)
    probabilities = probabilities.masked_fill(~valid_row, 0).to(q.dtype)
    return (probabilities @ v_BSHKD).permute(0, 2, 3, 1, 4).reshape(B, Hq, S, D)
