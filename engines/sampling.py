"""The next token from its logits: greedy, temperature, nucleus (top-p; Holtzman et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsa_export.cli import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p in (0, 1]; the same seed gives the same tokens for the same logits."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()
COLDEST = 1e-30
"""A temperature that fp32 can hold, and below which equal logits are the only ones that are drawn anyway."""


class Sampler:
    """Draws the tokens of one sequence. `row` separates the sequences of a batch that share a seed."""

    def __init__(self, sampling: Sampling, row: int = 0):
        if not sampling.temperature >= 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {sampling}")
        self.sampling = sampling
        self._rng = np.random.default_rng(None if sampling.seed is None else [abs(sampling.seed), row])

    def __call__(self, logits: np.ndarray) -> int:
        """The next token; logits [V] float32. Equal logits: greedy takes the lower token.

        Raises UserError if they are not finite.
        """
        best = int(logits.argmax())  # of a NaN, if there is one
        if not np.isfinite(logits[best]):
            raise UserError("the engine's logits are not finite: check the checkpoint, or export in a wider type")
        if self.sampling.temperature == 0:
            return best
        temperature = np.float32(max(self.sampling.temperature, COLDEST))
        with np.errstate(over="ignore"):  # a token that is out of reach has a probability of 0
            weights = np.exp((logits - logits[best]) / temperature)
        if self.sampling.top_p == 1:
            return self._draw(weights)
        tokens = nucleus(weights / weights.sum(), self.sampling.top_p)
        return int(tokens[self._draw(weights[tokens])])

    def _draw(self, weights: np.ndarray) -> int:
        cumulative = weights.cumsum(dtype=np.float64)  # in fp32 the tail of a large vocabulary would add nothing
        return int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of most probable tokens that holds at least top_p < 1: ids, most probable first; [V] -> [n]."""
    # Tokens below this bound hold less than 1 - top_p together: only the others need to be sorted.
    bound = min((1 - top_p) / len(probabilities), probabilities.max())
    candidates = np.flatnonzero(probabilities >= bound)
    candidates = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    return candidates[: np.searchsorted(probabilities[candidates].cumsum(dtype=np.float64), top_p) + 1]
