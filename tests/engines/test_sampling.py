"""Sampling: what is drawn, how often, and that a seed repeats it."""

from __future__ import annotations

from types import SimpleNamespace

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


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_of_a_large_vocabulary_are_those_of_double_precision(temperature: float, top_p: float):
    logits = (np.random.default_rng(0).standard_normal(150_000) * 3).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-probabilities) if top_p < 1 else np.arange(len(logits))
    cumulative = probabilities[order].cumsum() / probabilities.sum()
    kept = cumulative[: np.searchsorted(cumulative, top_p) + 1]
    rng = np.random.default_rng([1, 0])
    expected = [order[np.searchsorted(kept, rng.random() * kept[-1], side="right")] for _ in range(50)]
    found = draws(Sampling(temperature, top_p, seed=1), logits, 50)
    assert (found == expected).sum() >= 48  # a draw may fall between two sums of another rounding


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_the_largest_random_number_draws_the_last_token_that_can_be(top_p: float, monkeypatch: pytest.MonkeyPatch):
    for seed in range(50):
        logits = (np.random.default_rng(seed).standard_normal(1000) * 3).astype(np.float32)
        logits[-1] = -np.inf
        sampler = Sampler(Sampling(1.0, top_p, seed=0))
        monkeypatch.setattr(sampler, "_rng", SimpleNamespace(random=lambda: np.nextafter(1, 0)))
        assert sampler(logits) < len(logits) - 1


def test_the_least_random_number_draws_the_first_token_that_can_be(monkeypatch: pytest.MonkeyPatch):
    sampler = Sampler(Sampling(1.0, seed=0))
    monkeypatch.setattr(sampler, "_rng", SimpleNamespace(random=lambda: 0.0))
    assert sampler(np.array([-np.inf, 1, 2], np.float32)) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-5])
def test_a_tiny_temperature_draws_among_the_best(temperature: float):
    assert set(draws(Sampling(temperature, seed=0), np.array([0, 3, 3, -3e38], np.float32), 50)) == {1, 2}


@pytest.mark.parametrize("size", [3, 300, 151_936])
def test_a_nucleus_is_never_empty(size: int):
    """In fp32 equal probabilities may be no more than (1 - top_p) / V."""
    assert 0 <= Sampler(Sampling(1.0, 1e-8, 0))(np.zeros(size, np.float32)) < size


def test_a_seed_repeats_the_tokens_and_rows_differ(runner: Runner):
    def sample(seed: int) -> list[list[int]]:
        return Session(runner, 2).generate([[1, 2, 3], [1, 2, 3]], 12, sampling=Sampling(1.5, 0.95, seed))

    for seed in (7, -7):
        assert sample(seed) == sample(seed)
    assert sample(7) != sample(8)
    first, second = sample(7)
    assert first != second


@pytest.mark.parametrize("settings", [Sampling(-1.0), Sampling(float("nan")), Sampling(1.0, 0.0), Sampling(1.0, 1.1)])
def test_impossible_settings_are_refused(settings: Sampling):
    with pytest.raises(ValueError, match="need temperature >= 0"):
        Sampler(settings)
