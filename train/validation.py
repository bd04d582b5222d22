"""The short evaluation that the training stages make before and after; the long one is train/evaluate.py."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from dsa_export.cli import progress_bar
from dsa_export.model import DSAForCausalLM
from train import precision
from train.cross_entropy import cross_entropy_terms
from train.data import IGNORED, Windows
from train.losses import TARGETS, IndexerObserver, queries_apart


@torch.no_grad()
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
            reported if no window is longer than k.
        recall_normalised: (recall − window) / (best − window): 0 is a sliding window, 1 the k keys of most mass.

    The losses use the masked form of selection (the model's training mode): the same function of its inputs, and at
    these lengths much faster on a CPU than gathering for every token of a window.
    """
    was_training, was_sparse = model.training, model.sparse
    device = next(model.parameters()).device
    topk = model.config.index_topk
    means: dict[str, _Mean] = defaultdict(_Mean)
    batches = [windows.batch(rows, device) for rows in torch.arange(len(windows)).split(batch_size)]
    model.train()
    with progress_bar() as progress, precision.autocast(device, compute_dtype):
        task = progress.add_task("evaluate", total=len(batches))
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != IGNORED).sum())
            lengths = batch["attention_mask"].sum(1)
            model.sparse = False
            every = queries_apart(batch["attention_mask"], kl_queries)
            dense = cross_entropy_terms(model, batch, IndexerObserver(topk, 1, every, kl_target, first=every - 1))
            means["loss_dense"].add(dense["cross_entropy"], labels)
            means["kl"].add(dense["kl"], int(lengths.sum()))
            crowded = int((lengths - min(model.config.topk_per_layer)).clamp(min=0).sum())
            for name in ("recall", "recall_window", "recall_best"):
                means[name].add(dense[name], crowded)
            model.sparse = True
            sparse = cross_entropy_terms(model, batch, teacher=teacher)
            means["loss_sparse"].add(sparse["cross_entropy"], labels)
            if teacher is not None:
                means["distillation"].add(sparse["distillation"], labels)
            progress.advance(task)
        result = {name: mean.value for name, mean in means.items() if mean.weight}
    if "recall" in result:
        room = result["recall_best"] - result["recall_window"]
        result["recall_normalised"] = (result["recall"] - result["recall_window"]) / room if room > 0 else 1.0
    model.train(was_training)
    model.sparse = was_sparse
    return result


class _Mean:
    """A weighted mean of scalars."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.weight = 0

    def add(self, value: Tensor, weight: int) -> None:
        if weight:  # an empty mean is NaN
            self.sum += value.item() * weight
            self.weight += weight

    @property
    def value(self) -> float:
        return self.sum / self.weight
