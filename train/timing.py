"""How long decoding and prefill take in torch, batch 1: for comparisons beside quality. Engines: bench/compare.py.

A cache is filled with random values: the work is the same, and a long context needs no prefill.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsa_export.model import DSAForCausalLM, dense_twin
from dsa_export.model.cache import DSACache, fill_randomly

TOKENS = 8
"""Decoded to see how long one takes."""


def decode_call(model: DSAForCausalLM, length: int) -> Callable[[], Any]:
    """A call that decodes the token after `length` others, the same one each time."""
    device = next(model.parameters()).device
    cache = DSACache(model.model.cache_layouts)
    cache.begin(1, length + 1, model.dtype, device)
    fill_randomly((tensor for tensors in cache.layers for tensor in tensors.values()), seed=0)
    token = torch.ones(1, 1, dtype=torch.int64, device=device)

    def call() -> None:
        cache.lengths, cache.columns = torch.full((1,), length, device=device), length
        model(token, cache=cache, use_cache=True)

    return call


def prefill_call(model: DSAForCausalLM, length: int) -> Callable[[], Any]:
    """A call that reads `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
    ids = ids.to(next(model.parameters()).device)
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def in_turn(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median milliseconds of each call, over `runs` rounds in which all are called, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def decoding_speed(model: DSAForCausalLM, length: int) -> dict[str, float]:
    """Tokens per second of dense and sparse decoding after `length` tokens, in turn, in the type of the weights.

    Not in autocast's: it keeps its copies of weights that require a gradient and makes those of frozen ones anew at
    every call, and the twin's weights are never frozen.
    """
    model.eval()
    model.sparse = True
    calls = {name: decode_call(one, length) for name, one in (("dense", dense_twin(model)), ("sparse", model))}
    with torch.autocast(model.device.type, enabled=False):
        return {f"tokens_per_s_{name}": 1e3 / ms for name, ms in in_turn(calls, TOKENS).items()}
