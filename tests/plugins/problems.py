"""Random inputs of both operators, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.index_topk.op import index_scores
from plugins.sparse_attention.op import sparse_attention_torch


@dataclass
class TopK:
    """Arguments of index_topk. Beyond a row's length the keys are NaN: nobody may look there."""

    index_q: Tensor
    index_weights: Tensor
    index_k: Tensor
    kv_lengths: Tensor
    k: int

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        return self.index_q, self.index_weights, self.index_k, self.kv_lengths, self.k

    def visible(self, b: int, t: int) -> int:
        S, C = self.index_q.shape[1], self.index_k.shape[1]
        return min(max(int(self.kv_lengths[b]) - S + t + 1, 0), C)


def topk_problem(
    lengths: list[int], S: int, C: int, Hi: int, Di: int, k: int, dtype: torch.dtype, ties: bool, seed: int,
    poison: bool = True, device: str = "cpu",
) -> TopK:  # fmt: skip
    """`ties`: small integers, so that every arithmetic is exact, and many scores are equal (most of them 0)."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)
    shapes = ((B, S, Hi, Di), (B, S, Hi), (B, C, Di))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if ties:
        q, weights, keys = (t.round().clamp(-1, 1) for t in tensors)
        keys[..., 3:] = 0
        tensors = [q, weights, keys]
    q, weights, keys = (t.to(dtype) for t in tensors)
    if poison:
        for b, length in enumerate(lengths):
            keys[b, max(length, 0) :] = torch.nan
    return TopK(q.to(device), weights.to(device), keys.to(device), torch.tensor(lengths, device=device), k)


def exact_selection(problem: TopK) -> list[list[set[int]]]:
    """The set of every query token from fp32 scores, equal scores: lower index first."""
    q, weights, keys = (t.float().cpu() for t in (problem.index_q, problem.index_weights, problem.index_k))
    scores = index_scores(q, weights, keys)
    B, S = scores.shape[:2]

    def best(b: int, t: int) -> set[int]:
        visible = scores[b, t, : problem.visible(b, t)]
        return set(visible.argsort(descending=True, stable=True)[: problem.k].tolist())

    return [[best(b, t) for t in range(S)] for b in range(B)]


def assert_selection(indices: Tensor, problem: TopK) -> None:
    """The right number of distinct visible tokens, -1 behind them, and the best ones up to the inputs' rounding.

    Rounding: twice the error of the scores of plain torch in the inputs' own dtype against fp32.
    """
    B, S, _ = indices.shape
    arguments = problem.index_q.cpu(), problem.index_weights.cpu(), problem.index_k.cpu()
    exact = index_scores(*(t.float() for t in arguments))
    plain = index_scores(*arguments)
    assert indices.dtype == torch.int32
    for b in range(B):
        for t in range(S):
            visible = problem.visible(b, t)
            row = indices[b, t].tolist()
            count = min(visible, problem.k)
            assert row[count:] == [-1] * (problem.k - count), (b, t)
            chosen = row[:count]
            assert len(set(chosen)) == count and all(0 <= s < visible for s in chosen), (b, t)
            if count == visible:
                continue
            scores = exact[b, t, :visible]
            budget = 2 * (plain[b, t, :visible] - scores).abs().max() + 1e-6
            kth = scores.topk(count).values[-1]
            is_chosen = torch.zeros(visible, dtype=torch.bool)
            is_chosen[chosen] = True
            assert is_chosen[scores > kth + 2 * budget].all(), (b, t)
            assert (scores[is_chosen] >= kth - 2 * budget).all(), (b, t)


def sets(indices: Tensor) -> list[list[set[int]]]:
    return [[{s for s in row if s >= 0} for row in batch] for batch in indices.tolist()]


@dataclass
class Attention:
    """Arguments of sparse_attention. Cache rows that no index names are NaN: nobody may look there."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    indices: Tensor
    scale: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        return self.q, self.k_cache, self.v_cache, self.indices, self.scale


def attention_problem(
    B: int, S: int, C: int, Hkv: int, group: int, D: int, K: int, dtype: torch.dtype, seed: int,
    poison: bool = True, device: str = "cpu",
) -> Attention:  # fmt: skip
    """Indices with -1, out-of-range values and duplicates; the first token has none, the last one a short row."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Hkv * group, S, D, generator=generator).to(dtype)
    k_cache, v_cache = (torch.randn(B, Hkv, C, D, generator=generator).to(dtype) for _ in range(2))
    indices = torch.randint(-2, C + 2, (B, S, K), generator=generator).to(torch.int32)
    indices[0, 0] = -1
    indices[-1, -1, K // 2 :] = -1
    if poison:
        for b in range(B):
            unused = torch.ones(C, dtype=torch.bool)
            unused[indices[b][(indices[b] >= 0) & (indices[b] < C)].long()] = False
            unused[0] = False  # the ONNX body reads row 0 in place of a skipped entry
            k_cache[b, :, unused] = torch.nan
            v_cache[b, :, unused] = torch.nan
    tensors = (t.to(device) for t in (q, k_cache, v_cache, indices))
    return Attention(*tensors, D**-0.5)


def assert_attention(output: Tensor, problem: Attention, *, cut_off: bool = False) -> None:
    """Finite, 0 for tokens without an index, and at most twice as far from fp32 as plain torch in the same dtype.

    Beside that only what rounding the output alone may cost: plain torch is lucky on a handful of numbers. With
    `cut_off` it is not rounded to the nearest but towards 0, as Triton's interpreter does in bf16.
    """
    q, k_cache, v_cache, indices = (t.cpu() for t in problem.arguments()[:4])
    exact = sparse_attention_torch(q.double(), k_cache.double(), v_cache.double(), indices, problem.scale)
    plain = sparse_attention_torch(q, k_cache, v_cache, indices, problem.scale).float()
    assert output.shape == q.shape and output.dtype == q.dtype
    got = output.cpu().float()
    assert torch.equal(torch.isfinite(got), torch.isfinite(exact))
    C = k_cache.shape[2]
    empty = ~((indices >= 0) & (indices < C)).any(-1)
    assert not got.transpose(1, 2)[empty].any()
    rounding = torch.finfo(output.dtype).eps / (1 if cut_off else 2)
    budget = 2 * (plain - exact).norm() + rounding * exact.norm() + 1e-6 * exact.norm()
    assert (got - exact).norm() <= budget, ((got - exact).norm(), budget)
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding * exact.abs().max() + 4e-6
