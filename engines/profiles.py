"""The shapes that an engine must serve: one profile for decoding, one for prefill chunks.

Shapes: B batch (1..max_batch), S tokens per call, C cache capacity (fixed: NVIDIA's cache update needs it static).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsa_export.cli import UserError
from engines.artifacts import DTYPE_BYTES, Limits, Variant

Shape = tuple[int, ...]
ALIGNMENT = 256
"""Bytes: TensorRT takes no other addresses, and a server binds runs of a cache's rows."""


@dataclass(frozen=True)
class Profile:
    """min, opt and max shape of every input of the graph, in the order of its inputs."""

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


def profiles(variant: Variant, limits: Limits) -> list[Profile]:
    """The decode profile (S = 1) and the prefill profile (S up to limits.prefill_chunk), tuned for one row.

    Raises UserError where a later row of a cache would not begin at a multiple of ALIGNMENT.
    """
    if limits.max_batch > 1 and (fitting := aligned_capacity(variant, limits.max_context)) != limits.max_context:
        instead = f"--max-context {fitting}, or --max-batch 1" if fitting else "--max-batch 1"
        raise UserError(
            f"with --max-context {limits.max_context} a row of a cache is no multiple of {ALIGNMENT} bytes, which "
            f"TensorRT's addresses must be: choose {instead}"
        )
    return [
        _profile("decode", variant, limits, (1, 1, 1)),
        _profile("prefill", variant, limits, (1, limits.prefill_chunk, limits.prefill_chunk)),
    ]


def _profile(name: str, variant: Variant, limits: Limits, tokens: tuple[int, int, int]) -> Profile:
    batches = (1, 1, limits.max_batch)
    by_input: list[dict[str, Shape]] = [
        {"input_ids": (B, S), "past_lengths": (B,), "input_lengths": (B,)} for B, S in zip(batches, tokens, strict=True)
    ]
    for B, shapes in zip(batches, by_input, strict=True):
        for cache, tensor in variant.cache_names():
            shapes[f"past_key_values.{cache}"] = tensor.concrete(B, limits.max_context)
    lowest, best, highest = by_input
    return Profile(name, {key: (lowest[key], best[key], highest[key]) for key in lowest})


def aligned_capacity(variant: Variant, capacity: int) -> int | None:
    """The least capacity from this one on whose rows are multiples of ALIGNMENT in every cache, or, where the model has
    no such positions, the largest below; None if it is far."""

    def fits(candidate: int) -> bool:
        rows = ((tensor.concrete(1, candidate), DTYPE_BYTES[tensor.dtype]) for tensor in variant.cache)
        return all(math.prod(shape) * size % ALIGNMENT == 0 for shape, size in rows)

    positions, far = variant.model.max_position_embeddings, 64 * ALIGNMENT
    above = range(capacity, capacity + far if capacity > positions else min(capacity + far, positions + 1))
    below = range(capacity - 1, max(capacity - far, variant.max_topk - 1, 1), -1)
    return next((c for c in (*above, *below) if fits(c)), None)


def as_json(profile: Profile, plan: str, number: int) -> dict[str, object]:
    """plan, number: the file that holds the profile, and its place there."""
    shapes = {key: [list(s) for s in shapes] for key, shapes in profile.shapes.items()}
    return {"name": profile.name, "plan": plan, "number": number, "shapes": shapes}
