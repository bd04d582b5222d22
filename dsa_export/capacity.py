"""Rows of a cache that keeps one row for every `stride` tokens: as numbers, and as the names of dynamic dimensions.

A strided cache has two rows more than whole groups fit: for the incomplete last group, and for the last one that a call
may touch.
"""

from __future__ import annotations

NAME = "capacity"


def cache_rows(capacity: int | str, stride: int) -> int | str:
    """Rows for `capacity` tokens; for the name "capacity" the name of the dimension."""
    if stride == 1:
        return capacity
    return f"{capacity}_per_{stride}" if isinstance(capacity, str) else capacity // stride + 2


def stride_of(dimension: int | str) -> int | None:
    """The stride that a dimension's name speaks of; None for a number and for any other name."""
    if not isinstance(dimension, str) or not dimension.startswith(NAME):
        return None
    return int(dimension.removeprefix(NAME).removeprefix("_per_") or 1)
