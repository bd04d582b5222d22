"""dsa::SparseAttention: torch form, its gradients and ONNX body against the definition, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.sparse_attention import op, sparse_attention, sparse_attention_reference
from tests.plugins import bodies
from tests.plugins.problems import Attention, assert_attention, attention_problem


@st.composite
def small_problems(draw: st.DrawFn) -> Attention:
    sizes = [draw(st.integers(1, most)) for most in (2, 3, 20, 2, 7)]
    return attention_problem(*sizes, 8, draw(st.integers(1, 24)), torch.float32, draw(st.integers(0, 999)))


@given(small_problems())
@settings(max_examples=60, deadline=None)
def test_torch_form_is_the_definition(problem: Attention) -> None:
    torch.testing.assert_close(
        sparse_attention(*problem.arguments()), sparse_attention_reference(*problem.arguments()), rtol=1e-5, atol=2e-6
    )


def test_a_skipped_entry_reads_no_row() -> None:
    """Not even the one that stands in for it, whose probability is 0: times NaN that would be NaN."""
    problem = attention_problem(1, 3, 9, 1, 2, 8, 6, torch.float32, seed=7)
    problem.indices[problem.indices == 0] = -1
    problem.k_cache[:, :, 0] = problem.v_cache[:, :, 0] = torch.nan
    torch.testing.assert_close(sparse_attention(*problem.arguments()), sparse_attention_reference(*problem.arguments()))


@pytest.mark.parametrize(("S", "C"), [(0, 5), (3, 0)])
def test_nothing_to_attend_to(S: int, C: int) -> None:
    q = torch.randn(2, 4, S, 8, requires_grad=True)
    rows = torch.randn(2, 2, C, 8, requires_grad=True)
    output = sparse_attention(q, rows, rows, torch.full((2, S, 3), -1, dtype=torch.int32), 1.0)
    assert torch.equal(output, torch.zeros(2, 4, S, 8))
    output.sum().backward()
    assert not q.grad.any() and not rows.grad.any()


@st.composite
def problems_with_few_slots(draw: st.DrawFn) -> Attention:
    """Where the ONNX body masks dense attention instead of gathering."""
    S, K = draw(st.integers(16, 80)), draw(st.integers(1, 24))
    C = draw(st.integers(1, max(K * min(S, 64) // 16, 1)))
    B, Hkv, group = (draw(st.integers(1, most)) for most in (2, 2, 7))
    return attention_problem(B, S, C, Hkv, group, 8, K, torch.float32, draw(st.integers(0, 999)), poison=False)


@given(small_problems() | problems_with_few_slots())
@settings(max_examples=100, deadline=None)
def test_onnx_body_is_the_definition(problem: Attention) -> None:
    _, S, K = problem.indices.shape
    for cache in (problem.k_cache, problem.v_cache):
        C = cache.shape[2]
        must_be_finite = C if min(S, 64) * K >= 16 * C else 1
        cache[:, :, :must_be_finite] = cache[:, :, :must_be_finite].nan_to_num()
    *tensors, scale = problem.arguments()
    output = torch.from_numpy(bodies.run("SparseAttention", [t.numpy() for t in tensors], scale=scale))
    torch.testing.assert_close(output, sparse_attention_reference(*problem.arguments()), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("S", "C"), [(3, 90), (20, 40)])
def test_onnx_body_in_fp16(S: int, C: int) -> None:
    problem = attention_problem(2, S, C, 2, 7, 64, 40, torch.float16, seed=1, poison=C > 40)
    *tensors, scale = problem.arguments()
    output = bodies.run("SparseAttention", [t.numpy() for t in tensors], scale=scale)
    assert_attention(torch.from_numpy(output), problem)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_products_beyond_fp16_that_the_scale_brings_back(form: str) -> None:
    q, rows = torch.full((1, 2, 1, 64), 40.0).half(), torch.full((1, 1, 8, 64), 40.0).half()
    rows[:, :, 3] = 41  # q · k is beyond 65,504
    arguments = (q, rows, rows, torch.tensor([[[1, 3, -1]]], dtype=torch.int32), 0.125)
    if form == "torch":
        output = sparse_attention(*arguments)
    else:
        output = torch.from_numpy(bodies.run("SparseAttention", [t.numpy() for t in arguments[:-1]], scale=0.125))
    torch.testing.assert_close(output, torch.full_like(q, 41))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_that_is_no_power_of_two_rounds_no_query(dtype: torch.dtype) -> None:
    q, k = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype) for shape in ((50, 128), (60, 128))
    )
    scale = 128**-0.5
    assert torch.equal(op.scaled_dots(q, k, scale), (q @ k.T).float() * scale)


@pytest.mark.parametrize("tile_bytes", [op.GATHER_BYTES, 1])
def test_gradients_are_those_of_the_torch_form(tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "GATHER_BYTES", tile_bytes)  # 1: a tile per token
    problem = attention_problem(2, 5, 30, 2, 7, 16, 12, torch.float32, seed=2, poison=False)
    q, k_cache, v_cache = (t.requires_grad_() for t in problem.arguments()[:3])
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(sparse_attention(*problem.arguments()), (q, k_cache, v_cache), weights)
    expected = torch.autograd.grad(op._attend(*problem.arguments()), (q, k_cache, v_cache), weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_tiles_are_summed_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either type 2048 + 1 is 2048."""
    monkeypatch.setattr(op, "GATHER_BYTES", 1)
    q, k = torch.zeros(1, 1, 300, 8, dtype=dtype), torch.zeros(1, 1, 3, 8, dtype=dtype)
    v = torch.zeros_like(k, requires_grad=True)
    weights = torch.ones_like(q)
    weights[:, :, 0] = 2048
    output = sparse_attention(q, k, v, torch.ones(1, 300, 1, dtype=torch.int32), 1.0)
    (got,) = torch.autograd.grad(output, v, weights)
    expected = torch.tensor([0, 2048 + 299, 0.0])[:, None].expand(3, 8)
    torch.testing.assert_close(got[0, 0].float(), expected, rtol=1e-2, atol=0)


def test_operator_is_well_formed() -> None:
    problem = attention_problem(2, 2, 20, 2, 3, 16, 6, torch.float32, seed=3, poison=False)
    problem.q.requires_grad_()
    torch.library.opcheck(torch.ops.dsa.sparse_attention.default, problem.arguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 5, 1, 16)}, r"query heads \(5\) must be a multiple of KV heads \(2\)"),
        ({"v_cache": torch.zeros(2, 2, 9, 16)}, "differ between the arguments"),
        ({name: torch.zeros(2, 2, 8, 8) for name in ("k_cache", "v_cache")}, "differ between the arguments"),
        ({"indices": torch.zeros(2, 2, 4, dtype=torch.int32)}, "differ between the arguments"),
        ({"indices": torch.zeros(2, 1, 4, dtype=torch.int32, device="meta")}, "indices is on meta, q on cpu"),
        (
            {name: torch.zeros(2, 2, 8, 16).int() for name in ("q", "k_cache", "v_cache")}
            | {"indices": torch.zeros(2, 8, 4, dtype=torch.int32)},
            "must have one floating-point dtype",
        ),
        ({"indices": torch.zeros(2, 4, dtype=torch.int32)}, r"need q \[B, Hq, S, D\]"),
        ({"q": torch.zeros(2, 4, 1, 16, dtype=torch.float16)}, "must have one floating-point dtype"),
        ({"indices": torch.zeros(2, 1, 4, dtype=torch.int64)}, "indices must be int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    problem = attention_problem(2, 1, 8, 2, 2, 16, 4, torch.float32, seed=4)
    with pytest.raises(ValueError, match=message):
        sparse_attention(*{**vars(problem), **changes}.values())


@pytest.mark.parametrize(
    ("q", "cache", "K", "message"),
    [
        ((1, 4, 1, 20), (1, 2, 8, 20), 4, "head size of 16 to 576, a multiple of 8, got 20"),
        ((1, 4, 1, 584), (1, 2, 8, 584), 4, "head size of 16 to 576, a multiple of 8, got 584"),
        ((1, 258, 1, 64), (1, 2, 8, 64), 4, "at most 128 query heads per KV head, got 129"),
        ((1, 4, 1, 64), (1, 2, 8, 64), 0, "1 to 4096 indices per token, got 0"),
        ((1, 4, 1, 64), (1, 2, 8, 64), 4097, "1 to 4096 indices per token, got 4097"),
        ((1, 4, 1, 64), (1, 2, 2**20 + 1, 64), 4, "capacity up to 1048576"),
        ((2, 4, 2**16 + 1, 64), (2, 2, 8, 64), 4, "up to 131072 query tokens"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused(q, cache, K: int, message: str) -> None:
    pytest.importorskip("triton")
    tensors = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (q, cache))
    with pytest.raises(ValueError, match=message):
        op.check_cuda(*tensors, torch.empty(*q[:1], q[2], K, dtype=torch.int32, device="meta"))
