"""The ladder: what a model loses under selection, from the keys of most attention mass down to a sliding window.

    dense      everything visible: the model's own ceiling
    full       its selection with k of at least the length: must equal dense, or the figures below mean nothing
    best       the k keys of most attention mass (mean over the heads) in every layer with an indexer
    output     the k keys that add most to the layer's output (the target of that name, train.losses), likewise
    trained    the checkpoint's indexer
    random     an indexer of the same size with random weights
    window     the last k keys

All rungs of a window share one dense forward. Selections run in the masked form (the model's training mode): the same
function of its inputs, and on a CPU the fast one. Logits are never held for a whole window.

Shapes: T tokens of a window (one row), E hidden size, V vocabulary, N labelled tokens, K = k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.model import AttentionTrace, DSAForCausalLM, Selector
from dsa_export.model.attention.dsa import Indexer
from dsa_export.model.cache import DSACache
from dsa_export.topk import TopK, topk_per_layer
from plugins.index_topk.op import topk_lowest_index_first
from train.data import IGNORED
from train.losses import attention_target
from train.selection import ROWS

RUNGS = ("best", "output", "trained", "random", "window")
BEST_BY = {"best": "mean", "output": "output"}
"""Rungs that select by a target of the indexer."""
HEAD_ROWS = 256
"""Rows whose logits are held at a time."""
BLOCK, WINDOWS = 64, 8
"""The spread of an increase is that between windows, if there are so many, else that between blocks of so many tokens.
Tokens near each other miss the same keys, and so do blocks of one text: taken as independent, they give too small an
error (blocks one by a quarter to two fifths, on small models)."""


@dataclass
class Score:
    """Sums over labelled tokens: cross-entropy, KL(reference ‖ this) in nats, tokens both predict alike.

    blocks, windows: of each BLOCK tokens, and of each window, by how much the cross-entropy is above the reference's,
    and that.
    """

    loss: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0
    blocks: list[tuple[float, float]] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)

    def __iadd__(self, other: Score) -> Score:
        for term in fields(self):
            setattr(self, term.name, getattr(self, term.name) + getattr(other, term.name))
        return self

    @property
    def increase_error(self) -> float | None:
        """Standard error of the increase relative to the reference, a ratio of sums; None of a single block."""
        parts = self.windows if len(self.windows) >= WINDOWS else self.blocks
        n = len(parts)
        if n < 2:
            return None
        increase, reference = (sum(sums) for sums in zip(*parts, strict=True))
        unexplained = sum((one - increase / reference * base) ** 2 for one, base in parts)
        return sqrt(n / (n - 1) * unexplained) / reference


@torch.no_grad()
def hidden_states(
    model: DSAForCausalLM, input_ids: Tensor, rung: str, topk: TopK, cache: DSACache | None = None
) -> Tensor:
    """input_ids [1, T] → the last hidden states [T, E] at one rung. "random" needs random_indexers() around it.

    After what a cache holds, which stays as it was; there in the gathering form, for few tokens the cheaper one.
    """
    ks = topk_per_layer(topk, len(model.model.layers))
    selector: Selector | None = None
    if rung in BEST_BY:
        selector = lambda trace: best_selection(trace, ks[trace.layer], BEST_BY[rung])  # noqa: E731
    elif rung == "window":
        selector = lambda trace: window_selection(trace, ks[trace.layer])  # noqa: E731
    model.train(cache is None)
    model.sparse = rung != "dense"
    model.set_topk(ks)
    return states_after(model, input_ids, cache, selector=selector)


def states_after(model: DSAForCausalLM, input_ids: Tensor, cache: DSACache | None, **watch: Any) -> Tensor:
    """input_ids [1, T] → the last hidden states [T, E] after what a cache holds, which stays as it was."""
    states = model.model(input_ids, cache=cache, use_cache=cache is not None, **watch).last_hidden_state[0]
    if cache is not None:
        cache.crop(-input_ids.shape[1])
    return states


def best_selection(trace: AttentionTrace, k: int, target: str) -> Tensor:
    """The k visible keys that a target of the indexer puts first: indices [B, T, K]."""
    B, _, T, _ = trace.q.shape
    most = int(trace.kv_lengths.max())
    indices = torch.full((B, T, min(k, most)), -1, dtype=torch.int32, device=trace.q.device)
    norms = trace.value_norms() if target == "output" else None
    for b in range(B):
        past = int(trace.kv_lengths[b]) - T
        for start in range(0, T, ROWS):
            stop = min(start + ROWS, T)
            keys = past + stop
            positions = torch.arange(past + start, keys, device=trace.q.device)[:, None]
            visible = torch.arange(keys, device=trace.q.device) <= positions
            norms_HC = None if norms is None else norms[b, :, :keys]
            q_HRD = trace.q[b, :, start:stop] * trace.scale
            p = attention_target(q_HRD, trace.k[b, :, :keys], visible, target, norms_HC=norms_HC)
            best = topk_lowest_index_first(p.masked_fill(~visible, -1), min(k, keys))
            indices[b, start:stop, : best.shape[-1]] = torch.where(best <= positions, best, -1).int()
    return indices


def window_selection(trace: AttentionTrace, k: int) -> Tensor:
    """The last k keys, the query's own included: indices [B, T, K]."""
    T = trace.q.shape[2]
    positions = trace.kv_lengths[:, None, None] - T + torch.arange(T, device=trace.q.device)[:, None]
    indices = positions - torch.arange(min(k, int(trace.kv_lengths.max())), device=trace.q.device)
    return torch.where(indices >= 0, indices, -1).int()


@contextmanager
def random_indexers(model: DSAForCausalLM, seed: int = 0) -> Iterator[None]:
    """Within the context the indexer of every layer has random weights."""
    attentions: list[Any] = [layer.self_attn for layer in model.model.layers]
    layers = [attention for attention in attentions if attention.leads]
    trained = [attention.indexer for attention in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attention in layers:
            fresh = Indexer(model.config)
            fresh.apply(model._init_weights)
            attention.indexer = fresh.to(attention.o_proj.weight).requires_grad_(False)  # or autocast keeps copies
    try:
        yield
    finally:
        for attention, indexer in zip(layers, trained, strict=True):
            attention.indexer = indexer


@torch.no_grad()
def score(
    heads: Mapping[str, nn.Linear], hidden: Mapping[str, Tensor], labels: Tensor, references: Sequence[str] = ("dense",)
) -> dict[str, dict[str, Score]]:
    """Scores hidden states [T, E] of a window by name against those of each reference: {reference: {name: Score}}.

    heads: the output layer of every name that does not use that of "dense".
    labels: [T], -100 ignored; shifted here.
    """
    rows = (labels[1:] != IGNORED).nonzero()[:, 0]
    scores = {reference: {name: Score() for name in hidden} for reference in references}
    for chunk in rows.split(HEAD_ROWS):
        target = labels[chunk + 1][:, None]
        wanted = {name: _log_probabilities(heads.get(name, heads["dense"]), hidden[name][chunk]) for name in references}
        probabilities = {name: log_p.exp() for name, log_p in wanted.items()}
        for name, states in hidden.items():
            log_q = (
                wanted[name] if name in wanted else _log_probabilities(heads.get(name, heads["dense"]), states[chunk])
            )
            losses, predicted = -log_q.gather(1, target).double(), log_q.argmax(-1)
            for reference, log_p in wanted.items():
                reference_losses = -log_p.gather(1, target).double()
                both = zip((losses - reference_losses).split(BLOCK), reference_losses.split(BLOCK), strict=True)
                scores[reference][name] += Score(
                    loss=float(losses.sum()),
                    kl=float((probabilities[reference] * (log_p - log_q)).sum()),
                    agree=int((log_p.argmax(-1) == predicted).sum()),
                    tokens=len(chunk),
                    blocks=[(float(increases.sum()), float(base.sum())) for increases, base in both],
                )
    for reference, of_reference in scores.items():
        base = of_reference[reference].loss
        for one in of_reference.values():
            one.windows = [(one.loss - base, base)]
    return scores


def _log_probabilities(head: nn.Linear, hidden: Tensor) -> Tensor:
    return head(hidden).float().log_softmax(-1)


@torch.no_grad()
def full_selection_error(model: DSAForCausalLM, input_ids: Tensor, dense: Tensor) -> tuple[float, float]:
    """(largest difference, what rounding allows) of the logits with everything selected, k = T, from dense.

    input_ids [1, T], dense [T, E] hidden states of the same tokens. The logits are those of the HEAD_ROWS tokens whose
    hidden states differ most: on a real model all of them would cost as much as the forward.
    """
    everything = input_ids.shape[1] // model.config.index_pool * model.config.index_pool
    input_ids, dense = input_ids[:, :everything], dense[:everything]  # k is a multiple of the pool
    full = hidden_states(model, input_ids, "trained", everything)
    rows = (full - dense).norm(dim=-1).topk(min(HEAD_ROWS, len(dense))).indices  # NaN counts as the largest
    expected = model.lm_head(dense[rows])
    error = float((model.lm_head(full[rows]) - expected).abs().max())
    return error, max(1e-3, 16 * torch.finfo(expected.dtype).eps * float(expected.abs().max()))
