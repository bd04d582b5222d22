"""dsa::IndexTopK: contract, torch forms and ONNX function body, side by side.

Shapes: B batch, S query tokens, C cache capacity, Hi indexer heads, Di indexer head size, K = k.

    index_q        [B, S, Hi, Di]  fp32 | fp16 | bf16, rotated
    index_weights  [B, S, Hi]      same dtype; the scale Hi^-1/2 Di^-1/2 is already in it
    index_k        [B, C, Di]      same dtype; one key per token, shared by the heads, rotated at its own position
    kv_lengths     [B]             int64; query t of row b stands at position kv_lengths[b] - S + t
    indices        [B, S, K]       int32; the order inside a row is free, -1 fills what is not selected

Score: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]) over the visible keys s <= position of t. (DeepSeek-V3.2, eq. 1.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.registry import PLUGIN_ATTRIBUTES

SCORE_BYTES = 256 * 2**20
"""Upper bound of the scores that the torch form holds at a time; longer inputs are cut into tiles of query tokens."""

# Dot products are rounded to the input type; ReLU, weights and sum are fp32, as in the torch form. With a single query
# the keys stand on the left: CPU libraries repack the right operand, and the keys are large where the query is small.
FUNCTION_BODY = """
IndexTopK <k, plugin_version, plugin_namespace>
    (index_q, index_weights, index_k, kv_lengths) => (indices)
{
    zero = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    Di = Shape <start = 3, end = 4> (index_q)
    rows_shape = Concat <axis = 0> (zero, minus_one, Di)
    rows = Reshape (index_q, rows_shape)
    weights_f = Cast <to = 1> (index_weights)

    zero_s = Constant <value_int = 0> ()
    one_s = Constant <value_int = 1> ()
    S_1 = Shape <start = 1, end = 2> (index_q)
    S = Squeeze (S_1)
    C_1 = Shape <start = 1, end = 2> (index_k)
    C = Squeeze (C_1)

    decoding = Equal (S, one_s)
    scores = If (decoding) <
        then_branch = one_query () => (float[B, S, C] one_query_scores)
        {
            columns = Transpose <perm = [0, 2, 1]> (rows)
            dots = MatMul (index_k, columns)
            activations = Relu (dots)
            by_slot = Cast <to = 1> (activations)
            weights_column = Transpose <perm = [0, 2, 1]> (weights_f)
            score_column = MatMul (by_slot, weights_column)
            one_query_scores = Transpose <perm = [0, 2, 1]> (score_column)
        },
        else_branch = many_queries () => (float[B, S, C] many_queries_scores)
        {
            keys = Transpose <perm = [0, 2, 1]> (index_k)
            dots = MatMul (rows, keys)
            activations = Relu (dots)
            B_S_Hi = Shape <start = 0, end = 3> (index_q)
            head_shape = Concat <axis = 0> (B_S_Hi, minus_one)
            by_head = Reshape (activations, head_shape)
            by_head_f = Cast <to = 1> (by_head)
            weights_row = Unsqueeze (weights_f, two)
            score_row = MatMul (weights_row, by_head_f)
            many_queries_scores = Squeeze (score_row, two)
        }
    >
    past = Sub (kv_lengths, S_1)
    past_column = Unsqueeze (past, minus_one)
    steps = Range (zero_s, S, one_s)
    positions_row = Add (past_column, steps)
    positions = Unsqueeze (positions_row, minus_one)
    slots = Range (zero_s, C, one_s)
    visible = LessOrEqual (slots, positions)
    lowest = Constant <value_float = -3.4e38> ()
    masked = Where (visible, scores, lowest)
    k_s = Constant <value_int : int = @k> ()
    k_1 = Unsqueeze (k_s, zero)
    best, best_slots = TopK <axis = -1, largest = 1, sorted = 0> (masked, k_1)
    selected = LessOrEqual (best_slots, positions)
    chosen = Where (selected, best_slots, minus_one)
    indices = Cast <to = 6> (chosen)
}
"""


def index_topk_reference(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    """The definition, one query at a time in fp32: slow, and obviously right."""
    B, S = index_q.shape[:2]
    C = index_k.shape[1]
    indices = torch.full((B, S, k), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(S):
            position = int(kv_lengths[b]) - S + t
            scores = []
            for s in range(min(position + 1, C)):
                per_head = torch.relu(index_q[b, t].float() @ index_k[b, s].float())
                scores.append((-float(per_head @ index_weights[b, t].float()), s))
            for slot, (_, s) in enumerate(sorted(scores)[:k]):
                indices[b, t, slot] = s
    return indices


def index_scores(index_q: Tensor, index_weights: Tensor, index_k: Tensor) -> Tensor:
    """I[t, s] for every query and key, without the causal bound: [B, S, C] fp32."""
    activations = torch.relu(torch.einsum("bshd,bcd->bshc", index_q, index_k))
    return torch.einsum("bsh,bshc->bsc", index_weights.float(), activations.float())


def topk_lowest_index_first(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries along the last axis, ascending; equal entries: lower index first.

    torch.topk leaves the choice among equal entries open; ReLU makes equal scores (exact zeros) common.
    """
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= room))
    return keep.nonzero()[:, -1].view(*scores.shape[:-1], k)


def index_topk(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    """Selects, for every query token, the k visible keys of highest index score. Shapes: see the top of this file.

    In torch, k may exceed C (the row is padded with -1); the exported graph needs C >= k. CUDA tensors go to the GPU
    kernels, which have narrower limits (`check_cuda`); there is no slower path to fall back to.
    Raises ValueError for k < 1 and for arguments that do not fit the shape table or the kernels.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    B, S = index_q.shape[:2]
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "dsa::IndexTopK",
            (index_q, index_weights, index_k, kv_lengths),
            {"k": k, **PLUGIN_ATTRIBUTES},
            dtype=torch.int32,
            shape=(B, S, k),
            version=1,
        )
    check(index_q, index_weights, index_k, kv_lengths)
    return torch.ops.dsa.index_topk(index_q, index_weights, index_k, kv_lengths, k)


def check(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor) -> None:
    """Raises ValueError unless the arguments fit the table at the top of this file."""
    tensors = {"index_weights": index_weights, "index_k": index_k, "kv_lengths": kv_lengths}
    found = f"index_q {tuple(index_q.shape)}" + "".join(f", {name} {tuple(t.shape)}" for name, t in tensors.items())
    if (index_q.ndim, index_weights.ndim, index_k.ndim, kv_lengths.ndim) != (4, 3, 3, 1):
        need = "index_q [B, S, Hi, Di], index_weights [B, S, Hi], index_k [B, C, Di], kv_lengths [B]"
        raise ValueError(f"need {need}; got {found}")
    B, S, Hi, Di = index_q.shape
    if index_weights.shape != (B, S, Hi) or index_k.shape[::2] != (B, Di) or len(kv_lengths) != B:
        raise ValueError(f"B, S, Hi, Di differ between the arguments: {found}")
    if not index_q.is_floating_point() or not index_q.dtype == index_weights.dtype == index_k.dtype:
        raise ValueError(
            "index_q, index_weights and index_k must have one floating-point dtype, got "
            f"{index_q.dtype}, {index_weights.dtype}, {index_k.dtype}"
        )
    if kv_lengths.dtype != torch.int64:
        raise ValueError(f"kv_lengths must be int64, got {kv_lengths.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != index_q.device:
            raise ValueError(f"{name} is on {tensor.device}, index_q on {index_q.device}")


def check_cuda(index_q: Tensor, C: int, k: int) -> None:
    """Raises ValueError for what the GPU kernels do not support."""
    from plugins.index_topk import kernel

    Hi, Di = index_q.shape[2:]
    if index_q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"index_topk on a GPU needs fp32, fp16 or bf16, got {index_q.dtype}")
    if Di not in kernel.HEAD_SIZES:
        sizes = " or ".join(map(str, kernel.HEAD_SIZES))
        raise ValueError(f"index_topk on a GPU needs an indexer head size of {sizes}, got {Di}")
    if Hi > kernel.MAX_HEADS:
        raise ValueError(f"index_topk on a GPU takes at most {kernel.MAX_HEADS} indexer heads, got {Hi}")
    if k > kernel.MAX_K:
        raise ValueError(f"index_topk on a GPU takes k up to {kernel.MAX_K}, got {k}")
    if C > kernel.MAX_CAPACITY:
        raise ValueError(f"index_topk on a GPU takes a capacity up to {kernel.MAX_CAPACITY}, got {C}")


@torch.library.custom_op("dsa::index_topk", mutates_args=(), device_types="cpu")
def _index_topk(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    return index_topk_torch(index_q, index_weights, index_k, kv_lengths, k)


@_index_topk.register_kernel("cuda")
def _(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    from plugins.index_topk import kernel

    check_cuda(index_q, index_k.shape[1], k)
    q, weights, keys, lengths = (t.contiguous() for t in (index_q, index_weights, index_k, kv_lengths))
    with torch.cuda.device_of(q):
        return kernel.index_topk(q, weights, keys, lengths, k)


@_index_topk.register_fake
def _(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    return index_q.new_empty(*index_q.shape[:2], k, dtype=torch.int32)


def index_topk_torch(index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, k: int) -> Tensor:
    """The torch form, on any device: tiles of query tokens, scores of a tile in memory."""
    B, S, Hi = index_q.shape[:3]
    C = index_k.shape[1]
    slots = torch.arange(C, device=index_q.device)
    tile = max(1, SCORE_BYTES // max(B * Hi * C * 4, 1))
    tiles = []
    for start in range(0, S, tile):
        stop = min(start + tile, S)
        scores = index_scores(index_q[:, start:stop], index_weights[:, start:stop], index_k)
        positions = (kv_lengths[:, None] - S + torch.arange(start, stop, device=index_q.device))[..., None]
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN ranks highest
        scores = scores.masked_fill(slots > positions, -torch.inf)
        best = topk_lowest_index_first(scores, min(k, C))
        tiles.append(torch.where(best <= positions, best, -1).to(torch.int32))
    indices = torch.cat(tiles, dim=1)
    return torch.nn.functional.pad(indices, (0, k - indices.shape[-1]), value=-1)
