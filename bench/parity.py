"""Do dense and sparse compute the same? The gate before any figure, and the agreement beside the figures.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.session import Runner, Session

GREEDY_TOKENS = 8
PROMPT_TOKENS = 64
EPSILON = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-9, "int4": 2.0**-9}
"""Rounding of the narrowest type that takes part: with packed weights, products round activations to int8 blocks."""


@dataclass(frozen=True)
class Gate:
    """Outcome of the gate: `problem` says what is wrong, None if nothing is."""

    tokens: int
    error: float  # largest difference of a logit
    tolerance: float
    problem: str | None


def gate(runners: Mapping[str, Runner], prompt: np.ndarray) -> Gate:
    """Compares dense and sparse where they must be equal: at most k tokens (of the layer with the smallest k).

    prompt: [n] int64. Both variants get the prompt and then the tokens that dense prefers; at each of them the logits
    must agree within the rounding of the type, and in fp32 the preferred token must be the same. (Narrower types
    round logits to equal values: a tie may then be broken either way.)
    """
    k, precision = min(runners["sparse"].engine.topk), runners["sparse"].engine.precision
    steps = min(GREEDY_TOKENS, k // 2)
    prompt = prompt[: max(1, min(PROMPT_TOKENS, k - steps))]
    sessions = {variant: Session(runner, capacity=len(prompt) + steps) for variant, runner in runners.items()}
    logits = {variant: session.prefill([prompt])[0] for variant, session in sessions.items()}
    worst, tolerance = 0.0, 0.0
    for step in range(steps + 1):
        dense, sparse = logits["dense"], logits["sparse"]
        position = len(prompt) + step
        if not (np.isfinite(dense).all() and np.isfinite(sparse).all()):
            return Gate(position, float("nan"), tolerance, f"a logit is not finite after {position} tokens")
        tolerance = logit_tolerance(precision, dense)
        error = float(np.abs(dense - sparse).max())
        worst = max(worst, error)
        if error > tolerance:
            problem = f"logits differ by {error:.2g} after {position} tokens, at most {tolerance:.2g} is rounding"
            return Gate(position, worst, tolerance, problem)
        if dense.argmax() != sparse.argmax() and precision == "fp32":
            return Gate(position, worst, tolerance, f"the greedy tokens differ after {position} tokens")
        if step < steps:
            token = [int(dense.argmax())]
            logits = {variant: session.decode(token)[0].copy() for variant, session in sessions.items()}
    return Gate(len(prompt) + steps, worst, tolerance, None)


def logit_tolerance(precision: str, logits: np.ndarray) -> float:
    """What rounding alone may do to logits: 1e-3 in fp32, and some units in the last place of the narrower types."""
    return max(1e-3, 16 * EPSILON[precision] * float(np.abs(logits).max()))


@dataclass(frozen=True)
class Score:
    """Teacher-forced comparison of the sparse side with a dense one, over `tokens` tokens of the text (all rows)."""

    loss: Mapping[str, float]  # mean negative log-likelihood of the text's next token, in nats, of every side
    top1: float  # share of tokens for which both prefer the same next token
    kl: float  # mean KL(dense || sparse) in nats
    tokens: int


def score(sessions: Mapping[str, Session], tokens: np.ndarray) -> Score | None:
    """Appends tokens[:, :-1] of [B, T + 1] to all sessions one by one; logits are scored against the token that
    follows. The last session is the sparse one, compared with the first. None for T = 0."""
    losses: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    same, divergences = [], []
    for step, following in zip(tokens.T[:-1], tokens.T[1:], strict=True):
        logs = {name: _log_softmax(session.decode(step).astype(np.float64)) for name, session in sessions.items()}
        for name, log in logs.items():
            losses[name].append(-np.take_along_axis(log, following[:, None], 1))
        dense, *_, sparse = logs.values()
        same.append(dense.argmax(-1) == sparse.argmax(-1))
        divergences.append((np.exp(dense) * (dense - sparse)).sum(-1))
    if not same:
        return None
    means = {name: float(np.mean(values)) for name, values in losses.items()}
    return Score(means, float(np.mean(same)), float(np.mean(divergences)), int(np.size(same)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
