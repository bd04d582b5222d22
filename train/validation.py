"""The short evaluation that the training stages make before and after; the long one is train/evaluate.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsa_export.cli import progress_bar
from dsa_export.model import DSAForCausalLM
from train import precision
from train.cross_entropy import cross_entropy_terms
from train.data import Batch, Windows, label_count
from train.losses import TARGETS, IndexerObserver, queries_apart

Sum = tuple[float, int]
"""Of a figure, and over how many it is taken."""


@torch.no_grad()
def means(
    model: Any,
    windows: Windows,
    sums: Callable[[Batch, int], Mapping[str, Sum]],
    *,
    batch_size: int = 1,
    compute_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Means over held-out windows of what `sums` makes of each batch and its number of labels; none over nothing.

    The model is in training mode meanwhile: its masked form of selection is the same function of its inputs, and at
    these lengths much faster on a CPU than gathering for every token of a window. Its mode is left as it was.
    """
    was_training = model.training
    device = next(model.parameters()).device
    totals: dict[str, Sum] = {}
    batches = torch.arange(len(windows)).split(batch_size)
    model.train()
    with progress_bar() as progress, precision.autocast(device, compute_dtype):
        for rows in progress.track(batches, description="evaluate"):
            batch = windows.batch(rows, device)
            for name, (figure, over) in sums(batch, label_count(batch)).items():
                if over:  # a mean over nothing is NaN
                    total, count = totals.get(name, (0.0, 0))
                    totals[name] = total + figure, count + over
    model.train(was_training)
    return {name: total / count for name, (total, count) in totals.items()}


def evaluate(
    model: DSAForCausalLM,
    windows: Windows,
    *,
    batch_size: int = 1,
    compute_dtype: torch.dtype = torch.float32,
    kl_target: str = TARGETS[0],
    kl_queries: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """Evaluates a model with an indexer on windows it was not trained on, and leaves its switches as they were.

    Returns:
        loss_dense, loss_sparse: cross-entropy per label with everything attended to, and with the k selected.
        distillation: divergence, per label, of what the model predicts with the k selected from what the teacher does;
            reported if there is one.
        kl: of the indexer against the dense attention, over all visible keys, per token; it and the shares are taken
            over about kl_queries tokens of each row (None: all).
        recall, recall_window, recall_best: shares of attention mass, see train.losses.IndexerLoss. None of them is
            reported if none of these tokens sees more than k keys.
        recall_normalised: (recall − window) / (best − window): 0 is a sliding window, 1 the k keys of most mass.
    """
    was_sparse = model.sparse

    def sums(batch: Batch, labels: int) -> dict[str, Sum]:
        lengths = batch["attention_mask"].sum(1)
        every = queries_apart(batch["attention_mask"], kl_queries)
        # The measured queries see every, 2 every, … keys: each stands for so many tokens, and beyond the last is none.
        k = min(model.config.topk_per_layer)
        crowded = every * int((lengths // every - k // every).clamp(min=0).sum())
        model.sparse = False
        observer = IndexerObserver(model.config.index_topk, 1, every, kl_target, first=every - 1)
        dense = cross_entropy_terms(model, batch, observer)
        model.sparse = True
        sparse = cross_entropy_terms(model, batch, teacher=teacher)
        found = {
            "loss_dense": (dense["cross_entropy"], labels),
            "kl": (dense["kl"], int(lengths.sum())),
            **{name: (dense[name], crowded) for name in ("recall", "recall_window", "recall_best")},
            "loss_sparse": (sparse["cross_entropy"], labels),
        }
        if teacher is not None:
            found["distillation"] = (sparse["distillation"], labels)
        return {name: (mean.item() * over, over) for name, (mean, over) in found.items()}

    result = means(model, windows, sums, batch_size=batch_size, compute_dtype=compute_dtype)
    if "recall" in result:
        room = result["recall_best"] - result["recall_window"]
        result["recall_normalised"] = (result["recall"] - result["recall_window"]) / room if room > 0 else 1.0
    model.sparse = was_sparse
    return result
