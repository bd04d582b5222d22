"""The short evaluation of the training stages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dsa_export.model import load_model
from tests.train.conftest import INDEXER, batch
from train.data import Windows
from train.validation import evaluate


def test_evaluation_measures_selection(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    data = batch((40, 25))
    windows = Windows(data["input_ids"].int(), data["labels"].int(), torch.tensor([40, 25]))
    result = evaluate(model, windows, batch_size=1)
    shares = {"recall", "recall_window", "recall_best", "recall_normalised"}
    assert set(result) == {"loss_dense", "loss_sparse", "kl", *shares}
    assert result["loss_sparse"] != pytest.approx(result["loss_dense"], abs=1e-4)
    assert 0 < result["recall"] <= result["recall_best"] <= 1
    assert all(math.isfinite(value) for value in result.values())
    # Batches of different lengths do not change the means.
    together = evaluate(model, windows, batch_size=2)
    for name in ("loss_dense", "loss_sparse", "kl", "recall", "recall_window", "recall_best"):
        assert together[name] == pytest.approx(result[name], rel=1e-4), name
    # Of fewer queries the measures differ, and the losses do not.
    few = evaluate(model, windows, kl_queries=5)
    assert few["kl"] != result["kl"] and few["kl"] == pytest.approx(result["kl"], rel=0.5)
    assert [few[name] for name in ("loss_dense", "loss_sparse")] == [result["loss_dense"], result["loss_sparse"]]
    model.sparse = False
    dense = model(**data, use_cache=False).loss.item()
    assert result["loss_dense"] == pytest.approx(dense, rel=1e-5)
    model.set_topk(40)
    everything = evaluate(model, windows)
    assert everything["loss_sparse"] == pytest.approx(dense, rel=1e-5)
    assert "recall" not in everything
    assert not model.sparse and not model.training


def test_a_window_in_which_no_measured_query_sees_more_than_k_tells_no_share(tiny: Path) -> None:
    """One in eight is measured: of 44 tokens the last is the 40th, which sees k keys; of 48 the 48th."""
    model = load_model(tiny, **INDEXER | {"index_topk": 40})
    ids = batch((48,))["input_ids"].int()
    longer, shorter = (Windows(ids[:, :n], ids[:, :n], torch.tensor([n])) for n in (48, 44))
    both = Windows(ids.expand(2, -1), ids.expand(2, -1), torch.tensor([48, 44]))
    alone, none, together = (evaluate(model, windows, kl_queries=5) for windows in (longer, shorter, both))
    assert "recall" not in none and alone["recall"] < 1
    for name in ("recall", "recall_window", "recall_best", "recall_normalised"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name
