"""dsa::IndexTopK: contract, torch forms and ONNX function body, side by side.

Shapes: B batch, S query tokens, C cache capacity, Hi indexer heads, Di indexer head size, K = k, m = pool,
G key rows, at least C / m.

    index_q        [B, S, Hi, Di]  fp32 | fp16 | bf16, rotated; int8 in -63 .. 63 with keys in uint8
    index_weights  [B, S, Hi]      same dtype, fp32 beside int8; the scale Hi^-1/2 Di^-1/2 is already in it
    index_k        [B, G, Di]      same dtype, or fp8 e4m3, or uint8, of which 128 is zero; one key per m tokens,
                                   shared by the heads, rotated
    kv_lengths     [B]             int64; query t of row b stands at position p = kv_lengths[b] - S + t
    index_scale    [B, G]          fp32 > 0, given exactly with keys in 8 bits, which it multiplies
    indices        [B, S, K]       int32; the order inside a row is free, -1 fills what is not selected

Score: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]) over the visible keys s <= p. (DeepSeek-V3.2, eq. 1.)

In uint8 the dot products are exact integers, below 2^24 and so exact in fp32 too. (Queries of 7 bits: sums of two
products fit 16 bits then, which the fast byte instructions of AVX2 need, and keys are unsigned for their sake.)

Always selected, before any score, and counted in k: the first `sinks` tokens and the last `window` ones.
With pool = m > 1, row g of index_k is the mean of the keys of tokens g m .. g m + m - 1, and whole groups are
selected, K / m of them, expanded to their visible tokens: the complete ones by score, the incomplete last one always; a
group with a token that is always selected is always selected.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from plugins import UnsupportedOnGPU
from plugins.registry import PLUGIN_ATTRIBUTES, shapes

SCORE_BYTES = 256 * 2**20
"""Upper bound of the scores that the torch form holds at a time; longer inputs are cut into tiles of query tokens."""

# With no row longer than k everything visible is selected, and nothing is scored. (The width of what the branches give
# has no name: ONNX Runtime takes dimensions of one name for equal, and k may differ by layer.)
# Dot products are rounded to the input type; ReLU, weights and sum are fp32, as in the torch form. With a single query
# the keys stand on the left: CPU libraries repack the right operand, and the keys are large where the query is small.
FUNCTION_BODY = """
IndexTopK <{attributes}>
    ({inputs}) => (indices)
{{
    zero = Constant <value_ints = [0]> ()
    minus_one = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    zero_s = Constant <value_int = 0> ()
    one_s = Constant <value_int = 1> ()
    S_1 = Shape <start = 1, end = 2> (index_q)
    S = Squeeze (S_1)

    past = Sub (kv_lengths, S_1)
    past_column = Unsqueeze (past, minus_one)
    steps = Range (zero_s, S, one_s)
    positions_row = Add (past_column, steps)
    positions = Unsqueeze (positions_row, minus_one)

    k_s = Constant <value_int : int = @k> ()
    longest = ReduceMax <keepdims = 0> (kv_lengths)
    all_fit = LessOrEqual (longest, k_s)
    chosen = If (all_fit) <
        then_branch = everything () => (int64[B, S, ?] all_tokens)
        {{
            first_k = Range (zero_s, k_s, one_s)
            seen = LessOrEqual (first_k, positions)
            all_tokens = Where (seen, first_k, minus_one)
        }},
        else_branch = the_best () => (int64[B, S, ?] best_or_nothing)
        {{
            Di = Shape <start = 3, end = 4> (index_q)
            rows_shape = Concat <axis = 0> (zero, minus_one, Di)
            rows = Reshape (index_q, rows_shape)
            weights_f = Cast <to = 1> (index_weights)
            G_1 = Shape <start = 1, end = 2> (index_k)
            G = Squeeze (G_1)
            slots = Range (zero_s, G, one_s)
            decoding = Equal (S, one_s)
            dot_scores = If (decoding) <
                then_branch = one_query () => (float[B, S, G] one_query_scores)
                {{
                    columns = Transpose <perm = [0, 2, 1]> (rows)
                {one_query_dots}
                    activations = Relu (dots)
                    by_slot = Cast <to = 1> (activations)
                    weights_column = Transpose <perm = [0, 2, 1]> (weights_f)
                    score_column = MatMul (by_slot, weights_column)
                    one_query_scores = Transpose <perm = [0, 2, 1]> (score_column)
                }},
                else_branch = many_queries () => (float[B, S, G] many_queries_scores)
                {{
                {many_queries_dots}
                    activations = Relu (dots)
                    B_S_Hi = Shape <start = 0, end = 3> (index_q)
                    head_shape = Concat <axis = 0> (B_S_Hi, minus_one)
                    by_head = Reshape (activations, head_shape)
                    by_head_f = Cast <to = 1> (by_head)
                    weights_row = Unsqueeze (weights_f, two)
                    score_row = MatMul (weights_row, by_head_f)
                    many_queries_scores = Squeeze (score_row, two)
                }}
            >
        {rank}
            lowest = Constant <value_float = -3.4e38> ()
            masked = Where (visible, scores, lowest)
            k_1 = Unsqueeze (k_s, zero)
        {choose}
            selected = LessOrEqual (best_tokens, positions)
            best_or_nothing = Where (selected, best_tokens, minus_one)
        }}
    >
    indices = Cast <to = 6> (chosen)
}}
"""

ONE_QUERY_DOTS = {
    "model": "dots = MatMul (index_k, columns)",
    "fp8": """
        keys = CastLike (index_k, index_q)
        dots = MatMul (keys, columns)
    """,
    "int8": """
        zero_key = Constant <value = uint8 {128}> ()
        sums = MatMulInteger (index_k, columns, zero_key)
        dots = Cast <to = 1> (sums)
    """,
}
MANY_QUERIES_DOTS = {
    "model": """
        key_columns = Transpose <perm = [0, 2, 1]> (index_k)
        dots = MatMul (rows, key_columns)
    """,
    "fp8": """
        keys = CastLike (index_k, index_q)
        key_columns = Transpose <perm = [0, 2, 1]> (keys)
        dots = MatMul (rows, key_columns)
    """,
    "int8": """
        zero_key = Constant <value_float = 128.0> ()
        shifted = Cast <to = 1> (index_k)
        keys = Sub (shifted, zero_key)
        key_columns = Transpose <perm = [0, 2, 1]> (keys)
        rows_f = Cast <to = 1> (rows)
        dots = MatMul (rows_f, key_columns)
    """,
}
SCALED = """
    scale_row = Unsqueeze (index_scale, one)
    key_scores = Mul (dot_scores, scale_row)
"""
RANK_TOKENS = """
    visible = LessOrEqual (slots, positions)
    scores = Identity ({key_scores})
"""
CHOOSE_TOKENS = """
    best, best_tokens = TopK <axis = -1, largest = 1, sorted = 0> (masked, k_1)
"""
RANK_GROUPS = """
    sinks_s = Constant <value_int : int = @sinks> ()
    window_s = Constant <value_int : int = @window> ()
    pool_s = Constant <value_int : int = @pool> ()
    first_tokens = Mul (slots, pool_s)
    next_tokens = Add (first_tokens, pool_s)
    visible = LessOrEqual (first_tokens, positions)
    sink = Less (first_tokens, sinks_s)
    recent_from = Sub (positions, window_s)
    past_end = Add (recent_from, one_s)
    recent = Greater (next_tokens, past_end)
    always = Or (sink, recent)
    highest = Constant <value_float = 3.4e38> ()
    scores = Where (always, highest, {key_scores})
"""
CHOOSE_GROUPS = """
    pool_1 = Unsqueeze (pool_s, zero)
    groups = Div (k_1, pool_1)
    best, best_groups = TopK <axis = -1, largest = 1, sorted = 0> (masked, groups)
    best_first = Mul (best_groups, pool_s)
    best_column = Unsqueeze (best_first, minus_one)
    offsets = Range (zero_s, pool_s, one_s)
    best_rows = Add (best_column, offsets)
    flat = Constant <value_ints = [0, 0, -1]> ()
    best_tokens = Reshape (best_rows, flat)
"""


def function_body(options: bool, keys: str) -> str:
    """The operator in standard ONNX operators. options: with sinks, window and pool; keys: model, fp8 or int8."""
    scaled = keys != "model"
    names = ["k", *(["sinks", "window", "pool"] if options else []), *PLUGIN_ATTRIBUTES]
    inputs = ["index_q", "index_weights", "index_k", "kv_lengths", *(["index_scale"] if scaled else [])]
    key_scores = "key_scores" if scaled else "dot_scores"
    return FUNCTION_BODY.format(
        attributes=", ".join(names),
        inputs=", ".join(inputs),
        one_query_dots=ONE_QUERY_DOTS[keys],
        many_queries_dots=MANY_QUERIES_DOTS[keys],
        rank=(SCALED if scaled else "") + (RANK_GROUPS if options else RANK_TOKENS).format(key_scores=key_scores),
        choose=CHOOSE_GROUPS if options else CHOOSE_TOKENS,
    )


def forced_groups(sinks: int, window: int, pool: int) -> int:
    """The largest number of groups (tokens where pool = 1) that are always selected."""
    return -(-sinks // pool) + (-(-(window - 1) // pool) + 1 if window else int(pool > 1))


def check_options(k: int, sinks: int, window: int, pool: int) -> None:
    """Raises ValueError for options that are out of range or leave no room in k."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if pool < 1 or k % pool:
        raise ValueError(f"pool must be at least 1 and divide k = {k}, got {pool}")
    for name, value in (("sinks", sinks), ("window", window)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    forced = pool * forced_groups(sinks, window, pool)
    if forced > k:
        raise ValueError(f"sinks = {sinks}, window = {window} and pool = {pool} always select {forced} keys: k = {k}")


def index_topk_reference(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
) -> Tensor:
    """The definition, one query at a time in fp32: slow, and obviously right."""
    B, S = index_q.shape[:2]
    G = index_k.shape[1]
    keys = index_k.float() - 128 if index_k.dtype == torch.uint8 else index_k.float()
    if index_scale is not None:
        keys = keys * index_scale[..., None]
    indices = torch.full((B, S, k), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(S):
            position = int(kv_lengths[b]) - S + t
            ranked = []
            for g in range(min(position // pool + 1, G)):
                tokens = range(g * pool, (g + 1) * pool)
                always = tokens[0] < sinks or tokens[-1] > position - window or tokens[-1] > position
                per_head = torch.relu(index_q[b, t].float() @ keys[b, g])
                ranked.append((not always, -float(per_head @ index_weights[b, t].float()), g))
            chosen = [g * pool + i for _, _, g in sorted(ranked)[: k // pool] for i in range(pool)]
            visible = [s for s in chosen if s <= position]
            indices[b, t, : len(visible)] = torch.tensor(visible, dtype=torch.int32)
    return indices


def index_scores(index_q: Tensor, index_weights: Tensor, index_k: Tensor, index_scale: Tensor | None = None) -> Tensor:
    """I[t, g] for every query and key, without the causal bound: [B, S, G] fp32."""
    if index_k.dtype == torch.uint8:
        index_q, index_k = index_q.float(), index_k.float() - 128
    activations = torch.relu(torch.einsum("bshd,bcd->bshc", index_q, index_k.to(index_q.dtype)))
    scores = torch.einsum("bsh,bshc->bsc", index_weights.float(), activations.float())
    return scores if index_scale is None else scores * index_scale[:, None]


def topk_lowest_index_first(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest entries along the last axis, ascending; equal entries: lower index first.

    torch.topk leaves the choice among equal entries open; ReLU makes equal scores (exact zeros) common.
    """
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > threshold
    tied = ~(above | (scores < threshold))  # with NaN, which compares as neither, still k are chosen
    room = k - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= room))
    # As many as are known beforehand: a GPU would have to tell, which a CUDA graph cannot wait for.
    chosen = keep.nonzero_static(size=threshold.numel() * k)
    return chosen[:, -1].view(*scores.shape[:-1], k)


def index_topk(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
) -> Tensor:
    """Selects, for every query token, the k visible keys of highest index score. Shapes: see the top of this file.

    In torch, k may exceed C (the row is padded with -1); the exported graph needs C >= k. CUDA tensors go to the GPU
    kernels, which have narrower limits (`check_cuda`); there is no slower path to fall back to.
    Raises ValueError for options that exclude each other and for arguments that do not fit the shape table or the
    kernels.
    """
    check_options(k, sinks, window, pool)
    B, S = index_q.shape[:2]
    if torch.onnx.is_in_onnx_export():
        inputs = [index_q, index_weights, index_k, kv_lengths]
        options = {"sinks": sinks, "window": window, "pool": pool} if (sinks, window, pool) != (0, 0, 1) else {}
        return torch.onnx.ops.symbolic(
            "dsa::IndexTopK",
            inputs if index_scale is None else [*inputs, index_scale],
            {"k": k, **options, **PLUGIN_ATTRIBUTES},
            dtype=torch.int32,
            shape=(B, S, k),
            version=1,
        )
    check(index_q, index_weights, index_k, kv_lengths, index_scale)
    return torch.ops.dsa.index_topk(index_q, index_weights, index_k, kv_lengths, k, sinks, window, pool, index_scale)


def check(
    index_q: Tensor, index_weights: Tensor, index_k: Tensor, kv_lengths: Tensor, index_scale: Tensor | None = None
) -> None:
    """Raises ValueError unless the arguments fit the table at the top of this file."""
    tensors = {"index_q": index_q, "index_weights": index_weights, "index_k": index_k, "kv_lengths": kv_lengths}
    if (index_q.ndim, index_weights.ndim, index_k.ndim, kv_lengths.ndim) != (4, 3, 3, 1):
        need = "index_q [B, S, Hi, Di], index_weights [B, S, Hi], index_k [B, G, Di], kv_lengths [B]"
        raise ValueError(f"need {need}; got {shapes(tensors)}")
    B, S, Hi, Di = index_q.shape
    if index_weights.shape != (B, S, Hi) or index_k.shape[::2] != (B, Di) or len(kv_lengths) != B:
        raise ValueError(f"B, S, Hi, Di differ between the arguments: {shapes(tensors)}")
    types = (index_q.dtype, index_weights.dtype, index_k.dtype)
    if torch.uint8 in types or torch.int8 in types:
        fitting = types == (torch.int8, torch.float32, torch.uint8)
    else:
        key_dtype = index_q.dtype if index_k.dtype == torch.float8_e4m3fn else index_k.dtype
        fitting = index_q.is_floating_point() and index_q.dtype == index_weights.dtype == key_dtype
    if not fitting:
        raise ValueError(
            "index_q, index_weights and index_k (unless it is float8_e4m3fn) must have one floating-point dtype, or be "
            f"int8, float32 and uint8; got {types[0]}, {types[1]}, {types[2]}"
        )
    if (index_scale is not None) != (index_k.dtype in (torch.float8_e4m3fn, torch.uint8)):
        raise ValueError("index_scale is needed with index_k in float8_e4m3fn or uint8, and only then")
    if index_scale is not None:
        tensors["index_scale"] = index_scale
        if index_scale.shape != index_k.shape[:2] or index_scale.dtype != torch.float32:
            raise ValueError(
                f"index_scale must be [B, G] fp32, got {tuple(index_scale.shape)} {index_scale.dtype} "
                f"beside index_k {tuple(index_k.shape)}"
            )
    if kv_lengths.dtype != torch.int64:
        raise ValueError(f"kv_lengths must be int64, got {kv_lengths.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != index_q.device:
            raise ValueError(f"{name} is on {tensor.device}, index_q on {index_q.device}")


def check_cuda(index_q: Tensor, keys: int, k: int, pool: int = 1) -> None:
    """Raises UnsupportedOnGPU for what the GPU kernels do not support."""
    from plugins.index_topk import plan

    Hi, Di = index_q.shape[2:]
    if index_q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedOnGPU(f"index_topk on a GPU needs queries in fp32, fp16 or bf16, got {index_q.dtype}")
    if Di not in plan.TORCH_HEAD_SIZES:
        sizes = ", ".join(map(str, plan.TORCH_HEAD_SIZES))
        raise UnsupportedOnGPU(f"index_topk on a GPU needs an indexer head size among {sizes}, got {Di}")
    if Hi > plan.MAX_HEADS:
        raise UnsupportedOnGPU(f"index_topk on a GPU takes at most {plan.MAX_HEADS} indexer heads, got {Hi}")
    if k > plan.MAX_K:
        raise UnsupportedOnGPU(f"index_topk on a GPU takes k up to {plan.MAX_K}, got {k}")
    if keys > plan.most_keys(pool):
        limit = f"a capacity up to {plan.MAX_CAPACITY} tokens"
        raise UnsupportedOnGPU(f"index_topk on a GPU takes {limit}, got {keys} keys of {pool} each")


@torch.library.custom_op("dsa::index_topk", mutates_args=(), device_types="cpu")
def _index_topk(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
) -> Tensor:
    """The torch form: tiles of query tokens, scores of a tile in memory."""
    B, S, Hi = index_q.shape[:3]
    G = index_k.shape[1]
    if S == 0:
        return torch.empty(B, 0, k, dtype=torch.int32, device=index_q.device)
    first_tokens = torch.arange(G, device=index_q.device) * pool
    last_tokens = first_tokens + pool - 1
    tile = max(1, SCORE_BYTES // max(B * Hi * G * 4, 1))
    tiles = []
    for start in range(0, S, tile):
        stop = min(start + tile, S)
        scores = index_scores(index_q[:, start:stop], index_weights[:, start:stop], index_k, index_scale)
        positions = (kv_lengths[:, None] - S + torch.arange(start, stop, device=index_q.device))[..., None]
        highest = torch.finfo(torch.float32).max
        scores = scores.nan_to_num(nan=highest, posinf=highest, neginf=-torch.inf)  # NaN ranks highest
        if sinks or window or pool > 1:
            always = (first_tokens < sinks) | (last_tokens > positions - window)  # an incomplete group among them
            scores = scores.masked_fill(always, torch.inf)
        scores = scores.masked_fill(first_tokens > positions, -torch.inf)
        best = topk_lowest_index_first(scores, min(k // pool, G))
        tokens = (best[..., None] * pool + torch.arange(pool, device=best.device)).flatten(-2)
        tiles.append(torch.where(tokens <= positions, tokens, -1).to(torch.int32))
    indices = torch.cat(tiles, dim=1)
    return torch.nn.functional.pad(indices, (0, k - indices.shape[-1]), value=-1)


@_index_topk.register_kernel("cuda")
def _(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
) -> Tensor:
    from plugins.index_topk import kernel

    if index_k.dtype == torch.uint8:  # the kernel reads no such keys; on a GPU they serve to evaluate what CPUs do
        index_q, index_k = index_q.float(), index_k.float() - 128
        index_k, index_scale = index_k * cast(Tensor, index_scale)[..., None], None
    check_cuda(index_q, index_k.shape[1], k, pool)
    q, weights, keys, lengths = (t.contiguous() for t in (index_q, index_weights, index_k, kv_lengths))
    scale = None if index_scale is None else index_scale.contiguous()
    with torch.cuda.device_of(q):
        return kernel.index_topk(q, weights, keys, lengths, k, sinks, window, pool, scale)


@_index_topk.register_fake
def _(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
) -> Tensor:
    return index_q.new_empty(*index_q.shape[:2], k, dtype=torch.int32)
