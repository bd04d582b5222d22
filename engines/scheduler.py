"""Continuous batching: one thread owns the runner, requests join and leave between its calls.

Every running request has a row in a batch of caches. Batches differ in capacity, so that a long request does not make
short ones pay for its length; a request that outgrows its batch moves its row to the next. A round pre-fills one chunk
of one request and then decodes one token of every other: neither kind starves the other. Rows are views of the
batch's memory, so a call can take any run of neighbouring rows, and nothing is copied.

A request that has ended leaves its tokens in its place until the place or the memory is needed. The next prompt that
begins with the same tokens, as every turn of a conversation does, takes them from there and computes only the rest.

Shapes: B rows of a call, S tokens of a call, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsa_export.cli import UserError
from engines.memory import chunk_tokens
from engines.sampling import Sampler
from engines.session import Runner, bucket, common_prefix
from engines.text import Answer

SMALLEST_CAPACITY = 2048
"""Fewer batches mean fewer calls: below this, sharing a batch is worth more than short rows."""
LARGEST_GAP = 2
"""Rows between two that decode, which a call takes along in vain; more of them cost more than a second call."""


class Busy(Exception):
    """All rows and all places in the queue are taken."""


class Stopped(Exception):
    """The scheduler has been stopped, or its thread ended with an error."""


@dataclass(frozen=True)
class Event:
    """What happened to a request: more text, its end (finish_reason or error), or both text and end."""

    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None


class Request:
    """A prompt to be continued. `listener` is called from the scheduler's thread and must not block.

    The prompt and the answer's limit together must fit into the engine (the answer's last token need not).
    `cached`: how many of the prompt's tokens an earlier request had computed; known with the first event.
    """

    def __init__(self, prompt: Sequence[int], answer: Answer, sampler: Sampler, listener: Callable[[Event], None]):
        self.prompt = np.asarray(prompt, np.int64)
        self.answer = answer
        self.sampler = sampler
        self.listener = listener
        self.cancelled = False
        self.cached = 0

    def cancel(self) -> None:
        """Nobody waits for the rest: its row becomes free before the next call."""
        self.cancelled = True


class Prefix:
    """Tokens, of which the first `length` stand in the caches of a place in a batch: what an ended request has left."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = list(tokens)
        self.length = len(self.tokens)
        self.used = time.monotonic()
        self.batch: Batch
        self.number = -1


class Row(Prefix):
    """A running request: its place, its tokens, and how many of them are in the caches.

    A row with one pending token, be it the last of the prompt or the one just drawn, is decoded with its neighbours.
    """

    def __init__(self, request: Request):
        super().__init__(request.prompt.tolist())
        self.length = 0
        self.request = request

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.length


class Batch:
    """Caches of one capacity, with a place for every slot of the scheduler."""

    def __init__(self, runner: Runner, slots: int, capacity: int):
        self.runner = runner
        self.caches = runner.allocate(slots, capacity)
        self.capacity = capacity
        self.chunk = chunk_tokens(runner.engine, runner.engine.limits.prefill_chunk, 1, capacity)
        self.places: list[Prefix | None] = [None] * slots
        self._views: dict[tuple[int, int], Any] = {}

    def view(self, start: int, stop: int) -> Any:
        if (start, stop) not in self._views:
            self._views[start, stop] = self.runner.rows(self.caches, start, stop)
        return self._views[start, stop]

    @property
    def rows(self) -> list[Row]:
        """The running requests, in the order of their places."""
        return [place for place in self.places if isinstance(place, Row)]

    @property
    def kept(self) -> list[Prefix]:
        """What ended requests have left."""
        return [place for place in self.places if place and not isinstance(place, Row)]

    def take(self, row: Row, source: Prefix | None, tokens: int) -> None:
        """Gives a row a place, with the first `tokens` tokens of the caches of `source`.

        A source of which nothing more is wanted gives up its place, or is continued in it.
        """
        used_up = source and source.length == tokens and (source is row or not isinstance(source, Row))
        number = source.number if source and used_up and source.batch is self else self._free_place()
        if source and (source.batch, source.number) != (self, number):
            old = source.batch.view(source.number, source.number + 1)
            self.runner.copy(old, self.view(number, number + 1), tokens)
            if used_up:
                source.batch.places[source.number] = None
        self.places[number] = row
        row.batch, row.number, row.length = self, number, tokens

    def _free_place(self) -> int:
        """An empty place, or else the one that has been kept the longest without use."""
        if None in self.places:
            return self.places.index(None)
        return min(self.kept, key=lambda prefix: prefix.used).number

    def leave(self, row: Row, *, keep: bool) -> None:
        """Ends a row. keep: its tokens stay, but for one if the place is full: a row in between needs a free slot."""
        self.places[row.number] = None
        if keep and row.length:
            kept = Prefix(row.tokens[: min(row.length, self.capacity - 1)])
            kept.batch, kept.number = self, row.number
            self.places[row.number] = kept

    def prefill(self, row: Row) -> np.ndarray | None:
        """One chunk of a row's pending tokens. Returns logits [V] when none are left."""
        S = min(row.pending, self.chunk)
        caches = self.view(row.number, row.number + 1)
        chunk = np.array([row.tokens[row.length : row.length + S]], np.int64)
        logits = self.runner.run(caches, chunk, np.array([row.length]), np.array([S]))
        row.length += S
        return None if row.pending else logits[0]

    def ready(self) -> list[Row]:
        """The rows with one token pending, in the order of their places."""
        return [row for row in self.rows if row.pending == 1]

    def decode(self, ready: list[Row]) -> list[tuple[Row, np.ndarray]]:
        """One token of each of these rows. Returns them with their logits [V], valid until the next call.

        Rows in between take part: their dummy token lands behind their end, where nothing is visible.
        """
        start, stop = ready[0].number, ready[-1].number + 1
        input_ids = np.zeros((stop - start, 1), np.int64)
        past_lengths = np.array([place.length if place else 0 for place in self.places[start:stop]], np.int64)
        for row in ready:
            input_ids[row.number - start] = row.tokens[-1]
        logits = self.runner.run(self.view(start, stop), input_ids, past_lengths, np.ones(stop - start, np.int64))
        for row in ready:
            row.length += 1
        return [(row, logits[row.number - start]) for row in ready]


def neighbours(rows: list[Row]) -> list[list[Row]]:
    """Rows of a batch in groups without gaps of more than LARGEST_GAP: one call each."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and row.number - groups[-1][-1].number - 1 <= LARGEST_GAP:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Scheduler:
    """Runs up to `slots` requests at a time; up to `queue` more wait their turn, first come first served.

    prefix_cache: how many tokens of ended requests are kept for prompts that begin alike; 0: none are reused at all.
    """

    def __init__(self, runner: Runner, *, slots: int, queue: int, prefix_cache: int = 0):
        self.runner = runner
        self.slots = slots
        self.queue = queue
        self.prefix_cache = prefix_cache
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._batches: dict[int, Batch] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after its present call; open requests get Stopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises Busy or Stopped."""
        with self._changed:
            if not self.alive:
                raise Stopped("the server is shutting down")
            if len(self._waiting) + len(self._rows) >= self.slots + self.queue:
                raise Busy(f"{self.slots} requests are running and {self.queue} waiting: try again later")
            self._waiting.append(request)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._round()
        finally:  # also after an error of ours, which the thread then reports: nobody may wait forever
            with self._changed:
                self._stopping = True
                requests = [*self._waiting, *(row.request for row in self._rows)]
                self._waiting.clear()
                self._rows.clear()
            for request in requests:
                request.listener(Event(error=Stopped("the server is shutting down")))

    def _wait(self) -> bool:
        """Waits until there is something to do. Returns False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._rows)
            return not self._stopping

    def _round(self) -> None:
        for row in [row for row in self._rows if row.request.cancelled]:
            self._leave(row)
        with self._changed:
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
        self._admit()
        prompts = [row for row in self._rows if row.pending > 1]
        if prompts:
            self._prefill(prompts[0])
        for batch in list(self._batches.values()):
            for rows in neighbours(batch.ready()):
                self._decode(batch, rows)
        for capacity in [c for c, batch in self._batches.items() if not any(batch.places)]:
            if capacity > min(self._batches):
                del self._batches[capacity]

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.slots:
            with self._changed:
                row = Row(self._waiting.popleft())
                self._rows.append(row)
            source, tokens = self._longest_prefix(row.request.prompt)
            row.request.cached = tokens
            self._place(row, source, tokens)

    def _longest_prefix(self, prompt: np.ndarray) -> tuple[Prefix | None, int]:
        """The caches that have most of a prompt's first tokens, and how many."""
        places = [place for batch in self._batches.values() for place in batch.places if place]
        found = [(common_prefix(p.tokens[: p.length], prompt), p) for p in places] if self.prefix_cache else []
        tokens, source = max(found, key=lambda pair: pair[0], default=(0, None))
        if not source or not tokens:
            return None, 0
        source.used = time.monotonic()
        return source, tokens

    def _place(self, row: Row, source: Prefix | None, tokens: int) -> None:
        """Finds a place in a batch with room for the row's tokens, the first `tokens` of which come from `source`."""
        capacity = bucket(self.runner.engine, len(row.tokens), SMALLEST_CAPACITY)
        try:
            if capacity not in self._batches:
                self._batches[capacity] = self._allocate(capacity, source)
            self._batches[capacity].take(row, source, tokens)
        except (UserError, MemoryError) as error:
            self._fail(row, error)

    def _allocate(self, capacity: int, source: Prefix | None) -> Batch:
        """A new batch; what ended requests have left, but for `source`, goes where there is no memory for it."""
        try:
            return Batch(self.runner, self.slots, capacity)
        except (UserError, MemoryError):
            if not self._forget(source):
                raise
        return Batch(self.runner, self.slots, capacity)

    def _forget(self, wanted: Prefix | None = None) -> bool:
        """Frees the batches in which no request is running and nothing is wanted. Returns whether there were any."""
        idle = [c for c, batch in self._batches.items() if not batch.rows and not (wanted and wanted.batch is batch)]
        for capacity in idle:
            self._batches.pop(capacity).places.clear()  # they refer to the batch, which would outlive this
        return bool(idle)

    def _prefill(self, row: Row) -> None:
        with self._changed:  # whose turn it was goes to the end
            self._rows.remove(row)
            self._rows.append(row)
        try:
            logits = row.batch.prefill(row)
        except (UserError, MemoryError) as error:
            if not self._forget():  # else the next round tries again
                self._fail(row, error)
            return
        if logits is not None:
            self._next_token(row, logits)

    def _decode(self, batch: Batch, rows: list[Row]) -> None:
        try:
            decoded = batch.decode(rows)
        except (UserError, MemoryError) as error:  # the longest row needs most: the others try again without it
            if not self._forget():
                self._fail(max(rows, key=lambda row: row.length), error)
            return
        for row, logits in decoded:
            self._next_token(row, logits)

    def _next_token(self, row: Row, logits: np.ndarray) -> None:
        request = row.request
        try:
            token = request.sampler(logits)
        except UserError as error:
            self._fail(row, error)
            return
        text = request.answer.push(token)
        if text or request.answer.finish_reason:
            request.listener(Event(text, request.answer.finish_reason))
        if request.answer.finish_reason:
            self._leave(row)
            return
        row.tokens.append(token)
        if len(row.tokens) > row.batch.capacity:
            self._place(row, row, row.length)

    def _fail(self, row: Row, error: Exception) -> None:
        self._leave(row, keep=False)
        row.request.listener(Event(error=error))

    def _leave(self, row: Row, *, keep: bool = True) -> None:
        self._rows.remove(row)
        if row.number < 0:
            return
        row.batch.leave(row, keep=keep)
        kept = sorted((p for batch in self._batches.values() for p in batch.kept), key=lambda prefix: prefix.used)
        surplus = sum(prefix.length for prefix in kept) - self.prefix_cache
        for prefix in kept:
            if surplus > 0:
                prefix.batch.places[prefix.number] = None
                surplus -= prefix.length
