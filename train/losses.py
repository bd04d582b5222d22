"""The indexer's loss: KL(p ‖ softmax(I)) against the attention of the model itself, in bounded memory.

Shapes: B batch, T tokens, Hq/Hkv query/KV heads, D head size, Hi/Di indexer heads/size, K = k.

    index_q        [B, T, Hi, Di]  rotated                    } trained by this loss
    index_weights  [B, T, Hi]      Hi^-1/2 Di^-1/2 included   }
    index_k        [B, T, Di]      rotated                    }
    q              [B, Hq, T, D]   rotated  }
    k              [B, Hkv, T, D]  rotated  } the teacher, never given a gradient
    value_norms    [B, Hq, T]      ‖W_O,h v‖, what each key of weight 1 adds to the layer's output (`output` only)
    lengths        [B]             int64; valid tokens of each row, which is padded on the right
    indices        [B, T, K]       int32, -1 fills; None: every visible key counts (warm-up)

For a query t, p is the target made of the attention probabilities a_h of the query heads, and I the index score. Both
are distributions over the same keys: all visible ones in the warm-up, the selected ones in the joint stage. The loss is
the mean over the valid queries of KL(p ‖ softmax(I)): padding rows neither add to the sum nor to the count.
With `every` = n the mean is taken over each n-th query only: 1/n of the work, every key still counts. indexer_kl() is
then given these queries alone: Q of them in place of T in index_q, index_weights, q and indices.

Targets:
    mean    p = mean_h a_h, as published (DeepSeek-V3.2-Exp, section 2.1).
    rms     p ∝ (mean_h a_h²)^½. A key that one head needs ranks above one that all heads look at a little: of the k
            best keys by either measure, these keep the layer's output better.
    output  p ∝ (mean_h (a_h ‖W_O,h v‖)²)^½. What heads look at without taking much from it counts for less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsa_export.model import AttentionTrace
from dsa_export.model.attention.base import NOTHING
from dsa_export.topk import TopK
from plugins.index_topk.op import topk_lowest_index_first

TILE = {"cpu": 32, "cuda": 512}
"""Query rows handled at a time: little enough for a CPU's caches, enough to fill a GPU. See tile_rows()."""
FEW_KEYS = 2048

TARGETS = ("rms", "output", "mean")

LOWEST = -1e30
"""Stands for the logarithm of a probability of 0 where it is multiplied by 0."""


def indexer_kl_reference(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    q: Tensor,
    k: Tensor,
    value_norms: Tensor,
    lengths: Tensor,
    scale: float,
    indices: Tensor | None = None,
    every: int = 1,
    first: int = 0,
    target: str = TARGETS[0],
) -> Tensor:
    """The definition, differentiable by autograd: holds [B, Hq, T, T] scores. For the tests."""
    T = q.shape[2]
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(len(q), T, T)
    if indices is not None:
        slots = torch.where(indices >= 0, indices, T).long()
        selected = torch.zeros(*indices.shape[:2], T + 1, dtype=torch.bool).scatter(-1, slots, True)
        visible = visible & selected[..., :T]
    k_BHTD = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k_BHTD.transpose(-1, -2) * scale).masked_fill(~visible[:, None], -torch.inf)
    a = scores.softmax(-1).detach()
    weighed = a * value_norms[:, :, None] if target == "output" else a
    p = a.mean(1) if target == "mean" else weighed.square().mean(1).sqrt()
    p = p / p.sum(-1, keepdim=True)
    activations = torch.relu(torch.einsum("bthd,bsd->bths", index_q, index_k))
    index_scores = torch.einsum("bth,bths->bts", index_weights, activations).masked_fill(~visible, -torch.inf)
    log_student = torch.where(visible, index_scores.log_softmax(-1), 0)
    kl_per_row = (torch.xlogy(p, p) - p * log_student).sum(-1)
    t = torch.arange(T)
    valid = (t < lengths[:, None]) & (t % every == first)
    return kl_per_row[valid].mean()


def tile_rows(keys: int, device: str) -> int:
    """R, query rows handled at a time that see at most so many keys."""
    return TILE[device] * (2 if keys <= FEW_KEYS else 1)


def peak_bytes(T: int, Hq: int, Hkv: int, Hi: int, Di: int) -> int:
    """What indexer_kl and its backward hold at most, beside their inputs, for one row of T tokens in fp32 on a CPU.

    A tile keeps p, and first the scores and the probabilities of one KV head's group, then the indexer's activations
    and five [R, T] of its scores, all within the call. The gradients of the inputs stay, twice while they are scaled.
    """
    tile = tile_rows(T, "cpu") * T * (1 + max(2 * Hq // Hkv, Hi + 5))
    return 4 * (tile + 2 * T * (Hi * Di + Hi + Di))


@dataclass(frozen=True)
class IndexerLoss:
    """Scalars. `kl` carries the gradient; the shares of attention mass do not, and are None if not measured.

    Over the queries that see more than k keys: `recall` is the share of the (full, dense) attention mass that falls
    on the indexer's k keys, `window` on the last k keys, `best` on the k keys of most mass: no selection gets more.
    """

    kl: Tensor
    recall: Tensor | None = None
    window: Tensor | None = None
    best: Tensor | None = None


def indexer_kl(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    q: Tensor,
    k: Tensor,
    value_norms: Tensor,
    lengths: Tensor,
    scale: float,
    indices: Tensor | None = None,
    *,
    target: str = TARGETS[0],
    every: int = 1,
    first: int = 0,
    topk: int = 0,
    measure_every: int = 0,
) -> IndexerLoss:
    """The loss of indexer_kl_reference, exactly, without ever holding [T, T]. Shapes: see the top of this file.

    Args:
        target: one of TARGETS.
        every, first: the queries stand at first, first + every, … (0 ≤ first < every; the shortest row has one).
        topk: k of the measured shares. With `indices` the recall is theirs.
        measure_every: measure the shares on every n-th of these queries; 0: not at all.
    """
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (index_q, index_weights, index_k))
    options = (target, every, first, topk, measure_every, with_gradient)
    teacher = (q, k, value_norms)
    kl, shares = _IndexerKL.apply(index_q, index_weights, index_k, *teacher, lengths, scale, indices, *options)
    return IndexerLoss(kl, *shares.unbind()) if measure_every else IndexerLoss(kl)


class _IndexerKL(torch.autograd.Function):
    """Computes the gradient together with the loss, tile by tile; backward only scales it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        index_q: Tensor,
        index_weights: Tensor,
        index_k: Tensor,
        q: Tensor,
        k: Tensor,
        value_norms: Tensor,
        lengths: Tensor,
        scale: float,
        indices: Tensor | None,
        target: str,
        every: int,
        first: int,
        topk: int,
        measure_every: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        accumulator = torch.promote_types(index_q.dtype, torch.float32)
        positions = [torch.arange(first, length, every, device=q.device) for length in lengths.tolist()]
        valid_rows = sum(map(len, positions))
        kl = torch.zeros((), dtype=accumulator, device=q.device)
        shares = _AttentionShares(topk, accumulator, q.device)
        d_index_q, d_index_weights = torch.zeros_like(index_q), torch.zeros_like(index_weights)
        d_index_k = torch.zeros_like(index_k, dtype=accumulator)

        for b, rows in _tiles(positions):
            # From here on: R query rows, which see no key beyond C = stop.
            at = positions[b][rows]
            stop = int(at[-1]) + 1
            q_HRD, k_HCD = (q[b, :, rows] * scale).contiguous(), k[b, :, :stop]
            index_q_RHD, index_k_CD = index_q[b, rows], index_k[b, :stop]
            weights_RH = index_weights[b, rows].to(accumulator)
            visible = torch.arange(stop, device=q.device) <= at[:, None]
            support = visible if indices is None else _selection_mask(indices[b, rows], stop)
            certain = int(at[0]) + 1 if indices is None else 0  # so many keys, from the left, count for every row

            norms_HC = value_norms[b, :, :stop] if target == "output" else None
            p = attention_target(q_HRD, k_HCD, support, target, certain, norms_HC).to(accumulator)
            active_RHC = (index_q_RHD @ index_k_CD.T).relu_()
            activations_RHC = active_RHC.to(accumulator)
            scores = _mask(torch.bmm(weights_RH[:, None], activations_RHC)[:, 0], support, certain)
            log_student = scores.log_softmax(-1)
            kl += (torch.xlogy(p, p) - p * log_student.clamp(min=LOWEST)).sum()

            if measure_every:
                some = slice(-(rows.start + 1) % measure_every, None, measure_every)
                dense = mean_attention(q_HRD[:, some], k_HCD, visible[some])
                shares.add(dense, at[some, None], None if indices is None else support[some], scores[some])

            if with_gradient:
                d_scores = log_student.exp_().sub_(p).div_(valid_rows)  # 0 outside the support: exp(-inf) = 0 = p
                # With the scores on the left: with a column on the right CPU libraries take ten times as long.
                d_weights = torch.bmm(d_scores[:, None], activations_RHC.transpose(1, 2))
                d_index_weights[b, rows] = d_weights[:, 0].to(index_q.dtype)
                # ReLU's gradient, in place. The weights are the same for all keys: they multiply the small products.
                d_scores = d_scores.to(index_q.dtype)
                torch.ops.aten.threshold_backward(d_scores[:, None], active_RHC, 0, grad_input=active_RHC)
                d_active = active_RHC.flatten(0, 1)
                weights_RH1 = index_weights[b, rows, :, None]
                d_index_q[b, rows] = (d_active @ index_k_CD).view_as(index_q_RHD) * weights_RH1
                d_index_k[b, :stop] += d_active.T @ (index_q_RHD * weights_RH1).flatten(0, 1)
                del d_active, d_scores
            del p, active_RHC, activations_RHC, scores, log_student  # or they would live on beside the next tile's

        ctx.save_for_backward(d_index_q, d_index_weights, d_index_k.to(index_k.dtype))
        result, measured = kl / valid_rows, shares.means()
        ctx.mark_non_differentiable(measured)
        return result, measured

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl: Tensor, _d_shares: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = (gradient * d_kl.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (*gradients, *[None] * 12)


def _tiles(positions: list[Tensor]) -> Iterator[tuple[int, slice]]:
    """(row b of the batch, the queries of a tile) for the queries at these positions of each row."""
    for b, of_row in enumerate(positions):
        rows = tile_rows(int(of_row[-1]) + 1, of_row.device.type)
        for start in range(0, len(of_row), rows):
            yield b, slice(start, min(start + rows, len(of_row)))


def _selection_mask(indices: Tensor, keys: int) -> Tensor:
    """[R, K] with -1 fills -> [R, keys] bool."""
    slots = torch.where(indices >= 0, indices, keys).long()
    mask = torch.zeros(len(indices), keys + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, slots, True)[:, :keys]


def _mask(scores: Tensor, support: Tensor, certain: int) -> Tensor:
    """scores [..., R, C] with -inf outside the support [R, C], in place; the first `certain` columns are inside."""
    scores[..., certain:].masked_fill_(~support[:, certain:], -torch.inf)
    return scores


def _attention(q_HRD: Tensor, k_HCD: Tensor, support: Tensor, certain: int) -> Iterator[Tensor]:
    """The attention probabilities [G, R, C] of one KV head's group of query heads after the other; 0 outside the
    support [R, C] bool, whose first `certain` columns are all True. q is scaled already."""
    dtype = torch.promote_types(q_HRD.dtype, torch.float32)
    for q_GRD, k_CD in zip(q_HRD.unflatten(0, (len(k_HCD), -1)), k_HCD, strict=True):
        yield _mask((q_GRD @ k_CD.T).to(dtype), support, certain).softmax(-1)


def mean_attention(q_HRD: Tensor, k_HCD: Tensor, support: Tensor) -> Tensor:
    """The mean of the query heads' attention probabilities over the support [R, C] bool. q is scaled already."""
    return torch.stack([a_GRC.sum(0) for a_GRC in _attention(q_HRD, k_HCD, support, 0)]).sum(0) / len(q_HRD)


def attention_target(
    q_HRD: Tensor, k_HCD: Tensor, support: Tensor, target: str, certain: int = 0, norms_HC: Tensor | None = None
) -> Tensor:
    """What the indexer is to learn, a distribution over the support [R, C]: see the top of this file.

    The first `certain` columns of the support are all True. norms_HC: of the values, for `output`. q is scaled already.
    """
    sums = torch.zeros(support.shape, dtype=torch.promote_types(q_HRD.dtype, torch.float32), device=q_HRD.device)
    norms = iter(()) if norms_HC is None else iter(norms_HC.unflatten(0, (len(k_HCD), -1)).unsqueeze(2))
    for a_GRC in _attention(q_HRD, k_HCD, support, certain):
        if norms_HC is not None:
            a_GRC *= next(norms)
        sums += (a_GRC if target == "mean" else a_GRC.square_()).sum(0)
        del a_GRC  # or it would live on beside the next group's, as it would in a zip
    if target != "mean":
        sums.sqrt_()
    return sums.div_(sums.sum(-1, keepdim=True))


class _AttentionShares:
    """Sums of the attention mass caught by the indexer, a window and the best choice, over rows that see > k keys."""

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device):
        self.k = k
        self.sums = torch.zeros(3, dtype=dtype, device=device)
        self.rows = 0

    def add(self, dense: Tensor, positions: Tensor, selected: Tensor | None, scores: Tensor) -> None:
        """Probabilities [R, C], positions [R, 1], selection [R, C] (None: the k best scores), index scores [R, C]."""
        crowded = positions[:, 0] >= self.k
        if not crowded.any():
            return
        dense, positions = dense[crowded], positions[crowded]
        slots = torch.arange(dense.shape[-1], device=dense.device)
        window = (slots <= positions) & (slots > positions - self.k)
        if selected is None:
            caught = dense.gather(-1, topk_lowest_index_first(scores[crowded], self.k))
        else:
            caught = dense * selected[crowded]
        best = dense.topk(self.k, dim=-1).values
        self.sums += torch.stack([caught.sum(), (dense * window).sum(), best.sum()])
        self.rows += len(dense)

    def means(self) -> Tensor:
        return self.sums / self.rows if self.rows else torch.ones_like(self.sums)


def queries_apart(attention_mask: Tensor, queries: int | None) -> int:
    """n, if each n-th query of a batch is to count and about `queries` of its shortest row (None: all of them)."""
    return max(1, int(attention_mask.sum(1).min()) // queries) if queries else 1


class IndexerObserver:
    """What the model calls on every layer of one call: the KL, and with `measure_every` the shares of attention mass.

    `every`: the KL is taken over each n-th query, from the one numbered `first` (None: a random one) on, the same for
    all layers.

    Layers that follow one selection each have a KL with the indexer's distribution: its gradient is that of one KL with
    the mean of their targets. With pooled keys all tokens of a group have one score, and the gradient is that of a KL
    between groups; a query's own group, which is always selected, counts there with its later tokens in the mean.

    Returns {"kl"[, "recall", "recall_window", "recall_best"]}; the model averages them over the layers.
    """

    def __init__(
        self, topk: TopK, measure_every: int = 0, every: int = 1, target: str = TARGETS[0], first: int | None = None
    ):
        self.topk = topk
        self.target = target
        self.measure_every = measure_every
        self.every = every
        self.first = int(torch.randint(every, ())) if first is None and every > 1 else first or 0

    @property
    def queries(self) -> slice:
        """Those that count."""
        return slice(self.first, None, self.every)

    def __call__(self, trace: AttentionTrace) -> dict[str, Tensor]:
        return self.terms(trace.of_queries(self.queries))

    def terms(self, trace: AttentionTrace) -> dict[str, Tensor]:
        """The same for a trace of those queries alone."""
        if trace.k.shape[2] != trace.index_k.shape[1]:
            raise ValueError("the indexer is trained on calls without cache")
        with torch.autocast(trace.q.device.type, enabled=False):
            loss = indexer_kl(
                trace.index_q,
                trace.index_weights,
                trace.scored_k,
                trace.q.detach(),
                trace.k.detach(),
                trace.value_norms() if self.target == "output" else NOTHING,
                trace.lengths,
                trace.scale,
                trace.indices,
                target=self.target,
                every=self.every,
                first=self.first,
                topk=self.topk if isinstance(self.topk, int) else self.topk[trace.layer],
                measure_every=self.measure_every,
            )
        terms = {"kl": loss.kl, "recall": loss.recall, "recall_window": loss.window, "recall_best": loss.best}
        return {name: term for name, term in terms.items() if term is not None}
