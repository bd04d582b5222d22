"""What a model loses on the next token, by the data or by a teacher, without the logits of a whole batch.

Of 8,192 tokens and Qwen2.5's 151,936 words they would take 5 GB, and as much again for each step of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint

from dsa_export.model.attention.base import Observer
from train.data import IGNORED
from train.positions import model_inputs

ROWS = 512
"""Rows of logits that are held at a time, the teacher's counted too; where there are more, the backward pass makes them
again."""


def cross_entropy_terms(
    model: Any, batch: dict[str, Tensor], observer: Observer | None = None, teacher: Any = None
) -> dict[str, Tensor]:
    """{"cross_entropy"} of a batch (model_inputs and labels), and what its layers report.

    teacher: a model of the same vocabulary, constant. With it {"distillation"} as well, which takes the gradient: the
    cross-entropy is then reported only.
    """
    inputs = model_inputs(batch)
    heads, hidden = [model.lm_head], []
    if teacher is not None:  # first: later the model's activations would take the memory
        with torch.no_grad():
            hidden.append(teacher.model(**inputs).last_hidden_state)
        heads.append(teacher.lm_head)
    output = model.model(**inputs, observer=observer)
    hidden.insert(0, output.last_hidden_state)
    return {**next_token_losses(heads, hidden, batch["labels"]), **output.aux_losses}


def next_token_losses(heads: Sequence[nn.Module], hidden: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Means per label, 0 if there are none: {"cross_entropy"}, the loss of model(…, labels=labels).

    Args:
        heads: of the model and, if there is one, of its teacher: [E] → logits [V].
        hidden: [B, T, E] of each, the last hidden states. With a teacher's {"distillation"} as well:
            Σ_v p(v) (log p(v) − log q(v)), p what the teacher predicts and q what the model does. Only it has a
            gradient then.
        labels: [B, T] int64, -100 is ignored; shifted here.
    """
    labelled = labels[:, 1:] != IGNORED
    inputs = [labels[:, 1:][labelled], *(states[:, :-1][labelled] for states in hidden)]
    count = len(inputs[0])
    rows = ROWS // len(heads)
    if count <= rows:
        total = _sums(heads, *inputs)
    else:
        pieces = zip(*(tensor.split(rows) for tensor in inputs), strict=True)
        total = torch.stack(
            [checkpoint(_sums, heads, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        ).sum(0)
    return dict(zip(("cross_entropy", "distillation"), total / max(1, count), strict=False))


def _sums(heads: Sequence[nn.Module], targets: Tensor, *hidden: Tensor) -> Tensor:
    """[1] or [2]: cross-entropy and divergence from the teacher, summed over the rows."""
    log_q = log_softmax(heads[0](hidden[0]).float(), dim=-1)
    reported = log_q if len(heads) == 1 else log_q.detach()
    sums = [nll_loss(reported, targets, reduction="sum")]
    for head, states in zip(heads[1:], hidden[1:], strict=True):
        with torch.no_grad():
            log_p = log_softmax(head(states).float(), dim=-1)
        sums.append(kl_div(log_q, log_p, reduction="sum", log_target=True))
    return torch.stack(sums)
