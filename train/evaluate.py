"""Quality on held-out windows: what the dense model loses, what selection at k loses, what the indexer catches."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import torch
from torch import Tensor

from dsa_export.cli import progress_bar
from dsa_export.model import DSAForCausalLM, dense_twin
from train import precision
from train.data import IGNORED, Windows
from train.losses import IndexerObserver


@torch.no_grad()
def evaluate(
    model: DSAForCausalLM, windows: Windows, *, batch_size: int = 1, compute_dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Evaluates a model with an indexer on windows it was not trained on, and leaves its switches as they were.

    Returns:
        loss_dense, loss_sparse: cross-entropy per label with everything attended to, and with the k selected.
        kl: of the indexer against the dense attention, over all visible keys, per token.
        recall, recall_window, recall_best: shares of attention mass, see train.losses.IndexerLoss. None of them is
            reported if no window is longer than k.
        recall_normalised: (recall − window) / (best − window): 0 is a sliding window, 1 the best possible selection.
        tokens_per_s_dense, tokens_per_s_sparse: decoding with a cache that holds the first window, in torch. The fair
            comparison, on engines, is bench/compare.py.

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
            dense = model(**batch, use_cache=False, observer=IndexerObserver(topk, measure_every=1))
            means["loss_dense"].add(dense.loss, labels)
            means["kl"].add(dense.aux_losses["kl"], int(lengths.sum()))
            crowded = int((lengths - min(model.config.topk_per_layer)).clamp(min=0).sum())
            for name in ("recall", "recall_window", "recall_best"):
                means[name].add(dense.aux_losses[name], crowded)
            model.sparse = True
            means["loss_sparse"].add(model(**batch, use_cache=False).loss, labels)
            progress.advance(task)
        result = {name: mean.value for name, mean in means.items() if mean.weight}
        model.eval()
        model.sparse = True
        first = windows.batch(torch.zeros(1, dtype=torch.int64), device)["input_ids"]
        result["tokens_per_s_dense"] = _decoded_tokens_per_second(dense_twin(model), first)
        result["tokens_per_s_sparse"] = _decoded_tokens_per_second(model, first)
    if "recall" in result:
        room = result["recall_best"] - result["recall_window"]
        result["recall_normalised"] = (result["recall"] - result["recall_window"]) / room if room > 0 else 1.0
    model.train(was_training)
    model.sparse = was_sparse
    return result


def _decoded_tokens_per_second(model: DSAForCausalLM, input_ids: Tensor, tokens: int = 8) -> float:
    """One token at a time after the prompt input_ids [1, T]. The prompt is read in the masked form: it is not timed."""
    cache = model.train()(input_ids, use_cache=True, logits_to_keep=1).cache
    model.eval()
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        model(input_ids[:, -1:], cache=cache, use_cache=True)
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


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
