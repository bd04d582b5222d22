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
TOLERANCE = 1e-3
"""What logits may differ by whatever the engine: fp32's rounding over the layers of a model stays far below."""
OWN_ROUNDING = 2
"""How often the dense engine's own rounding may stand between dense and sparse."""


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
    must agree within rounding, and in fp32 the preferred token must be the same. (Narrower types round logits to equal
    values: a tie may then be broken either way.) What rounding does is measured: the dense engine gets the same tokens
    a second time, one by one, which is the same sum in another order. With packed weights, whose products round
    activations to int8, that moves the logits of a real model by some percent. An engine that attends densely while its
    caches are short must pass with short and with longer ones.
    """
    engine = runners["sparse"].engine
    capacities = {engine.max_topk, min(engine.selecting_slots, engine.limits.max_context)}
    gates = [_gate(runners, prompt, capacity) for capacity in sorted(capacities)]
    return next((one for one in gates if one.problem), max(gates, key=lambda one: one.error))


def _gate(runners: Mapping[str, Runner], prompt: np.ndarray, capacity: int) -> Gate:
    k, precision = min(runners["sparse"].engine.topk), runners["sparse"].engine.precision
    steps = min(GREEDY_TOKENS, k // 2)
    prompt = prompt[: max(1, min(PROMPT_TOKENS, k - steps))]
    sessions = {variant: Session(runner, capacity=capacity) for variant, runner in runners.items()}
    sessions["one by one"] = Session(runners["dense"], capacity=capacity)
    for token in prompt[:-1]:
        sessions["one by one"].decode([token])
    last = {"one by one": prompt[-1:]}
    logits = [{name: session.prefill([last.get(name, prompt)])[0] for name, session in sessions.items()}]
    for _ in range(steps):
        token = [int(logits[-1]["dense"].argmax())]
        logits.append({name: session.decode(token)[0].copy() for name, session in sessions.items()})

    own = max(float(np.abs(at["dense"] - at["one by one"]).max()) for at in logits)
    tolerance = max(TOLERANCE, OWN_ROUNDING * own)
    worst = 0.0
    for position, at in enumerate(logits, start=len(prompt)):
        dense, sparse = at["dense"], at["sparse"]
        if not (np.isfinite(dense).all() and np.isfinite(sparse).all()):
            return Gate(position, float("nan"), tolerance, f"a logit is not finite after {position} tokens")
        error = float(np.abs(dense - sparse).max())
        worst = max(worst, error)
        if error > tolerance:
            problem = f"logits differ by {error:.2g} after {position} tokens, at most {tolerance:.2g} is rounding"
            return Gate(position, worst, tolerance, problem)
        if dense.argmax() != sparse.argmax() and precision == "fp32":
            return Gate(position, worst, tolerance, f"the greedy tokens differ after {position} tokens")
    return Gate(len(prompt) + steps, worst, tolerance, None)


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
