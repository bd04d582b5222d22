"""dsa::IndexTopK: torch form and ONNX body against the definition, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_export.capacity import cache_rows
from dsa_export.cli import user_message
from plugins import UnsupportedOnGPU
from plugins.index_topk import index_topk, index_topk_reference, op
from plugins.index_topk.op import check_cuda, forced_groups, topk_lowest_index_first
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


@pytest.mark.parametrize("options", [{}, {"sinks": 1, "window": 2}, {"pool": 2}], ids=str)
@pytest.mark.parametrize("queries", [0, 1, 3])  # 0: the scores of one are too many
def test_tiles_of_queries_are_the_definition(monkeypatch: pytest.MonkeyPatch, queries: int, options: dict) -> None:
    """As of long inputs, whose scores exceed SCORE_BYTES."""
    problem = topk_problem([40, 23], 7, 40, 3, 8, 6, torch.float32, ties=True, seed=6, poison=False)
    monkeypatch.setattr(op, "SCORE_BYTES", queries * 2 * 3 * 40 * 4)
    expected = index_topk_reference(*problem.arguments(), **options)
    assert sets(index_topk(*problem.arguments(), **options)) == sets(expected)


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


@pytest.mark.parametrize("k", [5, 30])
def test_operator_is_well_formed(k: int) -> None:
    problem = topk_problem([20, 7], 2, 20, 4, 16, k, torch.float32, ties=False, seed=4, poison=False)
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
        ({"index_weights": torch.zeros(2, 1, 5)}, "differ between the arguments"),
        ({"kv_lengths": torch.zeros(3, dtype=torch.int64)}, "differ between the arguments"),
        (
            {
                "index_q": torch.zeros(2, 1, 4, 16, dtype=torch.int32),
                "index_weights": torch.zeros(2, 1, 4).int(),
                "index_k": torch.zeros(2, 9, 16).int(),
            },
            "must have one floating-point dtype",
        ),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, "kv_lengths must be int64"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int64, device="meta")}, "kv_lengths is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    problem = topk_problem([9, 9], 1, 9, 4, 16, 5, torch.float32, ties=False, seed=5)
    with pytest.raises(ValueError, match=message):
        index_topk(*replaced(problem, **changes))


NEEDED = r"index_scale is needed with index_k in float8_e4m3fn or uint8, and only then"


@pytest.mark.parametrize(
    ("keys", "scale", "message"),
    [
        (torch.float8_e4m3fn, torch.ones(2, 9).half(), r"index_scale must be \[B, G\] fp32, got .* torch.float16"),
        (torch.float8_e4m3fn, torch.ones(2, 8), r"index_scale must be \[B, G\] fp32, got \(2, 8\)"),
        (torch.float8_e4m3fn, torch.ones(2, 9, device="meta"), "index_scale is on meta"),
        (torch.uint8, torch.ones(2, 9), "or be int8, float32 and uint8; got torch.float32, torch.float32, torch.uint8"),
        (torch.float8_e4m3fn, None, NEEDED),
        (torch.float32, torch.ones(2, 9), NEEDED),
    ],
)
def test_a_scale_that_does_not_fit_the_keys_is_refused(
    keys: torch.dtype, scale: torch.Tensor | None, message: str
) -> None:
    problem = topk_problem([9, 9], 1, 9, 4, 16, 5, torch.float32, ties=False, seed=5)
    problem.index_k = problem.index_k.to(keys)
    with pytest.raises(ValueError, match=message):
        index_topk(*problem.arguments(), index_scale=scale)


@pytest.mark.parametrize(
    ("shape", "dtype", "keys", "k", "pool", "message"),
    [
        ((1, 1, 4, 64), torch.float64, 9, 5, 1, "needs queries in fp32, fp16 or bf16"),
        ((1, 1, 4, 48), torch.float16, 9, 5, 1, "head size among 16, 32, 64, 128, got 48"),
        ((1, 1, 65, 64), torch.float16, 9, 5, 1, "at most 64 indexer heads, got 65"),
        ((1, 1, 4, 64), torch.float16, 9, 4097, 1, "k up to 4096, got 4097"),
        ((1, 1, 4, 64), torch.float16, 2**20 + 1, 5, 1, "capacity up to 1048576 tokens, got 1048577"),
        ((1, 1, 4, 64), torch.float16, 2**18 + 3, 4, 4, "capacity up to 1048576 tokens, got 262147 keys of 4 each"),
    ],
)
def test_what_the_kernels_do_not_support_is_refused(shape, dtype, keys: int, k: int, pool: int, message: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedOnGPU, match=message) as error:
        check_cuda(torch.zeros(shape, dtype=dtype), keys, k, pool)
    assert user_message(error.value) == str(error.value)  # one line for who asked for it


@pytest.mark.parametrize("pool", [1, 3, 4])
def test_caches_for_the_most_tokens_are_taken(pool: int) -> None:
    pytest.importorskip("triton")
    check_cuda(torch.zeros(1, 1, 4, 64), cache_rows(2**20, pool), 12, pool)


@st.composite
def problems_with_options(draw: st.DrawFn) -> tuple[TopK, dict[str, int], torch.Tensor | None]:
    """Groups, sinks, a window, keys in 8 bits; lengths within a group; k at most the groups that the cache has."""
    pool = draw(st.integers(1, 4))
    sinks, window = draw(st.integers(0, 5)), draw(st.integers(0, 6))
    least = max(1, forced_groups(sinks, window, pool))
    groups = draw(st.integers(least, least + 6))
    rows = groups + draw(st.integers(0, 8))
    lengths = draw(st.lists(st.integers(0, rows * pool), min_size=1, max_size=3))
    heads, seed = draw(st.integers(1, 4)), draw(st.integers(0, 999))
    problem = topk_problem(lengths, draw(st.integers(1, 4)), rows, heads, 8, groups * pool, torch.float32, True, seed)
    for row, length in zip(problem.index_k, lengths, strict=True):
        row[: -(-length // pool)].nan_to_num_(0.0)  # poisoned by tokens, stored by groups
        row[-(-length // pool) :] = torch.nan
    scale = None
    keys = draw(st.sampled_from(["model", "fp8", "int8"]))
    if keys == "fp8":
        problem.index_k = problem.index_k.to(torch.float8_e4m3fn)
    elif keys == "int8":
        problem.index_q = (problem.index_q * 20).round().clamp(-63, 63).to(torch.int8)
        problem.index_k = ((problem.index_k.nan_to_num(9.0) * 40).round().clamp(-127, 127) + 128).to(torch.uint8)
    if keys != "model":
        scale = torch.full(problem.index_k.shape[:2], 0.5).exp2()
    return problem, {"sinks": sinks, "window": window, "pool": pool}, scale


@given(problems_with_options())
@settings(max_examples=80, deadline=None)
def test_options_mean_the_same_in_every_form(case) -> None:
    problem, options, scale = case
    expected = sets(index_topk_reference(*problem.arguments(), **options, index_scale=scale))
    assert sets(index_topk(*problem.arguments(), **options, index_scale=scale)) == expected
    *tensors, k = problem.arguments()
    arrays = [onnx_array(t) for t in [*tensors, *([] if scale is None else [scale])]]
    assert sets(torch.from_numpy(bodies.run("IndexTopK", arrays, k=k, **options))) == expected


def onnx_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def test_what_is_always_selected() -> None:
    """By hand: 11 tokens, the query at position 10, groups of 2; scores fall with the position."""
    index_q, index_weights = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1)
    keys = torch.linspace(2, 1, 7)[None, :, None].expand(1, 7, 2).contiguous()
    lengths = torch.tensor([11])

    def selected(k: int, **options: int) -> set[int]:
        return sets(index_topk(index_q, index_weights, keys, lengths, k, **options))[0][0]

    assert selected(4, pool=2) == {0, 1, 10}
    assert selected(6, pool=2, window=2) == {0, 1, 8, 9, 10}
    assert selected(6, pool=2, sinks=3) == {0, 1, 2, 3, 10}
    assert index_topk(
        index_q, index_weights, keys.flip(1), torch.tensor([7]), 4, sinks=1, window=2
    ).sort().values.tolist() == [[[0, 4, 5, 6]]]


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (8, {"pool": 3}, "pool must be at least 1 and divide k = 8, got 3"),
        (8, {"pool": 0}, "pool must be at least 1"),
        (8, {"sinks": -1}, "sinks must not be negative, got -1"),
        (8, {"sinks": 4, "window": 5}, "sinks = 4, window = 5 and pool = 1 always select 9 keys: k = 8"),
        (8, {"window": 6, "pool": 4}, "always select 12 keys"),
        (8, {"sinks": 8, "pool": 4}, "always select 12 keys"),
    ],
)
def test_options_that_exclude_each_other_are_refused(k: int, options: dict[str, int], message: str) -> None:
    problem = topk_problem([9, 9], 1, 9, 4, 16, 5, torch.float32, ties=False, seed=5)
    with pytest.raises(ValueError, match=message):
        index_topk(*problem.arguments()[:4], k, **options)


def test_scores_that_are_not_numbers_are_selected_but_for_what_always_is() -> None:
    keys = torch.tensor([0.5, 1.0, torch.nan, torch.inf, 2.0, 0.1])[None, :, None]
    one = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), keys, torch.tensor([6]))
    assert sets(index_topk(*one, 2))[0][0] == {2, 3}
    assert sets(index_topk(*one, 4, sinks=1, window=1))[0][0] == {0, 2, 3, 5}
    assert sets(index_topk(*one, 2, sinks=1, window=1))[0][0] == {0, 5}


def test_scores_are_summed_in_fp32() -> None:
    """In bf16 256 + 1 is 256."""
    q, weights, key = torch.tensor([256.0, 1.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2), torch.ones(1, 1, 1)
    assert op.index_scores(*(t.bfloat16() for t in (q, weights, key))).item() == 257


def test_scores_that_are_not_numbers_still_choose_k() -> None:
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [torch.nan] * 4, [0.0, 0.0, -torch.inf, torch.inf]])
    assert topk_lowest_index_first(scores, 2).tolist() == [[1, 2], [0, 1], [0, 3]]


@pytest.mark.parametrize(("S", "C"), [(0, 5), (3, 0)])
def test_nothing_to_select(S: int, C: int) -> None:
    inputs = (torch.zeros(2, S, 4, 8), torch.zeros(2, S, 4), torch.zeros(2, C, 8), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(index_topk(*inputs, 3), torch.full((2, S, 3), -1, dtype=torch.int32))
