"""The next token's cross-entropy without the logits of a whole batch.

Of 8,192 tokens and Qwen2.5's 151,936 words they would take 5 GB, and as much again for each step of the softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dsa_export.model.attention.base import Observer
from train.data import IGNORED

ROWS = 512
"""Tokens whose logits are held at a time; where there are more, the backward pass makes them again."""


def cross_entropy_terms(model: Any, batch: dict[str, Tensor], observer: Observer | None = None) -> dict[str, Tensor]:
    """{"cross_entropy"} of a batch (input_ids, attention_mask, labels), and what its layers report."""
    output = model.model(batch["input_ids"], batch["attention_mask"], observer=observer)
    loss = next_token_loss(model.lm_head, output.last_hidden_state, batch["labels"])
    return {"cross_entropy": loss, **output.aux_losses}


def next_token_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy per label: the loss of model(…, labels=labels), but 0 if there are none.

    Args:
        head: [E] → logits [V].
        hidden: [B, T, E], the last hidden states.
        labels: [B, T] int64, -100 is ignored; shifted here.
    """
    labelled = labels[:, 1:] != IGNORED
    states, targets = hidden[:, :-1][labelled], labels[:, 1:][labelled]
    if len(targets) <= ROWS:
        total = _sum(head, states, targets)
    else:
        total = torch.stack(
            [
                checkpoint(_sum, head, some, target, use_reentrant=False, preserve_rng_state=False)
                for some, target in zip(states.split(ROWS), targets.split(ROWS), strict=True)
            ]
        ).sum()
    return total / max(1, len(targets))


def _sum(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(states).float(), targets, reduction="sum")
