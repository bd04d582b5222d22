"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) for an indexer: every head is orthogonalised by itself.

torch.optim.Muon takes whole matrices: five times the time on a CPU, where a warm-up, which makes many updates from one
forward pass, would spend most of it; and no better (CONTRIBUTING.md).
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.distributed import like
from train.trainer import Settings, adamw

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration x ← a x + b (x xᵀ) x + c (x xᵀ)² x, as published."""
ITERATIONS = 5


class HeadwiseMuon(torch.optim.Optimizer):
    """A step moves the entries of a matrix [N, E] by a fifth of the rate, in the root mean square, whatever its size.

    rows: N is cut into blocks of so many, or stays whole if it is no multiple of them.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, rows: int):
        super().__init__(matrices, {"lr": lr})
        self.rows = rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(momentum, MOMENTUM)  # Nesterov's
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                N = len(whole)
                blocks = orthogonalise(whole.unflatten(0, (-1, self.rows if N % self.rows == 0 else N)))
                size = 0.2 * max(blocks.shape[1:]) ** 0.5
                change = like(parameter, blocks.flatten(0, 1).to(parameter.dtype))
                parameter.add_(change, alpha=-size * group["lr"])


def orthogonalise(blocks: Tensor) -> Tensor:
    """blocks [n, R, E] → about the nearest with orthonormal rows (or columns, if those are fewer) of each, in fp32.

    An iteration multiplies x by a polynomial of its Gram matrix x xᵀ, which becomes gram · step²: the iterations are
    made there, on the short side alone, and the long one is gone through twice in all (tridao.me/blog/2026/
    gram-newton-schulz, whose restarts fp32 does not need).
    """
    a, b, c = COEFFICIENTS
    x = blocks.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if wide := x.shape[1] > x.shape[2]:
        x = x.mT
    gram = x @ x.mT
    steps: list[Tensor] = []
    for _ in range(ITERATIONS):
        if steps:
            gram = steps[-1] @ gram @ steps[-1]
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        steps.append(step)
    x = reduce(torch.matmul, reversed(steps)) @ x
    return x.mT if wide else x


def muon(parameters: list[nn.Parameter], settings: Settings, rows: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, in blocks of so many rows, AdamW (which moves entries by up to the rate) for the rest."""
    matrices = [p for p in parameters if p.ndim == 2]
    return [
        HeadwiseMuon(matrices, settings.lr, rows),
        adamw([p for p in parameters if p.ndim != 2], settings),
    ]
