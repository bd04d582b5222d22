"""The loss in pieces against the model's own, which makes all logits at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsa_export.model import load_model
from tests.conftest import Largest
from train import cross_entropy
from train.cross_entropy import cross_entropy_terms, next_token_losses
from train.data import IGNORED
from train.positions import with_gaps


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


def test_distillation_is_the_divergence_from_the_teacher(tiny: Path) -> None:
    """Beside the cross-entropy, over the labelled tokens only; nothing of it reaches the teacher."""
    model, teacher = (load_model(tiny, attention="dense").train() for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.2)
        teacher.model.norm.weight.add_(0.1)
    terms = cross_entropy_terms(model, batch(), teacher=teacher)
    labelled = batch()["labels"][:, 1:] != IGNORED
    log_q, log_p = (m(**batch(), use_cache=False).logits[:, :-1][labelled].log_softmax(-1) for m in (model, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(terms["distillation"], expected)
    torch.testing.assert_close(terms["cross_entropy"], model(**batch(), use_cache=False).loss)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(terms["distillation"], parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    terms["distillation"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.autograd.grad(
        cross_entropy_terms(model, batch(), teacher=teacher)["cross_entropy"], parameters, materialize_grads=True
    )[0].any()


def test_nobody_diverges_from_itself(tiny: Path) -> None:
    model = load_model(tiny, attention="dense").train()
    for inputs in (batch(), with_gaps(batch(), 400)):
        assert cross_entropy_terms(model, inputs, teacher=model)["distillation"].abs() < 1e-6


def test_only_so_many_logits_are_held() -> None:
    head = torch.nn.Linear(4, 1000, bias=False)
    hidden = torch.randn(2, 60, 4, requires_grad=True)
    with Largest() as largest:
        next_token_losses([head], [hidden], torch.randint(1000, (2, 60)))["cross_entropy"].backward()
    assert largest.numel == 8 * 1000
