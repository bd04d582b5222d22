"""The loss in pieces against the model's own, which makes all logits at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsa_export.model import load_model
from tests.conftest import Largest
from train import cross_entropy
from train.cross_entropy import cross_entropy_terms, next_token_loss
from train.data import IGNORED


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", 8)


def batch(labelled: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (3, 30), generator=g)
    mask = torch.arange(30) < torch.tensor([30, 17, 1])[:, None]
    trained = mask & (torch.rand(3, 30, generator=g) < 0.7) & labelled
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~trained, IGNORED)}


def test_loss_and_gradients_equal_those_of_all_logits_at_once(tiny: Path) -> None:
    model = load_model(tiny, attention="dense").train()
    parameters = list(model.parameters())
    whole = model(**batch(), use_cache=False).loss
    pieces = cross_entropy_terms(model, batch())["cross_entropy"]
    torch.testing.assert_close(pieces, whole)
    for ours, theirs in zip(
        torch.autograd.grad(pieces, parameters), torch.autograd.grad(whole, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_without_labels_there_is_no_loss(tiny: Path) -> None:
    """A mean over nothing would be NaN, and with it every weight after the update."""
    model = load_model(tiny, attention="dense").train()
    loss = cross_entropy_terms(model, batch(labelled=False))["cross_entropy"]
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_only_so_many_logits_are_held() -> None:
    head = torch.nn.Linear(4, 1000, bias=False)
    hidden = torch.randn(2, 60, 4, requires_grad=True)
    with Largest() as largest:
        next_token_loss(head, hidden, torch.randint(1000, (2, 60))).backward()
    assert largest.numel == 8 * 1000
