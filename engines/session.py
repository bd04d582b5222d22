"""A batch of token sequences on an engine: prefill in chunks, decode, caches that grow without recomputation.

    runner = open_runner(Path("out/engines/ort/sparse"))
    session = Session(runner, batch=2)
    logits = session.prefill([[1, 2, 3], [4, 5]])    # [B, V]: after each row's last token
    logits = session.decode(logits.argmax(-1))       # [B, V]

Shapes: B batch, S tokens of one call, C cache capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsa_export.cli import UserError
from engines.artifacts import Engine, open_engine
from engines.memory import chunk_tokens
from engines.sampling import GREEDY, Sampler, Sampling

MIN_CAPACITY = 256
FIXED_CAPACITY = ("tensorrt", "tensorrt-rtx")
"""Backends whose caches always have the capacity of the build (NVIDIA's cache update needs it static)."""

Tokens = Sequence[int] | np.ndarray


class Caches(Protocol):
    """The caches of one batch at one capacity, in the backend's own memory."""

    batch: int
    capacity: int


def check_room(caches: Caches, input_ids: np.ndarray, past_lengths: np.ndarray) -> None:
    """Raises ValueError if a row of a call would reach beyond its caches."""
    if (past_lengths + input_ids.shape[1]).max() > caches.capacity:
        raise ValueError(f"{input_ids.shape[1]} tokens after {past_lengths.max()} exceed {caches.capacity} slots")


class Runner(Protocol):
    """One loaded engine. A backend is a class with these members."""

    engine: Engine

    def allocate(self, batch: int, capacity: int) -> Any:
        """New caches of zeros. Raises UserError if the engine was not built for this size."""

    def rows(self, caches: Any, start: int, stop: int) -> Any:
        """Rows start..stop-1 of some caches as caches of their own, in the same memory."""

    def copy(self, source: Any, target: Any, tokens: int, *, release: bool = False) -> None:
        """Copies the first `tokens` slots of every cache from one to another of as many rows; both must have them.

        release: gives the source's memory back tensor by tensor, where the backend can; it is unusable afterwards.
        """

    def randomise(self, caches: Any, seed: int) -> None:
        """Fills every cache with finite random values: to time long contexts that were not computed."""

    def run(
        self, caches: Any, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> np.ndarray:
        """One call of the graph; the caches are updated in place.

        input_ids [B, S], past_lengths [B], input_lengths [B], all int64; past_lengths + S <= C in every row.
        Returns logits [B, V] float32 at each row's last valid token; valid until the next call.
        """


def open_runner(
    folder: Path, *, threads: int | None = None, verify: bool = True, profile: Path | None = None
) -> Runner:
    """Loads an engine folder with the runner of its backend. Raises UserError if that cannot work here.

    profile: of an `ort` engine, how the name of the file begins in which ONNX Runtime notes what every node took.
    """
    engine = open_engine(folder, verify=verify)
    if engine.backend == "ort":
        from engines import ort

        if ort.runs_on_gpu():
            from engines.ort_cuda import OrtCudaRunner

            return OrtCudaRunner(engine, threads=threads, profile=profile)
        return ort.OrtRunner(engine, threads=threads, profile=profile)
    if engine.backend == "torch":
        from engines.torch_runner import TorchRunner

        return TorchRunner(engine, threads=threads)
    from engines.tensorrt_runner import TensorRTRunner

    return TensorRTRunner(engine)


class Session:
    """A batch of sequences, each with its own length, on one runner.

    batch: number of rows. capacity: slots to allocate at first (default: the smallest bucket); it grows as needed.
    prefill_chunk: tokens per prefill call (default: the engine's, halved until WORKSPACE_BYTES suffices).
    """

    def __init__(self, runner: Runner, batch: int = 1, *, capacity: int = 0, prefill_chunk: int | None = None):
        limits = runner.engine.limits
        if not 1 <= batch <= limits.max_batch:
            raise UserError(f"{runner.engine.folder} was built for 1 to {limits.max_batch} rows, not for {batch}")
        self.runner = runner
        self.engine = runner.engine
        self.prefill_chunk = prefill_chunk
        self.lengths = np.zeros(batch, np.int64)
        self._last = np.zeros(batch, np.int64)  # last token of each row; stale after truncate()
        self.caches: Caches = runner.allocate(batch, self._capacity(capacity) if capacity else bucket(self.engine, 1))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.caches.capacity

    def prefill(
        self, tokens: Sequence[Tokens], on_chunk: Callable[[int], None] | None = None, *, chunk: int | None = None
    ) -> np.ndarray:
        """Appends tokens[b] (at least one) to row b. Returns logits [B, V] float32 after each row's last token.

        on_chunk is called with the number of tokens of the longest row that each call took. chunk: tokens per call
        (default: chunk_tokens()).
        Raises UserError, before anything is computed, if a row would outgrow the engine or a token is not in V.
        """
        rows = [np.asarray(row, np.int64) for row in tokens]
        self._check_rows(rows)
        self.reserve(int((self.lengths + [len(row) for row in rows]).max()))
        logits = np.empty((self.batch, self.engine.model.vocab_size), np.float32)
        done = np.zeros(self.batch, np.int64)
        sizes = np.array([len(row) for row in rows])
        chunk = chunk or self.chunk_tokens()
        while (done < sizes).any():
            # Padding is written behind a row's end: the call must not reach over the last slot of any row.
            room = int(self.capacity - self.lengths.max())
            S = min(int((sizes - done).max()), chunk, max(room, 1))
            input_ids = np.zeros((self.batch, S), np.int64)
            taken = np.minimum(sizes - done, S)
            for b, row in enumerate(rows):
                input_ids[b, : taken[b]] = row[done[b] : done[b] + taken[b]]
            # A finished row still takes part: a dummy token lands behind its end, where nothing is visible, or, if
            # its caches are full, its last token is written once more.
            full = self.lengths == self.capacity
            input_ids[full, 0] = self._last[full]
            chunk_logits = self.runner.run(self.caches, input_ids, self.lengths - full, np.maximum(taken, 1))
            done += taken
            ended = np.flatnonzero(taken)
            self._last[ended] = input_ids[ended, taken[ended] - 1]
            self.lengths += taken
            finished = (taken > 0) & (done == sizes)
            logits[finished] = chunk_logits[finished]
            if on_chunk:
                on_chunk(S)
        return logits

    def decode(self, tokens: Tokens) -> np.ndarray:
        """Appends one token per row, tokens [B]. Returns logits [B, V] float32; valid until the next call."""
        step = np.asarray(tokens, np.int64).reshape(-1, 1)
        self._check_rows(list(step))
        self.reserve(int(self.lengths.max()) + 1)
        logits = self.runner.run(self.caches, step, self.lengths, np.ones(self.batch, np.int64))
        self.lengths += 1
        self._last = step[:, 0]
        return logits

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        on_token: Callable[[int, int], None] | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """Continues the prompts until every row met an end token, has max_new_tokens or fills the engine's capacity.

        on_token(row, token) is called as tokens appear, end tokens included. Returns the new tokens of each row.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return answers
        running = set(range(len(prompts)))
        samplers = [Sampler(sampling, row) for row in range(len(prompts))]
        logits = self.prefill(prompts)
        room = self.engine.limits.max_context - self.lengths + 1  # the last token is written to no slot
        while True:
            tokens = np.array([sampler(row) for sampler, row in zip(samplers, logits, strict=True)])
            for b in sorted(running):
                answers[b].append(int(tokens[b]))
                if on_token:
                    on_token(b, int(tokens[b]))
                ended = int(tokens[b]) in self.engine.model.eos_token_id
                if ended or len(answers[b]) >= min(max_new_tokens, room[b]):
                    running.discard(b)
            if not running:
                return answers
            # Rows that have ended write their last token again: they need no room, and keep what they hold.
            idle = np.array([b not in running for b in range(self.batch)])
            tokens[idle] = self._last[idle]
            self.truncate(self.lengths - idle)
            logits = self.decode(tokens)

    def truncate(self, lengths: int | Tokens) -> None:
        """Forgets what stands behind `lengths` (per row, or one for all); the caches stay as they are."""
        shorter = np.broadcast_to(np.asarray(lengths, np.int64), self.lengths.shape)
        if (shorter > self.lengths).any() or (shorter < 0).any():
            raise ValueError(f"cannot truncate rows of {self.lengths.tolist()} tokens to {shorter.tolist()}")
        self.lengths = shorter.copy()

    def pretend(self, length: int) -> None:
        """Fills the caches with random values and claims `length` tokens in every row: for timing, not for answers."""
        self.reserve(length)
        self.runner.randomise(self.caches, seed=0)
        self.lengths[:] = length

    def reserve(self, tokens: int, *, exact: bool = False) -> None:
        """Makes room for `tokens` tokens per row: larger caches (a bucket, or exactly so many), copied."""
        if tokens <= self.capacity:
            return
        capacity = self._capacity(tokens) if exact else bucket(self.engine, tokens)
        larger = self.runner.allocate(self.batch, capacity)
        try:
            self.runner.copy(self.caches, larger, int(self.lengths.max()), release=True)
        except BaseException:  # such as Ctrl-C: what the old caches held is gone in part
            self.lengths[:] = 0
            raise
        finally:
            self.caches = larger

    def chunk_tokens(self) -> int:
        """Tokens per row of one prefill call at the present capacity."""
        if self.prefill_chunk:
            return self.prefill_chunk
        return chunk_tokens(self.engine, self.engine.limits.prefill_chunk, self.batch, self.capacity)

    def _capacity(self, tokens: int) -> int:
        """The capacity for exactly `tokens` tokens."""
        return slots_of(self.engine, max(tokens, self.engine.max_topk))

    def _check_rows(self, rows: list[np.ndarray]) -> None:
        if len(rows) != self.batch or any(row.ndim != 1 or not len(row) for row in rows):
            raise ValueError(f"expected {self.batch} rows of at least one token")
        limit = self.engine.limits.max_context
        for b, row in enumerate(rows):
            where = f"row {b}: " if self.batch > 1 else ""
            if self.lengths[b] + len(row) > limit:
                raise UserError(
                    f"{where}{self.lengths[b] + len(row)} tokens do not fit into {limit} "
                    f"(the capacity that {self.engine.folder} was built for): shorten the prompt or rebuild with a "
                    f"larger --max-context (the model knows {self.engine.model.max_position_embeddings} positions)"
                )
            if row.min() < 0 or row.max() >= self.engine.model.vocab_size:
                raise UserError(f"{where}token ids must lie in 0..{self.engine.model.vocab_size - 1}")


def common_prefix(known: Tokens, prompt: Tokens) -> int:
    """How many of a prompt's first tokens are the known ones; its last token has to be computed for its logits."""
    size = min(len(known), len(prompt) - 1)
    differ = np.flatnonzero(np.asarray(known[:size]) != np.asarray(prompt[:size]))
    return int(differ[0]) if len(differ) else size


def slots_of(engine: Engine, tokens: int) -> int:
    """The slots that caches of `tokens` tokens have: some backends know but one capacity."""
    return engine.limits.max_context if engine.backend in FIXED_CAPACITY else tokens


def bucket(engine: Engine, tokens: int, smallest: int = MIN_CAPACITY) -> int:
    """The capacity of caches that are to hold `tokens`: a power of two, at most what the engine was built for."""
    needed = max(tokens, engine.max_topk, smallest)
    return slots_of(engine, min(1 << (needed - 1).bit_length(), max(engine.limits.max_context, engine.max_topk)))


def buckets(engine: Engine, smallest: int = MIN_CAPACITY) -> list[int]:
    """Every capacity that bucket() chooses."""
    capacities = [bucket(engine, 1, smallest)]
    while capacities[-1] < engine.limits.max_context:
        capacities.append(bucket(engine, capacities[-1] + 1, smallest))
    return capacities
