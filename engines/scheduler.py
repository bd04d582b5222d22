"""Continuous batching: one thread owns the runner, requests join and leave between its calls.

Every running request has a row in a batch of caches. Batches differ in capacity, so that a long request does not make
short ones pay for its length; a request that outgrows its batch moves its row to the next. A round pre-fills one chunk
of one request and then decodes one token of every other: neither kind starves the other. Rows are views of the
batch's memory, so a call can take any run of neighbouring rows, and nothing is copied for it.

A prompt that begins like that of another request, ended or running, copies what that has computed. If the other is
still computing it, it waits its turn.

Shapes: B rows of a call, S tokens of a call, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsa_export.cli import UserError
from engines.memory import OutOfMemory, chunk_tokens
from engines.prefix_cache import SHORTEST, PrefixCache
from engines.sampling import Sampler
from engines.session import Runner, bucket, buckets, common_prefix
from engines.text import Answer

logger = logging.getLogger(__name__)

SMALLEST_CAPACITY = 2048
"""Fewer batches mean fewer calls: below this, sharing a batch is worth more than short rows."""


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
    `cached`: how many of the prompt's tokens another request had computed; known with the first event.
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


class Row:
    """A running request: its place, the tokens in its caches, and those that are not there yet.

    A row with one pending token, be it the last of the prompt or the one just drawn, is decoded with its neighbours.
    """

    def __init__(self, request: Request):
        self.request = request
        self.started = False
        self.length = 0
        self.pending = request.prompt
        self.batch: Batch
        self.number = -1


class Batch:
    """Caches of one capacity, with a row for every slot of the scheduler."""

    def __init__(self, runner: Runner, slots: int, capacity: int):
        self.runner = runner
        self.caches = runner.allocate(slots, capacity)
        self.capacity = capacity
        self.chunk = chunk_tokens(runner.engine, runner.engine.limits.prefill_chunk, 1, capacity)
        self.rows: list[Row | None] = [None] * slots
        self._views: dict[tuple[int, int], Any] = {}

    def view(self, start: int, stop: int) -> Any:
        if (start, stop) not in self._views:
            self._views[start, stop] = self.runner.rows(self.caches, start, stop)
        return self._views[start, stop]

    def take(self, row: Row) -> None:
        """Gives a row the first free place, with the tokens that it brings from another place or batch."""
        number = self.rows.index(None)
        if row.number >= 0:
            source = row.batch.view(row.number, row.number + 1)
            self.runner.copy(source, self.view(number, number + 1), row.length)
            row.batch.free(row)
        self.rows[number] = row
        row.batch, row.number = self, number

    def free(self, row: Row) -> None:
        self.rows[row.number] = None

    def prefill(self, row: Row) -> np.ndarray | None:
        """One chunk of a row's pending tokens. Returns logits [V] when none are left."""
        S = min(len(row.pending), self.chunk)
        caches = self.view(row.number, row.number + 1)
        logits = self.runner.run(caches, row.pending[None, :S], np.array([row.length]), np.array([S]))
        row.length += S
        row.pending = row.pending[S:]
        return None if len(row.pending) else logits[0]

    def ready(self) -> list[Row]:
        """The rows with one token pending, in the order of their places."""
        return [row for row in self.rows if row and len(row.pending) == 1]

    def decode(self) -> list[tuple[Row, np.ndarray]]:
        """One token of every row that has one pending. Returns them with their logits [V], valid until the next call.

        Rows in between take part: their dummy token lands behind their end, where nothing is visible. Rows may move.
        """
        ready = self._close_gaps()
        if not ready:
            return []
        start, stop = ready[0].number, ready[-1].number + 1
        input_ids = np.zeros((stop - start, 1), np.int64)
        past_lengths = np.array([row.length if row else 0 for row in self.rows[start:stop]], np.int64)
        for row in ready:
            input_ids[row.number - start] = row.pending
        logits = self.runner.run(self.view(start, stop), input_ids, past_lengths, np.ones(stop - start, np.int64))
        for row in ready:
            row.length += 1
            row.pending = row.pending[1:]
        return [(row, logits[row.number - start]) for row in ready]

    def _close_gaps(self) -> list[Row]:
        """ready(), once the last have moved to free places before them, where most of a call would be for nothing."""
        while ready := self.ready():
            last = ready[-1]
            if last.number + 1 - ready[0].number <= 2 * len(ready) or None not in self.rows[: last.number]:
                break
            self.take(last)
        return ready


class Scheduler:
    """Runs up to `slots` requests at a time; up to `queue` more wait their turn, first come first served.

    prefix_cache: tokens of ended requests that are kept for prompts that begin alike; 0: no prompt takes from another.
    """

    def __init__(self, runner: Runner, *, slots: int, queue: int, prefix_cache: int = 0):
        self.runner = runner
        self.prefixes = PrefixCache(runner, prefix_cache)
        self.slots = slots
        self.queue = queue
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._rows: list[Row] = []
        self._batches: dict[int, Batch] = {}
        self._stopping = False
        self._ended = "the server is shutting down"
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
    def most_cache_slots(self) -> int:
        """What the batches have at most: a batch of every capacity can live at a time."""
        return self.slots * sum(buckets(self.runner.engine, SMALLEST_CAPACITY))

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
                raise Stopped(self._ended)
            if len(self._waiting) + len(self._rows) >= self.slots + self.queue:
                raise Busy(f"{self.slots} requests are running and {self.queue} waiting: try again later")
            self._waiting.append(request)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                self._round()
        except BaseException:  # an error of ours, which the thread then reports
            self._ended = "the server failed: see its log"
            raise
        finally:  # nobody may wait forever
            with self._changed:
                self._stopping = True
                requests = [*self._waiting, *(row.request for row in self._rows)]
                self._waiting.clear()
                self._rows.clear()
            for request in requests:
                request.listener(Event(error=Stopped(self._ended)))

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
        self._prefill()
        for batch in list(self._batches.values()):
            self._decode(batch)
        for capacity in [c for c, batch in self._batches.items() if not any(batch.rows)]:
            if capacity > min(self._batches):
                del self._batches[capacity]

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.slots:
            with self._changed:
                row = Row(self._waiting.popleft())
                self._rows.append(row)
            self._place(row)

    def _place(self, row: Row) -> None:
        """Finds a row in a batch with room for the pending tokens."""
        capacity = bucket(self.runner.engine, row.length + len(row.pending), SMALLEST_CAPACITY)
        try:
            if capacity not in self._batches:
                self._batches[capacity] = self._allocate(capacity)
            self._batches[capacity].take(row)
        except (UserError, MemoryError) as error:
            self._fail(row, error)

    def _allocate(self, capacity: int) -> Batch:
        try:
            return Batch(self.runner, self.slots, capacity)
        except (OutOfMemory, MemoryError):
            if not self.prefixes.clear():
                raise
        return Batch(self.runner, self.slots, capacity)

    def _prefill(self) -> None:
        """One chunk of the first prompt that need not wait for another."""
        prompts = [row for row in self._rows if len(row.pending) > 1]
        row = next((row for row in prompts if row.started or self._start(row)), None)
        if row is None or len(row.pending) == 1:
            return
        with self._changed:  # whose turn it was goes to the end
            self._rows.remove(row)
            self._rows.append(row)
        try:
            logits = row.batch.prefill(row)
        except (UserError, MemoryError) as error:
            self._fail(row, error, again=True)
            return
        if logits is not None:
            self._next_token(row, logits)

    def _start(self, row: Row) -> bool:
        """Copies what others have computed of a prompt. Returns False if it is better to wait for more of that."""
        prompt = row.request.prompt
        tokens, prefix = self.prefixes.longest(prompt)
        source = prefix.caches if prefix else None
        for other in self._rows if self.prefixes.limit else []:
            common = common_prefix(other.request.prompt, prompt)
            if other.started and common >= tokens + SHORTEST:
                if other.length < common:
                    return False
                tokens, prefix, source = common, None, other.batch.view(other.number, other.number + 1)
        if source:
            self.runner.copy(source, row.batch.view(row.number, row.number + 1), tokens)
        if prefix:
            self.prefixes.touch(prefix)
        row.started, row.length, row.pending = True, tokens, prompt[tokens:]
        row.request.cached = tokens
        return True

    def _decode(self, batch: Batch) -> None:
        try:
            decoded = batch.decode()
        except (UserError, MemoryError) as error:  # the longest row needs most: the others try again without it
            self._fail(max(batch.ready(), key=lambda row: row.length), error, again=True)
            return
        for row, logits in decoded:
            self._next_token(row, logits)

    def _next_token(self, row: Row, logits: np.ndarray) -> None:
        request = row.request
        try:
            token = request.sampler(logits)
            text = request.answer.push(token)
        except Exception as error:  # whatever is wrong with one request must not end the others
            if not isinstance(error, UserError):
                logger.exception("a request failed")
            self._fail(row, error)
            return
        if text or request.answer.finish_reason:
            request.listener(Event(text, request.answer.finish_reason))
        if request.answer.finish_reason:
            self._leave(row)
            return
        row.pending = np.array([token], np.int64)
        if row.length + 1 > row.batch.capacity:
            self._place(row)

    def _fail(self, row: Row, error: Exception, *, again: bool = False) -> None:
        """Ends a request with an error. again: the next round may try again if there will be more memory then."""
        if again and isinstance(error, (OutOfMemory, MemoryError)) and self.prefixes.clear():
            return
        self._leave(row, keep=False)
        row.request.listener(Event(error=error))

    def _leave(self, row: Row, *, keep: bool = True) -> None:
        self._rows.remove(row)
        if row.number < 0:
            return
        if keep:
            tokens = np.concatenate([row.request.prompt, np.array(row.request.answer.tokens, np.int64)])[: row.length]
            self.prefixes.keep(tokens, row.batch.view(row.number, row.number + 1))
        row.batch.free(row)
