"""The CPU kernels in ONNX Runtime, of every instruction set that this processor has, against the definitions."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor

from engines.ort_graph import with_cpu_kernels
from plugins import cpu, cxx
from plugins.cpu.library import HERE as SOURCES
from plugins.cpu.library import INSTRUCTION_SETS
from plugins.cxx import BuildFailed
from plugins.index_topk import index_topk_reference
from plugins.index_topk.op import forced_groups
from plugins.index_topk.rounding import round_keys, round_queries
from plugins.sparse_attention.op import sparse_attention_torch
from tests.plugins import bodies
from tests.plugins.problems import (
    TopK,
    assert_attention,
    assert_selection,
    attention_problem,
    sets,
    topk_problem,
)

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
KERNELS = ["baseline", *(name for name, flag in {"avx2": "avx2", "avx512": "avx512_vnni"}.items() if flag in FLAGS)]
HALVED = {(True, True): "half", (True, False): "half k", (False, True): "half v"}
REFUSED = (state.InvalidArgument, state.RuntimeException)


@cache
def session(
    kernels: str, threads: int, operator: str, keys: str, **attributes: int | float
) -> onnxruntime.InferenceSession:
    model = bodies.model(operator, bodies.TYPES["float32"], keys, **attributes)
    assert with_cpu_kernels(model) and not model.functions
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(cpu.build().resolve()))
    before = os.environ.get("DSA_CPU_KERNELS")
    os.environ["DSA_CPU_KERNELS"] = kernels
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    finally:
        if before is None:
            del os.environ["DSA_CPU_KERNELS"]
        else:
            os.environ["DSA_CPU_KERNELS"] = before


def run(kernels: str, operator: str, tensors: list[Tensor], **attributes: int | float) -> Tensor:
    return run_all(kernels, operator, tensors, **attributes)[0]


def run_all(
    kernels: str, operator: str, tensors: list[Tensor], threads: int = 2, **attributes: int | float
) -> list[Tensor]:
    keys = "int8" if operator == "IndexTopK" and tensors[2].dtype == torch.uint8 else "model"
    if "Attention" in operator:
        keys = HALVED.get(tuple(cache.dtype == torch.float16 for cache in tensors[1:3]), keys)
    runner = session(kernels, threads, operator, keys, **attributes)
    names = [value.name for value in runner.get_inputs()]
    feeds = {name: tensor.contiguous().numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in runner.run(None, feeds)]


@st.composite
def small_problems(draw: st.DrawFn) -> tuple[TopK, dict[str, int]]:
    """Exact arithmetic, many ties; lengths negative, 0, below k, at and above the capacity; sinks, windows, pools."""
    S = draw(st.integers(1, 35))
    pool = draw(st.sampled_from([1, 1, 2, 4]))
    G = draw(st.sampled_from([1, 9, 63, 64, 65, 200]))
    lengths = draw(st.lists(st.integers(-2, G * pool + 3), min_size=1, max_size=3))
    options = {"sinks": draw(st.integers(0, 9)), "window": draw(st.integers(0, 20)), "pool": pool}
    k = pool * draw(st.integers(forced_groups(**options) or 1, 40))
    heads, size = draw(st.integers(1, 9)), draw(st.sampled_from([4, 12, 20, 32, 64]))
    problem = topk_problem(
        [-(-length // pool) for length in lengths], S, G, heads, size, k, torch.float32, True, draw(st.integers(0, 999))
    )
    problem.kv_lengths = torch.tensor(lengths)
    return problem, options if options != {"sinks": 0, "window": 0, "pool": 1} else {}


@pytest.mark.parametrize("kernels", KERNELS)
@given(small_problems())
@settings(max_examples=60, deadline=None)
def test_the_selection_is_the_definition(kernels: str, case: tuple[TopK, dict[str, int]]) -> None:
    problem, options = case
    *tensors, k = problem.arguments()
    got = run(kernels, "IndexTopK", tensors, k=k, **options)
    assert sets(got) == sets(index_topk_reference(*problem.arguments(), **options))
    assert (got >= 0).int().diff(dim=-1).le(0).all()  # -1 stands behind what is selected


@st.composite
def byte_problems(draw: st.DrawFn) -> tuple[list[Tensor], int, dict[str, int]]:
    B, S, G = draw(st.integers(1, 2)), draw(st.integers(1, 20)), draw(st.sampled_from([5, 64, 130]))
    heads, size = draw(st.integers(1, 9)), draw(st.sampled_from([4, 32, 36, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    tensors = [
        numbers(-63, 64, B, S, heads, size).to(torch.int8),
        numbers(-4, 5, B, S, heads).float() / 4,
        numbers(0, 256, B, G, size).to(torch.uint8),
        numbers(0, G + 1, B),
        numbers(1, 5, B, G).float() / 4,
    ]
    options = draw(st.sampled_from([{}, {"sinks": 2, "window": 5, "pool": 1}]))
    return tensors, draw(st.integers(8, 40)), options


@pytest.mark.parametrize("kernels", KERNELS)
@given(byte_problems())
@settings(max_examples=60, deadline=None)
def test_keys_in_bytes_are_scored_exactly(kernels: str, case: tuple[list[Tensor], int, dict[str, int]]) -> None:
    tensors, k, options = case
    *shared, scale = tensors
    expected = index_topk_reference(*shared, k, index_scale=scale, **options)
    assert sets(run(kernels, "IndexTopK", tensors, k=k, **options)) == sets(expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("S", [1, 20])
def test_the_selection_is_the_best_of_many_real_numbers_however_it_is_cut(kernels: str, S: int) -> None:
    problem = topk_problem([9000, 700], S, 9000, 8, 64, 300, torch.float32, ties=False, seed=1)
    *tensors, k = problem.arguments()
    indices = run(kernels, "IndexTopK", tensors, k=k)
    assert_selection(indices, problem)
    one_row = [t[:1] for t in tensors]  # of one query with two threads, two slices of the keys
    assert sets(run(kernels, "IndexTopK", one_row, k=k)) == sets(indices[:1])


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_scores_in_order(order: str) -> None:
    """The most and the fewest candidates that the kernel can meet."""
    G, k = 5000, 64
    scores = {"rising": torch.arange(G), "falling": G - torch.arange(G), "equal": torch.ones(G)}[order].float()
    tensors = [
        torch.ones(1, 1, 1, 4),
        torch.ones(1, 1, 1),
        (scores / 4)[None, :, None].expand(1, G, 4),
        torch.tensor([G]),
    ]
    expected = set(range(G - k, G)) if order == "rising" else set(range(k))
    assert sets(run(KERNELS[-1], "IndexTopK", tensors, k=k)) == [[expected]]


def test_nan_ranks_highest_and_infinity_is_ranked() -> None:
    keys = torch.zeros(1, 200, 4)
    keys[0, 150] = torch.nan
    keys[0, 120, 0] = torch.inf
    keys[0, 50, 0] = 2.0
    tensors = [torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2), keys, torch.tensor([200])]
    for kernels in KERNELS:
        assert sets(run(kernels, "IndexTopK", tensors, k=3)) == [[{150, 120, 50}]]


ATTENTION_CASES = [
    (2, 3, 300, 2, 7, 64, 64),
    (1, 1, 900, 1, 1, 64, 700),
    (2, 2, 50, 3, 4, 80, 33),
    (1, 5, 90, 1, 9, 36, 130),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", ATTENTION_CASES)
def test_attention_is_the_definition(kernels: str, shape: tuple[int, ...]) -> None:
    problem = attention_problem(*shape, torch.float32, seed=3)
    *tensors, scale = problem.arguments()
    assert_attention(run(kernels, "SparseAttention", tensors, scale=scale), problem)


@pytest.mark.parametrize("kernels", KERNELS)
@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 200), st.integers(1, 3), st.integers(1, 9),
    st.sampled_from([4, 16, 24, 48, 128]), st.integers(1, 300), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_attention_of_any_shape(kernels: str, B: int, S: int, C: int, Hkv: int, group: int, D: int, K: int, seed: int):
    problem = attention_problem(B, S, C, Hkv, group, D, K, torch.float32, seed)
    *tensors, scale = problem.arguments()
    assert_attention(run(kernels, "SparseAttention", tensors, scale=scale), problem)


def dense_reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Every query over the rows that it sees, one at a time."""
    (B, Hq, S, D), (_, Hkv, C, _) = q.shape, k.shape
    expected = torch.zeros(B, Hkv, Hq // Hkv, S, D)
    for b, length in enumerate(lengths):
        for t in range(S):
            if (visible := min(length - S + t + 1, C)) > 0:
                scores = torch.einsum("hgd,hcd->hgc", q[b, :, t].view(Hkv, -1, D), k[b, :, :visible]) * scale
                expected[b, :, :, t] = scores.softmax(-1) @ v[b, :, :visible]
    return expected.flatten(1, 2)


def dense_problem(B: int, S: int, C: int, Hkv: int, group: int, D: int, lengths: list[int], seed: int) -> list[Tensor]:
    """q, k, v; beyond a row's length, where nobody may look, NaN."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(B, heads, rows, D, generator=generator) for heads, rows in ((Hkv * group, S), (Hkv, C), (Hkv, C))
    )
    for b, length in enumerate(lengths):
        k[b, :, max(length, 0) :] = v[b, :, max(length, 0) :] = torch.nan
    return [q, k, v]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("lengths", [[9000, 37], [0, 1], [-3, 9999]])
@pytest.mark.parametrize("S", [1, 3, 70])
def test_dense_attention_is_attention_to_every_visible_row(kernels: str, lengths: list[int], S: int) -> None:
    """Of so many rows that they are cut into spans, and for few queries into parts."""
    q, k, v = dense_problem(2, S, 9000, 2, 3, 16, lengths, seed=7)
    got = run(kernels, "DenseAttention", [q, k, v, torch.tensor(lengths)], scale=0.25)
    torch.testing.assert_close(got, dense_reference(q, k, v, lengths, 0.25), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@given(
    st.lists(st.integers(-2, 170), min_size=1, max_size=2), st.integers(1, 150), st.integers(1, 160), st.integers(1, 3),
    st.integers(1, 9), st.sampled_from([4, 16, 24, 48, 128]), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_dense_attention_of_any_shape(
    kernels: str, lengths: list[int], S: int, C: int, Hkv: int, group: int, D: int, seed: int
) -> None:
    q, k, v = dense_problem(len(lengths), S, C, Hkv, group, D, lengths, seed)
    got = run(kernels, "DenseAttention", [q, k, v, torch.tensor(lengths)], scale=0.125)
    torch.testing.assert_close(got, dense_reference(q, k, v, lengths, 0.125), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("group", [200, 520])
def test_dense_attention_of_more_heads_than_a_block_has(kernels: str, group: int) -> None:
    q, k, v = dense_problem(1, 3, 70, 1, group, 16, [70], seed=2)
    got = run(kernels, "DenseAttention", [q, k, v, torch.tensor([70])], scale=0.25)
    torch.testing.assert_close(got, dense_reference(q, k, v, [70], 0.25), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_that_outweighs_all_others_is_found_wherever_it_stands(kernels: str) -> None:
    q, values = torch.ones(1, 1, 1, 4), torch.arange(130.0)[None, None, :, None].expand(1, 1, 130, 4).contiguous()
    for row in range(130):
        keys = torch.zeros(1, 1, 130, 4)
        keys[0, 0, row, 0] = 300
        got = run(kernels, "DenseAttention", [q, keys, values, torch.tensor([130])], scale=1.0)
        torch.testing.assert_close(got, torch.full((1, 1, 1, 4), float(row)))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_a_token_does_not_reach_those_before_it(kernels: str, bad: float) -> None:
    """Not even through a weight of zero. Token 40 is in the middle of a block of queries and of a tile of keys."""
    q, k, v = dense_problem(1, 100, 150, 2, 7, 16, [150], seed=3)
    before = run(kernels, "DenseAttention", [q, k, v, torch.tensor([150])], scale=0.25)
    k[0, :, 90] = v[0, :, 90] = bad
    after = run(kernels, "DenseAttention", [q, k, v, torch.tensor([150])], scale=0.25)
    assert torch.equal(after[:, :, :40], before[:, :, :40])
    assert (after[:, :, 40:] != before[:, :, 40:]).any(-1).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", ATTENTION_CASES)
def test_caches_in_fp16_are_the_same_numbers(kernels: str, shape: tuple[int, ...]) -> None:
    problem = attention_problem(*shape, torch.float32, seed=4)
    q, *caches, indices, scale = problem.arguments()
    halves = [cache.half() for cache in caches]
    halves[0][:, :, 7] = 6e-8  # a number below the smallest normal one, and the smallest there is
    expected = run(kernels, "SparseAttention", [q, *(half.float() for half in halves), indices], scale=scale)
    assert torch.equal(run(kernels, "SparseAttention", [q, *halves, indices], scale=scale), expected)
    lengths = torch.full((shape[0],), shape[2])
    for half in halves:
        half.nan_to_num_()
    expected = run(kernels, "DenseAttention", [q, *(half.float() for half in halves), lengths], scale=scale)
    assert torch.equal(run(kernels, "DenseAttention", [q, *halves, lengths], scale=scale), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_number_in_fp16_is_widened_exactly(kernels: str) -> None:
    """Through the sum of one row of values: all 65,536, NaN and infinities among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = every.view(1, 1024, 1, 64)
    q = torch.zeros(1, 1024, 1, 64)
    zero = torch.zeros(1, 1, 1, dtype=torch.int32)
    got = run(kernels, "SparseAttention", [q, torch.zeros_like(values), values, zero], scale=1.0)
    torch.testing.assert_close(got.flatten(), every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800000])
@pytest.mark.parametrize("K", [1, 60, 256])
def test_attention_to_nan_is_nan_however_it_is_cut(bits: int, K: int) -> None:
    bad = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    caches = torch.ones(1, 1, 300, 8)
    keys = caches.clone()
    keys[0, 0, K - 1, 0] = bad
    indices = torch.arange(K, dtype=torch.int32)[None, None]
    for kernels in KERNELS:
        assert run(kernels, "SparseAttention", [caches[:, :, :1], keys, caches, indices], scale=1.0).isnan().all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("bad", [128, 256])
def test_scores_of_minus_infinity_count_for_nothing_however_it_is_cut(kernels: str, heads: int, bad: int) -> None:
    """Two processors cut the rows of one head into halves, those of two heads not. NaN if no other score is there."""
    values = torch.arange(256.0)[:, None].expand(1, heads, 256, 8).contiguous()
    keys = torch.ones(1, heads, 256, 8)
    keys[:, :, :bad, 0] = -torch.inf
    indices = torch.arange(256, dtype=torch.int32)[None, None]
    tensors = [torch.ones(1, heads, 1, 8), keys, values, indices]
    expected = sparse_attention_torch(*tensors, 1.0)
    got = run(kernels, "SparseAttention", tensors, scale=1.0)
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rounding_keeps_what_is_not_finite_visible(bad: float) -> None:
    keys = torch.ones(1, 2, 8)
    keys[0, 0, 3] = bad
    for kernels in KERNELS:
        rounded, scales = run_all(kernels, "RoundKeys", [keys])
        expected, expected_scales = round_keys(keys, "int8")
        torch.testing.assert_close(scales, expected_scales, equal_nan=True)
        assert torch.equal(rounded[0, 1], expected[0, 1])


def test_attention_with_large_scores_stays_finite() -> None:
    problem = attention_problem(1, 2, 200, 1, 4, 64, 150, torch.float32, seed=5)
    problem.q *= 100
    *tensors, scale = problem.arguments()
    assert_attention(run(KERNELS[-1], "SparseAttention", tensors, scale=scale), problem)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", [(1, 1, 8, 64), (2, 130, 3, 36)])
def test_rounding_is_the_torch_form_bit_by_bit(kernels: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, weights = torch.randn(shape, generator=generator), torch.randn(shape[:3], generator=generator)
    queries[0, 0, 0] = 0
    halves = torch.arange(shape[-1]) / 2  # by a scale of 1 they lie midway between two integers: the even one is taken
    for head, full in ((1, 63), (0, 127))[: shape[0]]:  # of a query, of a key
        queries[-1, -1, head] = halves.index_fill(0, torch.tensor(0), full)
    keys = queries[:, :, 0].contiguous()
    cases = {
        "RoundKeys": ([keys], round_keys(keys, "int8")),
        "RoundQueries": ([queries, weights], round_queries(queries, weights)),
    }
    for operator, (tensors, expected) in cases.items():
        body = [torch.from_numpy(array) for array in bodies.run_all(operator, [t.numpy() for t in tensors])]
        for got in (run_all(kernels, operator, tensors), body):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_calls_at_once_do_not_mix() -> None:
    """Two sessions, several threads: the kernels' memory belongs to the thread."""
    problems = [topk_problem([4000], 1, 4000, 8, 64, 100 + 50 * i, torch.float32, False, i) for i in range(2)]
    expected = [sets(run(KERNELS[-1], "IndexTopK", list(p.arguments()[:4]), k=p.k)) for p in problems]

    def call(i: int) -> bool:
        p = problems[i % 2]
        return sets(run(KERNELS[-1], "IndexTopK", list(p.arguments()[:4]), k=p.k)) == expected[i % 2]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"k": 0}, "k, sinks, window or pool is wrong"),
        ({"k": 6, "sinks": 0, "window": 0, "pool": 4}, "pool is wrong"),
        ({"k": 4, "sinks": 2**62, "window": 0, "pool": 1}, "k, sinks, window or pool is wrong"),
        ({"k": 4, "sinks": 2, "window": 3, "pool": 1}, "sinks and window do not fit in k"),
        ({"k": 8, "sinks": 1, "window": 3, "pool": 4}, "sinks and window do not fit in k"),
    ],
)
def test_wrong_attributes_are_refused_when_the_graph_is_loaded(attributes: dict[str, int], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        session(KERNELS[-1], 1, "IndexTopK", "model", **attributes)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(REFUSED, match="DSA_CPU_KERNELS"):
        session("mmx", 1, "IndexTopK", "model", k=1)


def wrong_inputs() -> Iterator[tuple[str, dict[str, float], list[Tensor], str]]:
    topk = list(topk_problem([8], 1, 8, 2, 8, 4, torch.float32, True, 0, poison=False).arguments()[:4])
    yield "IndexTopK", {"k": 4}, [topk[0], topk[1][..., :1], *topk[2:]], r"index_weights must be \[B, S, Hi\]"
    yield "IndexTopK", {"k": 4}, [*topk[:2], topk[2][..., :4], topk[3]], "of one B and Di"
    yield "IndexTopK", {"k": 4}, [*topk[:3], torch.tensor([8, 8])], r"kv_lengths must be \[B\]"
    without_heads = [topk[0][:, :, :0], topk[1][..., :0], *topk[2:]]
    yield "IndexTopK", {"k": 4}, without_heads, "Hi and Di must be positive"
    queries, weights = round_queries(torch.ones(1, 8, 2, 6), torch.ones(1, 8, 2))
    keys, scales = round_keys(torch.ones(1, 8, 6), "int8")
    yield "IndexTopK", {"k": 4}, [queries, weights, keys, topk[3], scales], "Di must be a multiple of 4"
    yield "RoundQueries", {}, [torch.ones(1, 8, 2, 8), torch.ones(1, 8, 1)], r"index_weights must be \[B, S, Hi\]"
    attention = list(attention_problem(1, 1, 8, 2, 2, 8, 4, torch.float32, 0, poison=False).arguments()[:4])
    yield "SparseAttention", {"scale": 1.0}, [attention[0][:, :3], *attention[1:]], "multiple of KV heads"
    yield "SparseAttention", {"scale": 1.0}, [attention[0][:, :0], *attention[1:]], "Hq, Hkv and D must be positive"
    yield "SparseAttention", {"scale": 1.0}, [*attention[:2], attention[2][:, :, :5], attention[3]], "differ"
    mixed = [attention[0], attention[1].half(), attention[2].half(), attention[3]]
    yield "DenseAttention", {"scale": 1.0}, [*mixed[:3], torch.tensor([8, 8])], r"kv_lengths must be \[B\]"
    for operator, last in (("SparseAttention", attention[3]), ("DenseAttention", torch.tensor([8]))):
        for caches in ((mixed[1], attention[2]), (attention[1], mixed[2])):
            yield operator, {"scale": 1.0}, [attention[0], *caches, last], "caches must both be fp32, or both fp16"


@pytest.mark.parametrize(("operator", "attributes", "tensors", "message"), list(wrong_inputs()))
def test_wrong_inputs_are_refused(operator: str, attributes: dict[str, float], tensors: list[Tensor], message: str):
    with pytest.raises(REFUSED, match=message):
        run(KERNELS[-1], operator, tensors, **attributes)


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildFailed, match="no-such-compiler not found: install a C"):
        cpu.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))
    monkeypatch.setenv("CXX", "/etc/passwd")
    with pytest.raises(BuildFailed, match="/etc/passwd: Permission denied"):
        cpu.build(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BuildFailed, match=r"file.*: Not a directory"):
        cpu.build(tmp_path / "file" / "build")


def test_a_library_that_is_there_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu.build() == library


def test_empty_calls() -> None:
    tensors = [torch.zeros(1, 0, 2, 8), torch.zeros(1, 0, 2), torch.zeros(1, 9, 8), torch.tensor([9])]
    assert run(KERNELS[-1], "IndexTopK", tensors, k=4).shape == (1, 0, 4)
    q, caches = torch.zeros(1, 2, 0, 8), torch.zeros(1, 1, 9, 8)
    nothing = torch.zeros(1, 0, 4, dtype=torch.int32)
    assert run(KERNELS[-1], "SparseAttention", [q, caches, caches, nothing], scale=1.0).shape == (1, 2, 0, 8)
    assert np.prod(q.shape) == 0


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels and a stand-in for ONNX Runtime as one program, built with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("sanitized")
    start = [*cxx.compiler(), "-std=c++20", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program, probe = str(folder / "program"), folder / "probe.cpp"
    probe.write_text("int main() {}")
    try:
        cxx.run([*start, str(probe), "-o", program])
        cxx.run([program])
    except BuildFailed as error:
        pytest.skip(f"no sanitizers on this machine: {str(error).splitlines()[-1]}")
    sources = {"library": "library.cpp"} | dict.fromkeys(INSTRUCTION_SETS, "kernels.cpp")
    objects = {name: str(folder / f"{name}.o") for name in sources}
    cxx.run_all(
        [*start, "-O1", *INSTRUCTION_SETS.get(name, ()), f"-DDSA_ISA={name}", "-c", str(SOURCES / source),
         "-o", objects[name]]
        for name, source in sources.items()
    )  # fmt: skip
    host = Path(__file__).parent / "fake_onnxruntime.cpp"
    cxx.run([*start, f"-I{SOURCES}", str(host), *objects.values(), "-pthread", "-o", program])
    return Path(program)


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_call_leaves_its_memory(sanitized: Path, kernels: str) -> None:
    poison = "detect_leaks=0:max_malloc_fill_size=1000000:malloc_fill_byte=255"
    environment = os.environ | {"DSA_CPU_KERNELS": kernels, "ASAN_OPTIONS": poison}
    result = subprocess.run([sanitized, "150"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
