"""The indexer's loss against its definition, and what the original got wrong about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_export.model import AttentionTrace
from plugins.index_topk import index_topk
from tests.conftest import Largest
from train import losses
from train.losses import TARGETS, IndexerObserver, attention_target, indexer_kl, indexer_kl_reference, queries_apart

SCALE = 0.3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.TILE, "cpu", 16)
    monkeypatch.setattr(losses, "FEW_KEYS", 24)


def inputs(B: int = 3, T: int = 50, Hi: int = 3, Di: int = 8, Hq: int = 6, Hkv: int = 2, dtype=torch.float32, seed=0):
    """index_q, index_weights, index_k (to be trained), q, k, value_norms (the teacher)."""
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(*shape, generator=g, dtype=dtype) for shape in ((B, T, Hi, Di), (B, T, Hi), (B, T, Di))]
    teacher = [torch.randn(B, heads, T, 8, generator=g, dtype=dtype) for heads in (Hq, Hkv)]
    norms = torch.rand(B, Hq, T, generator=g, dtype=dtype)
    return [*(x.requires_grad_() for x in student), *teacher, norms]


def selection(tensors: list[Tensor], k: int) -> Tensor:
    index_q, index_weights, index_k = (x.detach() for x in tensors[:3])
    return index_topk(index_q, index_weights, index_k, torch.full((len(index_q),), index_q.shape[1]), k)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("k", [None, 1, 7])
@pytest.mark.parametrize(
    "lengths, every, first", [([50, 50, 50], 1, 0), ([50, 1, 23], 1, 0), ([50, 50, 50], 2, 1), ([50, 4, 23], 4, 3)]
)
def test_loss_and_gradients_equal_the_definition(
    target: str, k: int | None, lengths: list[int], every: int, first: int
) -> None:
    tensors = inputs()
    indices = selection(tensors, k) if k else None
    expected = indexer_kl_reference(*tensors, torch.tensor(lengths), SCALE, indices, every, first, target)
    index_q, index_weights, index_k, q, k_BHTD, norms = tensors
    rows = slice(first, None, every)
    of_queries = (index_q[:, rows], index_weights[:, rows], index_k, q[:, :, rows], k_BHTD, norms)
    chosen = None if indices is None else indices[:, rows]
    actual = indexer_kl(*of_queries, torch.tensor(lengths), SCALE, chosen, target=target, every=every, first=first).kl
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * actual, tensors[:3]), torch.autograd.grad(3 * expected, tensors[:3]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.TILE, "cpu", 4)
    tensors = inputs(B=2, T=7, Hi=2, Di=2, dtype=torch.float64)
    lengths = torch.tensor([7, 3])
    assert torch.autograd.gradcheck(lambda *student: indexer_kl(*student, *tensors[3:], lengths, SCALE).kl, tensors[:3])


def test_the_loss_is_averaged_over_rows_not_elements() -> None:
    """Bug of the original: kl_div averages over elements, so the loss shrinks with the number of keys."""
    tensors = inputs(B=1, T=40)
    T, G = 40, 3
    total = 0.0
    for t in range(T):
        scores = torch.einsum("hd,hsd->hs", tensors[3][0, :, t], tensors[4][0, :, : t + 1].repeat_interleave(G, 0))
        p = (scores * SCALE).softmax(-1).mean(0)
        dots = tensors[0][0, t] @ tensors[2][0, : t + 1].T
        log_q = (tensors[1][0, t] @ dots.relu()).log_softmax(-1)
        total += (p * (p.log() - log_q)).sum().item()
    loss = indexer_kl(*tensors, torch.tensor([40]), SCALE, target="mean")
    assert loss.kl.item() == pytest.approx(total / T, rel=1e-4)


def test_the_target_ranks_what_one_head_needs_above_what_all_look_at_a_little() -> None:
    """Key 0 has less of the two heads' mean than key 1 (0.15, 0.2), and more of their root mean square."""
    a = torch.tensor([[0.3, 0.2, 0.5], [0.0, 0.2, 0.8]])
    q, k = torch.eye(2)[:, None], a.log().clamp(min=-99).T[None]  # the scores are the logarithms
    everything = torch.ones(1, 3, dtype=torch.bool)
    mean, rms = (attention_target(q, k, everything, target)[0] for target in ("mean", "rms"))
    torch.testing.assert_close(mean, a.mean(0))
    roots = a.square().mean(0).sqrt()
    torch.testing.assert_close(rms, roots / roots.sum())
    assert mean[0] < mean[1] and rms[0] > rms[1]
    # The first head's value of key 0 is nothing, nor is its output then changed by it.
    norms = torch.tensor([[1e-9, 1, 1], [1, 1, 1]])
    output = attention_target(q, k, everything, "output", norms_HC=norms)[0]
    assert output[0] < 1e-6 and output[1] / output[2] == pytest.approx(float(rms[1] / rms[2]))


def test_the_warm_up_sees_keys_that_the_indexer_did_not_choose() -> None:
    """Bug of the original: the KL looks only at the keys that the indexer itself chose."""
    tensors = inputs(B=1, T=30)
    missed = sorted(set(range(30)) - set(selection(tensors, 4)[0, -1].tolist()))
    teacher_moved = [tensors[3], tensors[4].clone(), tensors[5]]
    teacher_moved[1][:, :, missed] += 1.0
    lengths, indices = torch.tensor([30]), selection(tensors, 4)
    dense = [indexer_kl(*tensors[:3], *teacher, lengths, SCALE) for teacher in (tensors[3:], teacher_moved)]
    d_k = torch.autograd.grad(dense[0].kl, tensors[2])[0]
    assert (d_k[0, missed[0]] != 0).any() and dense[0].kl != dense[1].kl
    # In the joint stage the last row's loss is about the selected keys alone.
    only_last = torch.full_like(indices, -1)
    only_last[:, -1] = indices[:, -1]
    d_k = torch.autograd.grad(indexer_kl(*tensors, lengths, SCALE, indices).kl, tensors[2])[0]
    unselected = sorted(set(range(30)) - set(indices.flatten().tolist()))
    assert (d_k[0, unselected] == 0).all()


def test_an_observer_measures_a_layer_at_its_own_k_and_exactly_under_autocast() -> None:
    index_q, index_weights, index_k, q, k, norms = tensors = inputs()
    lengths = torch.tensor([50, 50, 50])
    indexed = (index_q, index_weights, index_k, index_k)
    trace = AttentionTrace(1, q, k, lambda: norms, *indexed, None, lengths, lengths, SCALE)
    expected = indexer_kl(*tensors, lengths, SCALE, topk=4, measure_every=1)
    observer = IndexerObserver([30, 4], measure_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        terms = observer(trace)
    assert torch.equal(terms["kl"], expected.kl) and torch.equal(terms["recall"], expected.recall)
    with pytest.raises(ValueError, match="calls without cache"):
        observer(replace(trace, k=torch.cat([k, k], dim=2)))


def test_the_queries_that_count_begin_anywhere() -> None:
    """Or of each window, pass after pass, the same would be learned from."""
    torch.manual_seed(0)
    assert {IndexerObserver(8, every=4).first for _ in range(40)} == {0, 1, 2, 3}


def test_the_shortest_row_decides_how_far_queries_are_apart() -> None:
    """Wherever they begin, every row has one."""
    mask = (torch.arange(20) < torch.tensor([20, 7])[:, None]).long()
    assert [queries_apart(mask, queries) for queries in (3, 50, None)] == [2, 1, 1]
    assert all(IndexerObserver(8, every=queries_apart(mask, 1)).first < 7 for _ in range(40))


@pytest.mark.parametrize("k", [None, 5])
def test_padding_rows_do_not_count(k: int | None) -> None:
    """Bug of the original: padding rows count in the loss. Here poison in the padding changes nothing."""
    tensors = inputs(B=2, T=40)
    lengths = torch.tensor([40, 17])
    indices = selection(tensors, k) if k else None
    alone = [
        indexer_kl(*(x[b : b + 1, :n] if x.shape[1] == 40 else x[b : b + 1, :, :n] for x in tensors),
                   torch.tensor([n]), SCALE, indices[b : b + 1, :n] if k else None).kl
        for b, n in enumerate(lengths.tolist())
    ]  # fmt: skip
    with torch.no_grad():
        for x in tensors:
            (x[1, 17:] if x.shape[1] == 40 else x[1, :, 17:]).fill_(torch.nan)
    together = indexer_kl(*tensors, lengths, SCALE, indices).kl
    torch.testing.assert_close(together, (40 * alone[0] + 17 * alone[1]) / 57)
    for gradient in torch.autograd.grad(together, tensors[:3]):
        assert gradient.isfinite().all() and (gradient[1, 17:] == 0).all()


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 40), k=st.integers(1, 45), every=st.integers(1, 5), seed=st.integers(0, 99))
def test_shares_of_attention_mass(T: int, k: int, every: int, seed: int) -> None:
    tensors = inputs(B=1, T=T, seed=seed)
    lengths = torch.tensor([T])
    p = (tensors[3] @ tensors[4].repeat_interleave(3, 1).transpose(-1, -2) * SCALE).masked_fill(
        ~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1).mean(1)[0]  # fmt: skip
    chosen = selection(tensors, k)
    expected = []
    for t in range(T):
        if (t + 1) % every == 0 and t >= k:
            best = p[t].sort(descending=True).values[:k].sum()
            expected.append([p[t, chosen[0, t].long()].sum(), p[t, t + 1 - k : t + 1].sum(), best])
    want = torch.tensor(expected).mean(0) if expected else torch.ones(3)
    for indices in (None, chosen):
        loss = indexer_kl(*tensors, lengths, SCALE, indices, topk=k, measure_every=every)
        torch.testing.assert_close(torch.stack([loss.recall, loss.window, loss.best]), want)  # type: ignore[list-item]
        assert not loss.recall.requires_grad  # type: ignore[union-attr]


def test_a_perfect_indexer_has_no_loss_and_no_gradient() -> None:
    """One query head whose positive scores the indexer reproduces exactly."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.rand(1, 1, 30, 8, generator=g), torch.rand(1, 1, 30, 8, generator=g)
    index_q, index_k = q.transpose(1, 2).clone().requires_grad_(), k[:, 0].clone().requires_grad_()
    weights = torch.full((1, 30, 1), SCALE, requires_grad=True)
    norms = torch.full((1, 1, 30), 0.5)
    loss = indexer_kl(index_q, weights, index_k, q, k, norms, torch.tensor([30]), SCALE, topk=4, measure_every=1)
    assert abs(loss.kl.item()) < 1e-6
    torch.testing.assert_close(loss.recall, loss.best)
    for gradient in torch.autograd.grad(loss.kl, [index_q, weights, index_k]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a call is larger than a tile of one KV head's group, or of the indexer's heads."""
    monkeypatch.setitem(losses.TILE, "cpu", 32)
    T = 512
    tensors = inputs(B=1, T=T, Hi=4, Hq=8, Hkv=2)
    with Largest() as largest:
        indexer_kl(*tensors, torch.tensor([T]), SCALE, topk=16, measure_every=1).kl.backward()
    assert 0 < largest.numel <= 4 * 32 * T < T * T


def test_bf16_is_close_to_fp32() -> None:
    tensors = inputs()
    low = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in tensors]
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in low]
    lengths = torch.tensor([50, 50, 50])
    a, b = (indexer_kl(*x, lengths, SCALE).kl for x in (low, exact))
    assert a.dtype == torch.float32
    assert a.item() == pytest.approx(b.item(), rel=0.02)
    for ours, theirs in zip(torch.autograd.grad(a, low[:3]), torch.autograd.grad(b, exact[:3]), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.05 * theirs.norm()
