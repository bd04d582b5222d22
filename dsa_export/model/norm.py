"""RMS normalisation, of a whole hidden state or of every head by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsa_export.model.standard_ops import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """Every head of x [B, S, heads * D] by itself, with one weight [D] for all heads: Qwen3's q_norm and k_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, self.weight.shape[0]))).flatten(-2)
