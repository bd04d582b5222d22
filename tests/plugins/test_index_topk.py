"""dsa::IndexTopK: torch form and ONNX body against the definition, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.index_topk import index_topk, index_topk_reference
from plugins.index_topk.op import check_cuda
from tests.plugins import bodies
from tests.plugins.problems import TopK, assert_selection, sets, topk_problem


@st.composite
def small_problems(draw: st.DrawFn, most_k: int | None = None) -> TopK:
    """Exact arithmetic and many ties; lengths 0, below k, at and above the capacity."""
    S = draw(st.integers(1, 4))
    C = draw(st.integers(8, 40))
    lengths = draw(st.lists(st.integers(0, C + 3), min_size=1, max_size=3))
    k = draw(st.integers(1, most_k or C + 4))
    return topk_problem(lengths, S, C, draw(st.integers(1, 5)), 8, k, torch.float32, True, draw(st.integers(0, 999)))


@given(small_problems())
@settings(max_examples=60, deadline=None)
def test_torch_form_is_the_definition(problem: TopK) -> None:
    assert sets(index_topk(*problem.arguments())) == sets(index_topk_reference(*problem.arguments()))


@given(small_problems(most_k=8))
@settings(max_examples=60, deadline=None)
def test_onnx_body_is_the_definition(problem: TopK) -> None:
    *tensors, k = problem.arguments()
    indices = torch.from_numpy(bodies.run("IndexTopK", [t.numpy() for t in tensors], k=k))
    assert sets(indices) == sets(index_topk_reference(*problem.arguments()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_onnx_body_selects_the_best_of_real_numbers(dtype: torch.dtype) -> None:
    problem = topk_problem([700, 30], 3, 700, 8, 64, 64, dtype, ties=False, seed=1)
    *tensors, k = problem.arguments()
    assert_in_any_order(torch.from_numpy(bodies.run("IndexTopK", [t.numpy() for t in tensors], k=k)), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_form_selects_the_best_of_real_numbers(dtype: torch.dtype) -> None:
    problem = topk_problem([700, 30, 0], 3, 700, 7, 64, 64, dtype, ties=False, seed=2)
    assert_in_any_order(index_topk(*problem.arguments()), problem)


def assert_in_any_order(indices: torch.Tensor, problem: TopK) -> None:
    """The body and the torch form may put -1 anywhere in a row."""
    last = torch.iinfo(torch.int32).max
    ordered = torch.where(indices < 0, last, indices).sort(-1).values
    assert_selection(torch.where(ordered == last, -1, ordered), problem)


def test_a_later_key_changes_no_earlier_selection() -> None:
    problem = topk_problem([40], 6, 40, 4, 16, 8, torch.float32, ties=False, seed=3)
    before = index_topk(*problem.arguments())
    problem.index_k[0, -1] = 100 * problem.index_q[0, :, 0].sum(0)
    assert torch.equal(index_topk(*problem.arguments())[0, :-1], before[0, :-1])


def test_operator_is_well_formed() -> None:
    problem = topk_problem([20, 7], 2, 20, 4, 16, 5, torch.float32, ties=False, seed=4, poison=False)
    torch.library.opcheck(torch.ops.dsa.index_topk.default, problem.arguments())


def replaced(problem: TopK, **changes: object) -> tuple:
    return tuple({**vars(problem), **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"index_k": torch.zeros(2, 9, 8)}, "differ between the arguments"),
        ({"index_k": torch.zeros(2, 1, 9, 16)}, r"need index_q \[B, S, Hi, Di\]"),
        ({"index_weights": torch.zeros(2, 1, 4, dtype=torch.float16)}, "must have one floating-point dtype"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, "kv_lengths must be int64"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, "kv_lengths is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    problem = topk_problem([9, 9], 1, 9, 4, 16, 5, torch.float32, ties=False, seed=5)
    with pytest.raises(ValueError, match=message):
        index_topk(*replaced(problem, **changes))


@pytest.mark.parametrize(
    ("shape", "dtype", "C", "k", "message"),
    [
        ((1, 1, 4, 64), torch.float64, 9, 5, "needs fp32, fp16 or bf16"),
        ((1, 1, 4, 48), torch.float16, 9, 5, "head size of 64 or 128, got 48"),
        ((1, 1, 17, 64), torch.float16, 9, 5, "at most 16 indexer heads, got 17"),
        ((1, 1, 4, 64), torch.float16, 9, 4097, "k up to 4096, got 4097"),
        ((1, 1, 4, 64), torch.float16, 2**20 + 1, 5, "capacity up to 1048576"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused(shape, dtype, C: int, k: int, message: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=message):
        check_cuda(torch.zeros(shape, dtype=dtype), C, k)
