"""Sampling: what is drawn, how often, and that a seed repeats it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.sampling import Sampler, Sampling, nucleus
from engines.session import Runner, Session


def draws(sampling: Sampling, logits: np.ndarray, number: int) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.array([sampler(logits) for _ in range(number)])


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    assert Sampler(Sampling())(np.array([0, 3, 3, 1], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float):
    logits = np.array([1.0, 0.0, 2.0, -1.0], np.float32)
    counts = np.bincount(draws(Sampling(temperature, seed=0), logits, 20_000), minlength=4)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - 20_000 * expected) < 5 * np.sqrt(20_000 * expected * (1 - expected))).all()


def test_top_p_draws_from_the_nucleus_only():
    logits = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))
    assert set(draws(Sampling(1.0, 0.8, seed=1), logits, 500)) == {1, 3}
    assert set(draws(Sampling(1.0, 0.4, seed=1), logits, 500)) == {1}


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1, width=32)), st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_such_set(weights: np.ndarray, top_p: float):
    weights[0] += 1e-3
    probabilities = weights / weights.sum()
    tokens = nucleus(probabilities, top_p)
    by_sorting = np.argsort(-probabilities, kind="stable")
    needed = np.searchsorted(probabilities[by_sorting].cumsum(), top_p) + 1
    np.testing.assert_array_equal(tokens, by_sorting[:needed])


def test_extreme_logits_do_not_overflow():
    logits = np.array([3e38, -3e38, 0], np.float32)
    assert set(draws(Sampling(0.01, 0.9, seed=0), logits, 20)) == {0}


def test_a_seed_repeats_the_tokens_and_rows_differ(runner: Runner):
    def sample(seed: int) -> list[list[int]]:
        return Session(runner, 2).generate([[1, 2, 3], [1, 2, 3]], 12, sampling=Sampling(1.5, 0.95, seed))

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)
    first, second = sample(7)
    assert first != second


@pytest.mark.parametrize("settings", [Sampling(-1.0), Sampling(float("nan")), Sampling(1.0, 0.0), Sampling(1.0, 1.1)])
def test_impossible_settings_are_refused(settings: Sampling):
    with pytest.raises(ValueError, match="need temperature >= 0"):
        Sampler(settings)
