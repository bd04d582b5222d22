"""Windows whose tokens stand further apart than they are: gaps in their positions teach the distances of longer texts.

What an indexer has learned at distances that its windows have does not hold at longer ones (after Zhu et al., "PoSE",
2023, who teach a model itself so).
"""

from __future__ import annotations

import torch
from torch import Tensor

GAPS = 3
"""In the positions of a window that is spread over more of them than it has tokens."""

INPUTS = ("input_ids", "attention_mask", "position_ids")


def with_gaps(batch: dict[str, Tensor], span: int) -> dict[str, Tensor]:
    """The batch, with {"position_ids"} of spread() if its windows have fewer tokens than `span`."""
    B, T = batch["input_ids"].shape
    device = batch["input_ids"].device
    return batch | {"position_ids": spread(B, T, span).to(device)} if span > T else batch


def spread(B: int, T: int, span: int) -> Tensor:
    """Positions [B, T] that ascend from 0 and stay below `span` > T, with GAPS gaps at random places of random sizes.

    Draws from torch's generator.
    """
    places = torch.randint(1, T, (B, GAPS))
    sizes = torch.rand(B, GAPS)
    sizes = sizes / sizes.sum(-1, keepdim=True) * torch.randint(0, span - T + 1, (B, 1))
    gaps = torch.zeros(B, T, dtype=torch.int64).scatter_add_(1, places, sizes.long())
    return torch.arange(T) + gaps.cumsum(-1)


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model reads of a batch: all but what it is to predict."""
    return {name: batch[name] for name in INPUTS if name in batch}
