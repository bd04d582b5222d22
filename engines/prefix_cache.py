"""What ended requests have computed, kept for prompts that begin alike, as every turn of a conversation does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsa_export.cli import UserError
from engines.session import Caches, Runner, common_prefix, slots_of

SHORTEST = 16
"""Tokens from which on reuse is worth a copy; shorter beginnings are those of a chat template."""
REPLACED = 0.75
"""Tokens that hold as much of a prefix replace it: the next turn of a conversation, or another question to its text."""


@dataclass(frozen=True)
class Prefix:
    """tokens [T] int64, and caches of one row whose first T slots are theirs."""

    tokens: np.ndarray
    caches: Any


class PrefixCache:
    """Copies of rows, in caches of their own, up to `limit` slots altogether; the oldest go first.

    A row is copied when its request ends, and once more when a prompt begins like it: little beside computing it.
    """

    def __init__(self, runner: Runner, limit: int):
        self.runner = runner
        self.limit = limit
        self._kept: list[Prefix] = []

    def keep(self, tokens: np.ndarray, caches: Caches) -> None:
        """Copies the row in `caches`, or as much of it as the limit lets in; nothing where memory is short."""
        tokens = tokens[: self.limit]
        slots = slots_of(self.runner.engine, len(tokens))
        if len(tokens) < SHORTEST or slots > self.limit:
            return
        commons = [(common_prefix(prefix.tokens, tokens), prefix) for prefix in self._kept]
        holding = next((prefix for common, prefix in commons if common >= len(tokens) - 1), None)
        if holding:
            self.touch(holding)
            return
        self._kept = [prefix for common, prefix in commons if common < REPLACED * len(prefix.tokens)]
        while self._kept and sum(prefix.caches.capacity for prefix in self._kept) + slots > self.limit:
            del self._kept[0]
        try:
            prefix = Prefix(tokens, self.runner.allocate(1, slots))
        except (UserError, MemoryError):
            return
        self.runner.copy(caches, prefix.caches, len(tokens))
        self._kept.append(prefix)

    def longest(self, prompt: np.ndarray) -> tuple[int, Prefix | None]:
        """The prefix that has most of a prompt's first tokens, and how many: at least SHORTEST, or (0, None)."""
        found = [(common_prefix(prefix.tokens, prompt), prefix) for prefix in self._kept]
        tokens, prefix = max(found, key=lambda pair: pair[0], default=(0, None))
        return (tokens, prefix) if tokens >= SHORTEST else (0, None)

    def touch(self, prefix: Prefix) -> None:
        """It has been used: the others go first."""
        self._kept = [*(other for other in self._kept if other is not prefix), prefix]

    def clear(self) -> bool:
        """Gives all memory back. Returns whether there was any."""
        had = bool(self._kept)
        self._kept.clear()
        return had
