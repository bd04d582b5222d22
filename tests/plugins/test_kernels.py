"""The kernels against the definition: on the GPU if there is one, else in Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported, so without a GPU this file runs in a process of its own: see
test_interpreter.py.
"""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plugins.index_topk import index_topk as operator_index_topk
from plugins.index_topk import index_topk_reference
from plugins.index_topk.op import forced_groups
from plugins.sparse_attention import sparse_attention as operator_sparse_attention
from tests.plugins.problems import (
    TopK,
    assert_attention,
    assert_selection,
    attention_problem,
    exact_selection,
    sets,
    topk_problem,
)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU; test_interpreter.py runs these tests in Triton's interpreter", allow_module_level=True)

from plugins.dependent import launch_options  # noqa: E402
from plugins.index_topk import kernel as topk_kernel  # noqa: E402
from plugins.index_topk import plan as topk_plan  # noqa: E402
from plugins.sparse_attention import kernel as attention_kernel  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
HEADS = st.one_of(st.integers(1, 16), st.integers(17, topk_plan.MAX_HEADS))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch):
    """torch.empty gives NaN and the largest integers, so that a result that reads what nobody wrote is wrong."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch wants beside it on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def fenced(tensor: Tensor) -> Tensor:
    """The same tensor between two fences of NaN (integers: a wild value), so that reads beyond it show."""
    fence = torch.nan if tensor.is_floating_point() else 2**30
    memory = torch.full((len(tensor) + 2, *tensor.shape[1:]), fence, dtype=tensor.dtype, device=tensor.device)
    memory[1:-1] = tensor
    return memory[1:-1]


def select(problem, index_scale: Tensor | None = None, **options) -> Tensor:
    *tensors, k = problem.arguments()
    scale = None if index_scale is None else fenced(index_scale)
    return topk_kernel.index_topk(*map(fenced, tensors), k, index_scale=scale, **options)


def attend(problem) -> Tensor:
    *tensors, scale = problem.arguments()
    return attention_kernel.sparse_attention(*map(fenced, tensors), scale)


# lengths, S, C, Hi, Di, k
TOPK_SHAPES = [
    ([300, 0, 5], 1, 301, 8, 64, 16),
    ([260, 17], 3, 259, 7, 128, 20),  # above capacity; heads that are no power of two
    ([130], 9, 140, 16, 64, 40),  # prefill
    ([150, 90], 1, 150, 64, 128, 40),  # DeepSeek-V3.2
    ([150], 5, 150, 33, 128, 40),
    ([5000, 4200], 1, 5000, 4, 64, 2048),  # shorter than a list
    ([4500], 2, 4600, 1, 128, 4096),
    ([20000], 1, 20000, 2, 64, 300),  # a threshold from a sample
    ([20001], 1, 20001, 2, 64, 4096),
    ([140], 3, 140, 4, 32, 16),
    ([140], 1, 140, 2, 16, 16),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("shape", TOPK_SHAPES, ids=str)
def test_selection_of_real_numbers(shape, dtype: torch.dtype) -> None:
    problem = topk_problem(*shape, dtype, ties=False, seed=1, device=DEVICE)
    assert_selection(select(problem).cpu(), problem)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_selection_is_exact_where_arithmetic_is(data: st.DataObject) -> None:
    """Random shapes with many equal scores: the same sets as the definition, lower index first."""
    S = data.draw(st.sampled_from([1, 2, 8, 9, 17]), "S")
    C = data.draw(st.integers(1, 400), "C")
    lengths = data.draw(st.lists(st.integers(-2, C + 3), min_size=1, max_size=3), "lengths")
    Hi = data.draw(HEADS, "Hi")
    k = data.draw(st.integers(1, C + 4), "k")
    dtype = data.draw(st.sampled_from([HALF, BFLOAT, FLOAT]), "dtype")
    seed = data.draw(st.integers(0, 999), "seed")
    problem = topk_problem(lengths, S, C, Hi, 64, k, dtype, ties=True, seed=seed, device=DEVICE)
    indices = select(problem).cpu()
    assert_selection(indices, problem)
    assert sets(indices) == exact_selection(problem)


def test_the_definition_agrees_with_the_sets_of_these_tests() -> None:
    problem = topk_problem([40, 7, 0], 3, 40, 5, 64, 9, FLOAT, ties=True, seed=2)
    assert sets(index_topk_reference(*problem.arguments())) == exact_selection(problem)


def problem_with_options(data: st.DataObject) -> tuple[TopK, dict[str, int], Tensor | None]:
    """Many ties, and the scale of fp8 keys or None. Keys and scales of incomplete groups, and beyond, are NaN."""
    sinks, window, pool = (data.draw(st.integers(least, 9), "sinks, window, pool") for least in (0, 0, 1))
    options = {"sinks": sinks, "window": window, "pool": pool}
    K = max(1, forced_groups(**options)) + data.draw(st.integers(0, 8), "free groups")
    G = data.draw(st.integers(1, 150), "rows")
    lengths = data.draw(st.lists(st.integers(-2, G * pool + 3), min_size=1, max_size=2), "lengths")
    S, Hi = data.draw(st.sampled_from([1, 2, 9]), "S"), data.draw(HEADS, "Hi")
    Di, dtype = data.draw(st.sampled_from([64, 128]), "Di"), data.draw(st.sampled_from([HALF, BFLOAT, FLOAT]), "dtype")
    seed = data.draw(st.integers(0, 999), "seed")
    whole = [max(length, 0) // pool for length in lengths]
    problem = topk_problem(whole, S, G, Hi, Di, K * pool, dtype, True, seed, device=DEVICE)
    problem.kv_lengths = torch.tensor(lengths, device=DEVICE)
    if not data.draw(st.booleans(), "fp8"):
        return problem, options, None
    problem.index_k = problem.index_k.to(torch.float8_e4m3fn)
    scale = torch.randint(-1, 2, (len(lengths), G), generator=torch.Generator().manual_seed(seed)).float().exp2()
    for row, groups in zip(scale, whole, strict=True):
        row[groups:] = torch.nan
    return problem, options, scale.to(DEVICE)


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_selection_with_options_is_exact_where_arithmetic_is(data: st.DataObject) -> None:
    """Sinks, window, groups and fp8 keys: the sets of the definition, every token once, ascending, -1 behind."""
    problem, options, scale = problem_with_options(data)
    indices = select(problem, scale, **options).cpu()
    q, weights, keys, lengths, k = (t.cpu() if isinstance(t, Tensor) else t for t in problem.arguments())
    scaled = keys.float() if scale is None else keys.float() * scale.cpu()[..., None]
    # The definition computes the score of an incomplete group, and selects it whatever it is.
    expected = index_topk_reference(q, weights, scaled.nan_to_num(0.0), lengths, k, **options)
    last = 2**30
    assert torch.equal(
        torch.where(indices < 0, last, indices), torch.where(expected < 0, last, expected).sort(-1).values
    )


def test_every_e4m3_number_is_decoded_exactly() -> None:
    """Keys of one number each; the scores are those numbers, NaN first."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for dtype in (HALF, BFLOAT, FLOAT):
        problem = topk_problem([256], 1, 256, 2, 64, 130, dtype, ties=True, seed=1, device=DEVICE)
        problem.index_k = torch.zeros(1, 256, 64).to(torch.float8_e4m3fn)
        problem.index_k[0, :, 0] = numbers
        problem.index_k = problem.index_k.to(DEVICE)
        problem.index_q.zero_()
        problem.index_q[:, :, 0, 0], problem.index_q[:, :, 1, 0] = 1, -1
        problem.index_weights[:, :, 0], problem.index_weights[:, :, 1] = 1, -1  # ReLU(x) - ReLU(-x) = x
        scale = torch.full((1, 256), 0.375, device=DEVICE)
        for k in (3, 130):
            problem.k = k
            values = numbers.float().nan_to_num(nan=torch.inf)
            best = values.argsort(descending=True, stable=True)[:k].tolist()
            assert sets(select(problem, scale).cpu()) == [[set(best)]], (dtype, k)


def test_what_is_always_selected_precedes_nan_scores() -> None:
    """More NaN scores than room: they come behind sinks and window, before all numbers, lower index first."""
    problem = topk_problem([500], 1, 500, 4, 64, 16, HALF, ties=True, seed=8, device=DEVICE)
    problem.index_k[0, 100:120] = torch.nan
    assert select(problem, sinks=2, window=3).cpu()[0, 0].tolist() == [0, 1, *range(100, 111), 497, 498, 499]


def test_groups_in_several_splits_and_tiles() -> None:
    """9,001 groups of 2, of which the last is incomplete; the same with tiles of one row."""
    G, K = 9001, 520
    problem = topk_problem([9000], 2, G, 4, 64, 2 * K, HALF, ties=True, seed=9, device=DEVICE)
    problem.kv_lengths = torch.tensor([18001], device=DEVICE)
    options = {"sinks": 3, "window": 40, "pool": 2}
    indices = select(problem, **options)
    assert topk_plan.plan(1, 2, G, 4, 64, K).splits == 3
    assert torch.equal(select(problem, budget=1, **options), indices)
    assert {0, 1, 2, 3, *range(17960, 18001)} <= set(indices[0, 1].tolist())
    q, weights, keys, lengths, k = (t.cpu() if isinstance(t, Tensor) else t for t in problem.arguments())
    expected = operator_index_topk(q, weights, keys.nan_to_num(0.0), lengths, k, **options)
    assert sets(indices.cpu()) == sets(expected)


@pytest.mark.parametrize("score", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("others", [0, 7])
def test_all_scores_equal(score: float, others: int) -> None:
    """More equal scores than a list holds: the tokens above them, ascending, and then the first of them."""
    C, k = 9000, 33
    problem = topk_problem([C], 1, C, 4, 64, k, HALF, ties=True, seed=3, device=DEVICE)
    problem.index_q.fill_(0)
    problem.index_q[..., 0] = 1
    problem.index_k.fill_(0)
    problem.index_k[..., 0] = abs(score)
    problem.index_weights.fill_(0)
    problem.index_weights[..., 0] = 1 if score >= 0 else -1
    better = range(4093, 4093 + others)
    problem.index_k[0, better.start : better.stop, 0] = 9 if score >= 0 else 0
    indices = select(problem).cpu()
    assert sets(indices) == exact_selection(problem)
    assert indices[0, 0].tolist() == [*better, *range(k - others)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("target", [0, 1, 9000])
def test_a_threshold_that_misses(target: int, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than k tokens above it, or more than a list holds: the whole row is read, and the result is the same."""
    problem = topk_problem([9000, 8200], 1, 9000, 4, 64, 300, HALF, ties=ties, seed=3, device=DEVICE)
    expected = select(problem).cpu()
    assert_selection(expected, problem)
    monkeypatch.setattr(topk_kernel, "target", lambda k: target)
    assert sets(select(problem).cpu()) == sets(expected)


def test_a_list_that_is_full_writes_nothing_behind_its_end() -> None:
    """There its neighbour's begins. All of a row lies above the threshold, half as many again as a list holds."""
    size, listed = 12288, 8192
    keys = torch.arange(size, dtype=torch.int32, device=DEVICE)
    lists = torch.full((2 * listed,), -7, dtype=torch.int32, device=DEVICE)
    counts, threshold = (torch.full((1,), n, dtype=torch.int32, device=DEVICE) for n in (0, -1))
    topk_kernel.filter_kernel[(1, 1)](
        torch.tensor([size], device=DEVICE), keys, lists, counts, threshold, 0, 0, 1, 1, size, 1, listed, 1,
        **topk_kernel.FILTER_OPTIONS, **launch_options(keys.device),
    )  # fmt: skip
    assert counts.item() == size
    assert torch.equal(lists[:listed], keys[:listed]) and (lists[listed:] == -7).all()


@pytest.mark.parametrize(("B", "S", "C"), [(0, 1, 9), (2, 0, 9), (2, 3, 0)])
def test_empty_shapes(B: int, S: int, C: int) -> None:
    problem = topk_problem([0] * B, S, C, 4, 64, 5, HALF, ties=False, seed=1, device=DEVICE)
    *tensors, k = problem.arguments()
    assert topk_kernel.index_topk(*tensors, k).tolist() == [[[-1] * 5] * S] * B
    shapes = (B, 4, S, 64), (B, 2, C, 64), (B, 2, C, 64)
    q, k_cache, v_cache = (torch.ones(shape, dtype=HALF, device=DEVICE) for shape in shapes)
    indices = torch.full((B, S, 3), 1, dtype=torch.int32, device=DEVICE)
    output = attention_kernel.sparse_attention(q, k_cache, v_cache, indices, 1.0)
    assert output.shape == q.shape and (C > 0 or not output.any())


def test_negative_zero_and_denormals_count_as_zero() -> None:
    problem = topk_problem([600], 1, 600, 4, 64, 8, FLOAT, ties=True, seed=4, device=DEVICE)
    problem.index_q.zero_()
    problem.index_q[..., 0] = 1
    problem.index_k.zero_()
    problem.index_k[0, 0, 0] = 1e-39
    problem.index_weights.fill_(-1)
    problem.index_weights[..., 1:] = 0
    assert select(problem).cpu()[0, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("shape", "tile_rows"), [(([300, 290, 40], 3, 300, 4, 64, 9), 7), (([300, 200], 10, 300, 16, 64, 9), 9)], ids=str
)
def test_tiles_change_nothing(shape, tile_rows: int) -> None:
    problem = topk_problem(*shape, HALF, ties=True, seed=5, device=DEVICE)
    lengths, S, C, Hi, Di, k = shape
    budget = tile_rows * 4 * topk_plan.row_entries(C)
    cut = topk_plan.plan(len(lengths), S, C, Hi, Di, k, budget)
    assert cut.batch_tile * cut.query_tile <= tile_rows < len(lengths) * S
    assert torch.equal(select(problem), select(problem, budget=budget))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_workspace_of_the_largest_shape_is_enough(data: st.DataObject) -> None:
    B, S, C, k = (data.draw(st.integers(1, most)) for most in (64, 1024, 2**20, 4096))
    Hi, Di = data.draw(HEADS), data.draw(st.sampled_from(topk_plan.HEAD_SIZES))
    smaller = [data.draw(st.integers(1, most)) for most in (B, S, C)]
    cut = topk_plan.plan(*smaller, Hi, Di, k)
    rows = cut.batch_tile * cut.query_tile
    assert rows * cut.splits <= max(rows, topk_plan.SELECT_PROGRAMS) and rows < 65536
    lists = 33 if k <= 2048 else 66
    assert cut.workspace <= topk_plan.largest_workspace(B, S, C, k) <= (128 + lists + 1) * 2**20
    Hkv, group = data.draw(st.integers(1, 16)), data.draw(st.integers(1, attention_kernel.MAX_GROUP))
    D = data.draw(st.sampled_from(attention_kernel.HEAD_SIZES))
    used = attention_kernel.workspace_bytes(smaller[0], smaller[1], Hkv * group, Hkv, D, k)
    assert used <= attention_kernel.largest_workspace(B, S, Hkv * group, Hkv, D)


# B, S, C, Hkv, group, D, K
ATTENTION_SHAPES = [
    (2, 1, 300, 2, 7, 64, 130),  # splits
    (1, 3, 90, 1, 16, 128, 70),
    (2, 2, 50, 3, 1, 64, 3),
    (1, 9, 120, 2, 5, 64, 65),
    (1, 1, 700, 2, 8, 128, 4096),
    (2, 2, 90, 2, 7, 32, 40),
    (1, 1, 90, 1, 4, 16, 33),
    (1, 2, 60, 1, 20, 576, 40),  # latent rows: 512 + 64, two blocks of heads
    (1, 2, 60, 2, 3, 40, 37),  # 32 + 8
    (1, 1, 60, 2, 33, 96, 70),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention(shape, dtype: torch.dtype) -> None:
    problem = attention_problem(*shape, dtype, seed=1, device=DEVICE)
    assert_attention(attend(problem), problem)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_attention_of_enough_tokens_to_fill_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernel, "ATTEND_PROGRAMS", 1)
    assert attention_kernel.plan(2, 2, 14, 2, 64, 200)[1] == 1
    problem = attention_problem(2, 2, 300, 2, 7, 64, 200, dtype, seed=2, device=DEVICE)
    assert_attention(attend(problem), problem)


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_attention_over_random_shapes(data: st.DataObject) -> None:
    most = {"B": 2, "S": 3, "C": 80, "Hkv": 2, "group": 20}
    shape = [data.draw(st.integers(1, size), name) for name, size in most.items()]
    D = 8 * data.draw(st.integers(2, 20), "D / 8")
    K = data.draw(st.integers(1, 150), "K")
    dtype = data.draw(st.sampled_from([HALF, BFLOAT, FLOAT]), "dtype")
    problem = attention_problem(*shape, D, K, dtype, data.draw(st.integers(0, 999), "seed"), device=DEVICE)
    assert_attention(attend(problem), problem, cut_off=not HAS_GPU)


def test_k_of_everything_equals_dense_attention() -> None:
    """With k at least the visible tokens, both operators together are causal attention."""
    B, S, C, Hkv, group, D = 2, 5, 60, 2, 7, 64
    problem = topk_problem([60, 23], S, C, 4, 64, 64, FLOAT, ties=False, seed=6, poison=False, device=DEVICE)
    attention = attention_problem(B, S, C, Hkv, group, D, 64, FLOAT, seed=7, poison=False, device=DEVICE)
    attention.indices = select(problem)
    positions = problem.kv_lengths[:, None] - S + torch.arange(S, device=DEVICE)
    mask = torch.arange(C, device=DEVICE) <= positions[..., None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        attention.q, attention.k_cache, attention.v_cache, mask[:, None], scale=attention.scale, enable_gqa=True
    )
    torch.testing.assert_close(attend(attention), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: torch's dispatch to the kernels needs CUDA tensors")
def test_torch_operators_run_the_kernels_and_repeat_bitwise() -> None:
    problem = topk_problem([30000, 29000], 1, 30000, 8, 64, 2048, BFLOAT, ties=False, seed=8, device=DEVICE)
    attention = attention_problem(2, 1, 30000, 2, 7, 64, 2048, BFLOAT, seed=9, poison=False, device=DEVICE)
    indices = select(problem)
    attention.indices = indices
    output = attend(attention)
    for _ in range(20):
        assert torch.equal(operator_index_topk(*problem.arguments()), indices)
        assert torch.equal(operator_sparse_attention(*attention.arguments()), output)
    with pytest.raises(ValueError, match="head size among 16, 32, 64, 128"):
        operator_index_topk(*topk_problem([9], 1, 9, 4, 48, 2, HALF, ties=False, seed=1, device=DEVICE).arguments())


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU: minutes in the interpreter")
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(
    ("B", "S", "C", "k"), [(64, 1, 40000, 2048), (8, 4, 131072, 512), (1, 1024, 20000, 4096), (1, 1, 2**20, 2048)]
)
def test_deployment_shapes(B: int, S: int, C: int, k: int, dtype: torch.dtype) -> None:
    lengths = [max(C - 997 * b, S) for b in range(B)]
    problem = topk_problem(lengths, S, C, 4, 64, k, dtype, ties=False, seed=10, device=DEVICE)
    checked = topk_problem(lengths, S, C, 4, 64, k, dtype, ties=False, seed=10)
    indices = select(problem).cpu()
    for b, t in product({0, B - 1}, {0, S - 1}):  # the corners: the reference takes its time
        one = slice(b, b + 1), slice(t, t + 1)
        visible = torch.tensor([checked.visible(b, t)])
        part = TopK(checked.index_q[one], checked.index_weights[one], checked.index_k[b : b + 1], visible, k)
        assert_selection(indices[one], part)
