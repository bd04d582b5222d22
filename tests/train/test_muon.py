"""Muon, head by head: what it takes, and that it is torch's and the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dsa_export.model import load_model
from tests.train.conftest import INDEXER
from train import warmup
from train.muon import COEFFICIENTS, ITERATIONS, HeadwiseMuon, muon, orthogonalise
from train.trainer import Settings


def test_muon_takes_the_matrices_of_the_indexer_and_adamw_the_rest(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    indexer = warmup.indexer_parameters(model)["indexer"]
    matrices, others = muon(indexer, Settings(steps=1, lengths=(8,), lr=1e-3), rows=4)
    taken = [p for optimizer in (matrices, others) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, indexer))
    before = {id(p): p.detach().clone() for p in indexer}
    torch.manual_seed(0)
    for p in indexer:
        p.grad = torch.randn_like(p) * 1e-3
    matrices.step()
    others.step()
    for p in indexer:
        moved = (p.detach() - before[id(p)]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.2e-3 if p.ndim == 2 else 1e-3, rel=0.25)


def test_muon_moves_every_head_as_torchs_moves_a_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, other, few = (nn.Parameter(torch.randn(*shape, generator=g)) for shape in ((8, 16), (12, 16), (3, 16)))
    heads = [nn.Parameter(head.clone()) for p in (matrix, other) for head in p.detach().split(4)]
    heads.append(nn.Parameter(few.detach().clone()))
    ours = HeadwiseMuon([matrix, other, few], lr=0.1, rows=4)
    theirs = torch.optim.Muon(heads, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in (matrix, other, few):
            p.grad = torch.randn(p.shape, generator=g)
        for head, gradient in zip(heads, [*matrix.grad.split(4), *other.grad.split(4), few.grad], strict=True):
            head.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(torch.cat([matrix, other, few]), torch.cat(heads), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 8, 40), (3, 40, 8), (1, 16, 16), (2, 1, 12)])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_orthogonalising_by_the_gram_matrix_is_the_published_iteration(shape: tuple[int, ...], decades: int) -> None:
    spread = torch.logspace(0, -decades, shape[1])[:, None] * 1e-4
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread
    a, b, c = COEFFICIENTS
    x = blocks.double() / blocks.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(blocks).double(), x, atol=1e-4, rtol=0)
    assert orthogonalise(torch.zeros(shape)).eq(0).all()
