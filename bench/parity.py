"""Do dense and sparse compute the same? The gate before any figure, and the agreement beside the figures.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.artifacts import Engine
from engines.session import Runner, Session

GREEDY_TOKENS = 8
PROMPT_TOKENS = 64
TOLERANCE = 1e-3
"""What logits may differ by whatever the engine: fp32's rounding over the layers of a model stays far below."""
EPSILON = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-9, "int4": 2.0**-9}
"""Rounding of the narrowest type that takes part: with packed weights, products round activations to int8 blocks."""
TYPE_ROUNDINGS = 4
"""The same as TOLERANCE for the type that an engine computes in, in roundings of its largest logit."""
OWN_ROUNDING = 2
"""How often what the dense engine itself rounds may stand between dense and sparse."""
BLOCK = 64
"""Tokens whose losses are taken together in a standard error."""
PACKED_OPERATORS = 8
"""Of packed weights, dense operators may differ by this part of `allowance`: what they sum otherwise in fp32 moves a
few activations to the next int8."""


@dataclass(frozen=True)
class Gate:
    """Outcome of the gate: `problem` says what is wrong, None if nothing is."""

    tokens: int
    error: float  # largest difference of a logit
    tolerance: float
    problem: str | None


def gates(dense: Mapping[str, Runner], sparse: Runner, prompt: np.ndarray) -> dict[str, Gate]:
    """Compares sparse with every dense side where they must be equal: at most k tokens (the smallest k of any layer).

    prompt: [n] int64. All get the prompt and then the tokens that the first dense side prefers; at each of them the
    logits must agree within rounding, and in fp32 the preferred token must be the same. (Narrower types round logits to
    equal values: a tie may then be broken either way.) What rounding does is measured: a dense engine gets the same
    tokens one by one, which is the same sum in another order. With packed weights, whose products round activations to
    int8, that moves the logits of a real model by some percent. It may move nothing, as the order's effect is rounded
    away: but in fp32, dense engines with different operators are compared too. Either counts up to
    `allowance`, so that a broken dense engine does not excuse a broken sparse one. An engine that attends densely while
    its caches are short must pass with short and with longer ones.
    """
    engine = sparse.engine
    capacities = {engine.max_topk, min(engine.selecting_slots, engine.limits.max_context)}
    found = [_gates(dense, sparse, prompt, capacity) for capacity in sorted(capacities)]

    def worst(name: str) -> Gate:
        outcomes = [gates[name] for gates in found]
        return next((one for one in outcomes if one.problem), max(outcomes, key=lambda one: one.error))

    return {name: worst(name) for name in dense}


def _gates(dense: Mapping[str, Runner], sparse: Runner, prompt: np.ndarray, capacity: int) -> dict[str, Gate]:
    k = min(sparse.engine.topk)
    steps = min(GREEDY_TOKENS, k // 2)
    prompt = prompt[: max(1, min(PROMPT_TOKENS, k - steps))]
    first = next(iter(dense))
    at_once = {name: Session(runner, capacity=capacity) for name, runner in dense.items()}
    one_by_one = {name: Session(runner, capacity=capacity) for name, runner in dense.items()}
    selecting = Session(sparse, capacity=capacity)
    for session in one_by_one.values():
        for token in prompt[:-1]:
            session.decode([token])

    # [tokens, V] of every side
    logits: dict[str, list[np.ndarray]] = {name: [s.prefill([prompt])[0].copy()] for name, s in at_once.items()}
    again = {name: [session.decode(prompt[-1:])[0].copy()] for name, session in one_by_one.items()}
    chosen = [selecting.prefill([prompt])[0].copy()]
    for _ in range(steps):
        token = [int(logits[first][-1].argmax())]
        for name in dense:
            logits[name].append(at_once[name].decode(token)[0].copy())
            again[name].append(one_by_one[name].decode(token)[0].copy())
        chosen.append(selecting.decode(token)[0].copy())
    return {
        name: _gate(
            sparse.engine,
            np.array(logits[name]),
            np.array(chosen),
            one_by_one=np.array(again[name]),
            other_operators=np.array(list(logits.values())),
            first=len(prompt),
        )
        for name in dense
    }


def _gate(
    engine: Engine,
    dense: np.ndarray,
    sparse: np.ndarray,
    *,
    one_by_one: np.ndarray,
    other_operators: np.ndarray,
    first: int,
) -> Gate:
    """Logits [tokens, V] of both sides, after `first` tokens and more; other_operators: [n, tokens, V], dense too."""
    for position, logits in enumerate(zip(dense, sparse, one_by_one, strict=True), start=first):
        if not np.isfinite(logits).all():
            return Gate(position, float("nan"), TOLERANCE, f"a logit is not finite after {position} tokens")
    most, of_type = allowance(engine, dense), 0.0
    rounding = min(float(np.abs(one_by_one - dense).max()), most)
    if engine.precision != "fp32" and len(other_operators):
        between = float(np.abs(other_operators - dense).max())
        rounding = max(rounding, min(between, most if engine.dtype != "fp32" else most / PACKED_OPERATORS))
    if engine.narrowest_dtype != "fp32":
        of_type = TYPE_ROUNDINGS * EPSILON[engine.narrowest_dtype] * float(np.abs(dense).max())
    tolerance = max(TOLERANCE, of_type, OWN_ROUNDING * rounding)
    worst = 0.0
    for position, (one, other) in enumerate(zip(dense, sparse, strict=True), start=first):
        error = float(np.abs(one - other).max())
        worst = max(worst, error)
        if error > tolerance:
            problem = f"logits differ by {error:.2g} after {position} tokens, at most {tolerance:.2g} is rounding"
            return Gate(position, worst, tolerance, problem)
        if one.argmax() != other.argmax() and engine.precision == engine.narrowest_dtype == "fp32":
            return Gate(position, worst, tolerance, f"the greedy tokens differ after {position} tokens")
    return Gate(first + len(dense) - 1, worst, tolerance, None)


def allowance(engine: Engine, values: np.ndarray) -> float:
    """What rounding may do to a tensor: relative to its largest value, by the type that the graph computes in."""
    if not np.issubdtype(values.dtype, np.floating) or not values.size:
        return 0.0
    return 64 * EPSILON[engine.precision] * max(1.0, float(np.abs(values).max()))


@dataclass(frozen=True)
class Agreement:
    """Teacher-forced comparison of the sparse side with a dense one, over `tokens` tokens of the text (all rows)."""

    loss_error: float | None  # standard error of what sparse loses more than dense, see between_blocks()
    top1: float  # share of tokens for which both prefer the same next token
    kl: float  # mean KL(dense || sparse) in nats
    tokens: int


@dataclass(frozen=True)
class Score:
    """loss: mean negative log-likelihood of the text's next token, in nats, of every side. agreement: by dense side."""

    loss: Mapping[str, float]
    agreement: Mapping[str, Agreement]


def score(sessions: Mapping[str, Session], tokens: np.ndarray) -> Score | None:
    """Appends tokens[:, :-1] of [B, T + 1] to all sessions one by one; logits are scored against the token that
    follows. The last session is the sparse one, compared with each of the others. None for T = 0."""
    if tokens.shape[1] < 2:
        return None
    *dense, sparse = sessions
    losses: dict[str, list[np.ndarray]] = {name: [] for name in sessions}
    same: dict[str, list[np.ndarray]] = {name: [] for name in dense}
    divergences: dict[str, list[np.ndarray]] = {name: [] for name in dense}
    for step, following in zip(tokens.T[:-1], tokens.T[1:], strict=True):
        logs = {name: _log_softmax(session.decode(step).astype(np.float64)) for name, session in sessions.items()}
        for name, log in logs.items():
            losses[name].append(-np.take_along_axis(log, following[:, None], 1))
        for name in dense:
            same[name].append(logs[name].argmax(-1) == logs[sparse].argmax(-1))
            divergences[name].append((np.exp(logs[name]) * (logs[name] - logs[sparse])).sum(-1))
    count = np.size(losses[sparse])
    agreement = {
        name: Agreement(
            loss_error=between_blocks(np.subtract(losses[sparse], losses[name])[..., 0]),
            top1=float(np.mean(same[name])),
            kl=float(np.mean(divergences[name])),
            tokens=count,
        )
        for name in dense
    }
    return Score({name: float(np.mean(values)) for name, values in losses.items()}, agreement)


def between_blocks(differences: np.ndarray) -> float | None:
    """Standard error of the mean of [T, B] numbers, between blocks of BLOCK tokens or more of a row; None of one block.

    Tokens near each other miss the same keys: taken as independent they give too small an error (see train.ladder).
    """
    blocks = np.array_split(differences, max(1, len(differences) // BLOCK))
    means = np.concatenate([block.mean(0) for block in blocks])
    return float(np.std(means, ddof=1) / np.sqrt(means.size)) if means.size > 1 else None


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
