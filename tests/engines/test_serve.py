"""The server over real HTTP on loopback: answers, several clients, bad requests, clients that leave, stopping."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST
from engines import prefix_cache, serve
from engines.api import ChatRequest, Content, Prompt, Stop
from engines.app import Server, create_app
from engines.artifacts import open_engine
from engines.memory import OutOfMemory
from engines.ort import OrtRunner
from engines.prefix_cache import SHORTEST, PrefixCache
from engines.sampling import Sampler, Sampling
from engines.scheduler import SMALLEST_CAPACITY, Batch, Busy, Event, Request, Row, Scheduler, Stopped
from engines.session import Runner, Session, open_runner
from engines.text import Answer, Text
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

ROOT = Path(__file__).resolve().parents[2]
Process = subprocess.Popen[str]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@contextmanager
def serving(
    runner: Runner, *, slots: int = 4, queue: int = 64, endless: bool = False, grace: int = 5
) -> Iterator[httpx.Client]:
    """A server in a thread of this process, and a client of it; it must end as its command would.

    endless: no token ends an answer. grace: seconds that a stop leaves to running requests.
    """
    scheduler = Scheduler(runner, slots=slots, queue=queue, prefix_cache=runner.engine.limits.max_context)
    text = Text(runner.engine)
    if endless:
        text.end_tokens = frozenset()
    app = create_app(scheduler, text, model="toy", max_body=100_000)
    server = Server(app, scheduler, grace)
    address = serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]})
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{address.getsockname()[1]}", timeout=60) as client:
        wait_until(lambda: server.started)
        try:
            yield client
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive() and not scheduler.alive


def slowly(run: Any) -> Any:
    """OrtRunner.run that takes at least 10 ms: so that 4,000 tokens outlast a test on a fast machine too."""

    def slow_run(*arguments: Any) -> Any:
        time.sleep(0.01)
        return run(*arguments)

    return slow_run


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtRunner, "run", slowly(OrtRunner.run))


SLOWLY = (
    "-c",
    """
from dsa_export.cli import run
from engines import serve
from tests.engines.test_serve import OrtRunner, slowly
OrtRunner.run = slowly(OrtRunner.run)
run(serve.main)
""",
)


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client(runners: dict[str, Runner]) -> Iterator[httpx.Client]:
    with serving(runners["sparse"]) as client:
        yield client


@pytest.fixture(scope="module")
def text(runners: dict[str, Runner]) -> Text:
    return Text(runners["sparse"].engine)


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, toy.END_OF_TEXT, length).tolist()


def alone(runner: Runner, prompt: list[int], tokens: int) -> str:
    """The greedy answer of a session that nobody shares."""
    answer = Answer(Text(runner.engine), tokens)
    session = Session(runner)
    logits = session.prefill([prompt])
    shown = answer.push(int(logits[0].argmax()))
    while not answer.finish_reason:
        shown += answer.push(int(session.decode([answer.tokens[-1]])[0].argmax()))
    return shown


def complete(client: httpx.Client, prompt: Any, tokens: int = 8, **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a stream, whose last line must be [DONE]."""
    with client.stream("POST", url, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def idle(client: httpx.Client) -> bool:
    state = client.get("/health").json()
    return state["running"] == 0 and state["waiting"] == 0


# Answers


def test_a_completion_equals_the_session(client: httpx.Client, runners: dict[str, Runner]):
    prompt = prompt_of(30, 0)
    answer = complete(client, prompt, 12)
    assert answer["choices"][0]["text"] == alone(runners["sparse"], prompt, 12)
    assert answer["object"] == "text_completion" and answer["model"] == "toy"
    assert answer["created"] == pytest.approx(time.time(), abs=60)
    assert answer["usage"]["prompt_tokens"] == 30
    assert answer["usage"]["total_tokens"] == 30 + answer["usage"]["completion_tokens"]
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_stream_says_the_same_as_the_whole(client: httpx.Client):
    body = {"messages": [{"role": "user", "content": "Hällo 😀"}], "temperature": 0, "max_tokens": 20}
    whole = client.post(CHAT, json=body).json()
    parts = stream(client, CHAT, {**body, "stream_options": {"include_usage": True}})
    deltas = [part["choices"][0]["delta"] for part in parts[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    for usage in (parts[-1]["usage"], whole["usage"]):
        del usage["prompt_tokens_details"]  # the stream finds the prompt computed
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []
    assert parts[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_a_stream_tells_no_usage_that_nobody_asked_for(client: httpx.Client, options: dict[str, bool] | None):
    body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "stream_options": options}
    assert not any("usage" in part for part in stream(client, COMPLETIONS, body))


def test_chat_applies_the_template(client: httpx.Client, text: Text):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}]
    answer = client.post(CHAT, json={"messages": messages, "max_completion_tokens": 1}).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["usage"]["prompt_tokens"] == len(text.encode("system: x\nuser: y\nassistant: "))


def test_parts_of_a_message_are_one_text(client: httpx.Client, text: Text):
    parts = [{"type": "text", "text": word} for word in ("ab", "cd")]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert client.post(CHAT, json=body).json()["usage"]["prompt_tokens"] == len(text.encode("user: abcd\nassistant: "))


def test_the_newer_limit_of_a_chat_counts(client: httpx.Client):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "temperature": 0}
    answer = client.post(CHAT, json={**body, "max_completion_tokens": 1}).json()
    assert answer["usage"]["completion_tokens"] == 1


def test_without_a_limit_a_completion_has_16_tokens_and_a_chat_fills_the_context(runners: dict[str, Runner]):
    with serving(runners["dense"], endless=True) as client:
        usage = client.post(COMPLETIONS, json={"prompt": "abc"}).json()["usage"]
        assert usage["completion_tokens"] == 16
        long = {"role": "user", "content": "x" * (toy.MAX_POSITIONS - 60)}
        usage = client.post(CHAT, json={"messages": [long]}).json()["usage"]
        assert usage["completion_tokens"] > 16 and usage["total_tokens"] == toy.MAX_POSITIONS


def test_a_completion_continues_its_prompt_and_a_chat_begins(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    continued = []

    def noted(text: Text, limit: int, stop: Sequence[str], after: Sequence[int]) -> Answer:
        continued.append(after)
        return Answer(text, limit, stop, after)

    monkeypatch.setattr("engines.app.Answer", noted)
    complete(client, [[1, 2], [3]], 1)
    client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    assert continued == [[1, 2], [3], []]


def test_several_prompts_give_several_choices(client: httpx.Client, runners: dict[str, Runner]):
    prompts = [prompt_of(9, 1), prompt_of(21, 2)]
    answer = complete(client, prompts, 6)
    assert [c["text"] for c in answer["choices"]] == [alone(runners["sparse"], prompt, 6) for prompt in prompts]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 9 + 21
    assert answer["usage"]["completion_tokens"] == sum(
        complete(client, prompt, 6)["usage"]["completion_tokens"] for prompt in prompts
    )
    parts = stream(client, COMPLETIONS, {"prompt": prompts, "max_tokens": 6, "temperature": 0})
    for i in (0, 1):
        streamed = "".join(p["choices"][0]["text"] for p in parts if p["choices"][0]["index"] == i)
        assert streamed == answer["choices"][i]["text"]


def test_a_stop_string_ends_an_answer(client: httpx.Client):
    whole = complete(client, "abcd", 40)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:2]
    cut = complete(client, "abcd", 40, stop=[stop])["choices"][0]
    assert complete(client, "abcd", 40, stop=stop)["choices"][0] == cut
    assert cut == {"index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop"}


def test_a_seed_repeats_an_answer(client: httpx.Client):
    body = {"prompt": "abc", "max_tokens": 20, "seed": 3, "temperature": 1.5, "top_p": 0.9}
    answers = [client.post(COMPLETIONS, json=body).json()["choices"][0]["text"] for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0] != client.post(COMPLETIONS, json={**body, "seed": 4}).json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "given, sampling",
    [
        ({}, Sampling(1.0, 1.0, seed=3)),  # OpenAI's defaults
        ({"temperature": 1.5, "top_p": 0.6}, Sampling(1.5, 0.6, seed=3)),
    ],
)
def test_tokens_are_drawn_as_the_request_says(
    client: httpx.Client, runners: dict[str, Runner], text: Text, given: dict[str, float], sampling: Sampling
):
    (tokens,) = Session(runners["sparse"]).generate([text.encode("abc")], 20, sampling=sampling)
    answer = Answer(text, 20)
    expected = "".join(answer.push(token) for token in tokens)
    response = client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 20, "seed": 3, **given}).json()
    assert response["choices"][0]["text"] == expected


def test_each_prompt_draws_its_own_tokens(client: httpx.Client, runners: dict[str, Runner], text: Text):
    rows = Session(runners["sparse"], 2).generate([text.encode("abc")] * 2, 20, sampling=Sampling(1.0, 1.0, seed=3))
    answers = [Answer(text, 20), Answer(text, 20)]
    expected = ["".join(map(answer.push, row)) for answer, row in zip(answers, rows, strict=True)]
    body = {"prompt": ["abc", "abc"], "max_tokens": 20, "seed": 3}
    assert [choice["text"] for choice in client.post(COMPLETIONS, json=body).json()["choices"]] == expected
    assert expected[0] != expected[1]


def test_models_and_health(client: httpx.Client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("toy", toy.MAX_POSITIONS)
    assert client.get("/v1/models/toy").json() == model
    wait_until(lambda: idle(client))
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0, "slots": 4}


def test_the_limit_of_the_engine_is_told_not_that_of_the_model(runners: dict[str, Runner], monkeypatch):
    engine = runners["sparse"].engine
    smaller = replace(engine, limits=replace(engine.limits, max_context=512))
    monkeypatch.setattr(runners["sparse"], "engine", smaller)
    with serving(runners["sparse"]) as client:
        assert client.get("/v1/models/toy").json()["max_model_len"] == 512
        refused(client.post(COMPLETIONS, json={"prompt": "x" * 512}), 400, "do not fit into this engine's 512")


# Several clients


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_concurrent_clients_get_what_each_gets_alone(runners: dict[str, Runner], variant: str):
    """More clients than rows, prompts of one token up to several chunks, and some that outgrow their batch."""
    runner = runners[variant]
    lengths = [1, 2, 127, 128, 129, 300, 700, 5, 64, 1, SMALLEST_CAPACITY - 3, SMALLEST_CAPACITY + 5]
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    expected = [alone(runner, prompt, 10 + i) for i, prompt in enumerate(prompts)]
    with serving(runner, slots=5) as client, ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(2):
            answers = pool.map(lambda i: complete(client, prompts[i], 10 + i), range(len(prompts)))
            assert [answer["choices"][0]["text"] for answer in answers] == expected


def test_requests_share_calls(runners: dict[str, Runner], text: Text, monkeypatch: pytest.MonkeyPatch):
    """Four requests that are there from the start decode together: as many calls as one of them needs."""
    runner = runners["sparse"]
    calls: list[tuple[int, int]] = []
    original = type(runner).run
    monkeypatch.setattr(
        type(runner), "run", lambda *args: (calls.append(args[2].shape), original(*args))[1]  # runner, caches, ids
    )  # fmt: skip
    scheduler, ended = Scheduler(runner, slots=4, queue=0), threading.Semaphore(0)
    monkeypatch.setattr(text, "end_tokens", frozenset())

    def listener(event: Event) -> None:
        assert event.error is None
        if event.finish_reason:
            ended.release()

    requests = [Request([7 + i], Answer(text, 20), Sampler(Sampling()), listener) for i in range(4)]
    scheduler._waiting.extend(requests)
    scheduler.start()
    assert all(ended.acquire(timeout=20) for _ in requests)
    scheduler.stop(20)
    assert calls == [(4, 1)] * 20


def test_free_places_between_rows_are_not_decoded(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """Requests on the places 0, 5 and 7, the last of a single token; those between them have ended."""
    calls: list[int] = []
    original = type(runner).run
    monkeypatch.setattr(type(runner), "run", lambda *args: (calls.append(len(args[2])), original(*args))[1])
    batch, prompts = Batch(runner, 8, 256), [prompt_of(n, n) for n in (5, 1, 1, 1, 1, 40, 1, 1)]
    rows = [Row(Request(prompt, None, None, None)) for prompt in prompts]  # type: ignore[arg-type]
    for row in rows:
        batch.take(row)
    for row in (*rows[1:5], rows[6]):
        batch.free(row)
    for row in (rows[0], rows[5]):
        row.pending = np.array([int(batch.prefill(row).argmax())])
    expected = {5: greedy(runner, prompts[0], 2)[1], 40: greedy(runner, prompts[5], 2)[1]}
    expected[0] = greedy(runner, prompts[7], 1)[0]
    calls.clear()
    lengths = {row: row.length for row in batch.ready()}
    assert {lengths[row]: int(logits.argmax()) for row, logits in batch.decode()} == expected
    assert calls == [6]  # place 7 moved to 1: half of the rows are of use
    batch.free(rows[7])
    batch.free(rows[0])
    rows[5].pending = np.array([1])
    batch.decode()
    assert calls == [6, 1] and [row for row in batch.rows if row] == [rows[5]]


def test_all_views_of_a_batch_share_its_logits(runners: dict[str, Runner]):
    batch = Batch(runners["dense-gqa"], 3, 256)
    for start, stop in ((0, 1), (0, 3), (1, 3)):
        assert np.shares_memory(batch.view(start, stop).logits, batch.caches.logits[start:stop])


def test_a_long_prompt_does_not_stop_the_others(runners: dict[str, Runner], text: Text):
    """While a prompt of 32 chunks is read, a running request goes on with a token after every chunk."""
    runner, order = runners["sparse"], []
    scheduler = Scheduler(runner, slots=2, queue=0)
    ended = threading.Semaphore(0)

    def listener(name: str) -> Any:
        def listen(event: Event) -> None:
            order.append(name)
            if event.finish_reason:
                ended.release()

        return listen

    class Always(Sampler):
        def __call__(self, logits: np.ndarray) -> int:
            return 70

    short = Request([1], Answer(text, 60), Always(Sampling()), listener("short"))
    long = Request(prompt_of(4000, 0), Answer(text, 2), Always(Sampling()), listener("long"))
    scheduler._waiting.extend([short, long])
    scheduler.start()
    assert all(ended.acquire(timeout=30) for _ in range(2))
    scheduler.stop(20)
    assert order[:30] == ["short"] * 30
    assert order.index("long") == pytest.approx(4000 / 128, abs=2)


def test_prompts_are_read_in_turns(runners: dict[str, Runner], endless: Text, monkeypatch: pytest.MonkeyPatch):
    """A chunk of each: who came second with a short prompt does not wait for the end of a long one."""
    read, prefill = [], Batch.prefill

    def noted(batch: Batch, row: Row) -> np.ndarray | None:
        read.append(len(row.request.prompt))
        return prefill(batch, row)

    monkeypatch.setattr(Batch, "prefill", noted)
    runner = runners["sparse"]
    long, short = (chunks * runner.engine.limits.prefill_chunk for chunks in (5, 2))
    prompts = [prompt_of(length, length) for length in (long, short)]
    with begun_together(Scheduler(runner, slots=2, queue=0), endless, prompts, tokens=2):
        pass
    assert read == [long, short, long, short, long, long, long]


def test_an_answer_fills_its_caches_where_all_places_are_taken(runners: dict[str, Runner], endless: Text, monkeypatch):
    """One place: up to the last slot of a capacity, and beyond. The last token needs none: 255, 256 and 257 of them."""
    monkeypatch.setattr("engines.scheduler.SMALLEST_CAPACITY", 256)
    runner, prompt = runners["sparse"], prompt_of(250, 0)
    with scheduling(runner, endless, slots=1) as scheduler:
        for tokens in (6, 7, 8):
            assert ask(scheduler, endless, prompt, tokens)[0] == greedy(runner, prompt, tokens)


# Prompts that begin like others


@contextmanager
def scheduling(runner: Runner, text: Text, **options: Any) -> Iterator[Scheduler]:
    scheduler = Scheduler(runner, **{"slots": 3, "queue": 64, "prefix_cache": 8192, **options})
    scheduler.start()
    yield scheduler
    scheduler.stop(20)


@pytest.fixture
def endless(text: Text, monkeypatch: pytest.MonkeyPatch) -> Text:
    monkeypatch.setattr(text, "end_tokens", frozenset())
    return text


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call that takes more than one per row."""
    sizes: list[int] = []
    original = OrtRunner.run

    def run(self: OrtRunner, caches: Any, input_ids: np.ndarray, *lengths: np.ndarray) -> np.ndarray:
        if input_ids.shape[1] > 1:
            sizes.append(input_ids.shape[1])
        return original(self, caches, input_ids, *lengths)

    monkeypatch.setattr(OrtRunner, "run", run)
    return sizes


def begin(scheduler: Scheduler, text: Text, prompt: list[int], tokens: int) -> tuple[Request, threading.Event]:
    """A greedy request, and what is set when it has ended."""
    ended = threading.Event()

    def listener(event: Event) -> None:
        if event.finish_reason or event.error:
            ended.set()

    request = Request(prompt, Answer(text, tokens), Sampler(Sampling(temperature=0)), listener)
    scheduler.submit(request)
    return request, ended


def ask(scheduler: Scheduler, text: Text, prompt: list[int], tokens: int) -> tuple[list[int], int]:
    """The tokens of a greedy answer, and how many of the prompt's had been computed before."""
    request, ended = begin(scheduler, text, prompt, tokens)
    assert ended.wait(30)
    return request.answer.tokens, request.cached


@contextmanager
def begun_together(
    scheduler: Scheduler, text: Text, prompts: list[list[int]], tokens: int, expected: int | None = None
) -> Iterator[list[Request]]:
    """Greedy requests that are there when the scheduler starts; waits for the last of them, or for so many."""
    ended = threading.Semaphore(0)

    def listener(event: Event) -> None:
        if event.finish_reason or event.error:
            ended.release()

    requests = [Request(p, Answer(text, tokens), Sampler(Sampling(temperature=0)), listener) for p in prompts]
    scheduler._waiting.extend(requests)
    scheduler.start()
    yield requests
    assert all(ended.acquire(timeout=30) for _ in range(expected or len(prompts)))
    scheduler.stop(20)


def greedy(runner: Runner, prompt: list[int], tokens: int) -> list[int]:
    session = Session(runner)
    answer = [int(session.prefill([prompt]).argmax())]
    while len(answer) < tokens:
        answer.append(int(session.decode(answer[-1:]).argmax()))
    return answer


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_a_conversation_computes_only_what_is_new(
    runners: dict[str, Runner], endless: Text, variant: str, computed: list[int]
):
    """Turn by turn, until it outgrows its batch; other prompts come in between."""
    runner, prompt, known = runners[variant], prompt_of(1700, 0), 0
    with scheduling(runner, endless) as scheduler:
        for turn in range(1, 6):
            expected, other = greedy(runner, prompt, 10), prompt_of(50, 100 + turn)
            computed.clear()
            assert ask(scheduler, endless, prompt, 10) == (expected, known)
            assert sum(computed) == len(prompt) - known
            known = len(prompt) + 9  # the last token of the answer is drawn, but not computed
            prompt = [*prompt, *expected, *prompt_of(100, turn)]
            assert ask(scheduler, endless, other, 3) == (greedy(runner, other, 3), 0)
    assert len(prompt) > SMALLEST_CAPACITY


def test_a_prompt_begins_with_that_of_a_running_request(runners: dict[str, Runner], endless: Text):
    runner, first = runners["sparse"], prompt_of(300, 0)
    second = [*first[:200], (first[200] + 1) % toy.END_OF_TEXT, *prompt_of(100, 1)]
    with scheduling(runner, endless) as scheduler:
        running, ended = begin(scheduler, endless, first, 400)
        wait_until(lambda: running.answer.tokens)
        assert ask(scheduler, endless, second, 20) == (greedy(runner, second, 20), 200)
        assert ended.wait(30)
    assert running.answer.tokens == greedy(runner, first, 400)


def test_prompts_that_come_together_compute_what_they_share_once(
    runners: dict[str, Runner], endless: Text, computed: list[int]
):
    """Six questions to one text of several chunks; the first of them ends early."""
    runner, shared = runners["sparse"], prompt_of(500, 0)
    prompts = [[*shared, i, *prompt_of(20, i)] for i in range(6)]
    expected = [greedy(runner, prompt, 5) for prompt in prompts]
    computed.clear()
    scheduler = Scheduler(runner, slots=6, queue=0, prefix_cache=4096)
    with begun_together(scheduler, endless, prompts, 5) as requests:
        pass
    assert [request.answer.tokens for request in requests] == expected
    assert sorted(request.cached for request in requests) == [0, *[500] * 5]
    assert sum(computed) == 521 + 5 * 21


def test_those_who_wait_for_a_prompt_go_on_when_it_is_cancelled(runners: dict[str, Runner], endless: Text, slow: None):
    runner, shared = runners["sparse"], prompt_of(1500, 0)
    prompts = [[*shared, i] for i in range(3)]
    scheduler = Scheduler(runner, slots=3, queue=0, prefix_cache=4096)
    with begun_together(scheduler, endless, prompts, 2, expected=2) as requests:
        wait_until(lambda: scheduler._rows and any(row.length for row in scheduler._rows))
        requests[0].cancel()
    for prompt, request in list(zip(prompts, requests, strict=True))[1:]:
        assert request.answer.tokens == greedy(runner, prompt, 2)
    assert requests[1].cached >= 128 and requests[2].cached == 1500


def test_the_oldest_prefix_goes_first(runners: dict[str, Runner], endless: Text):
    """Room for two of three prompts; the first is used again before the third comes."""
    runner = runners["sparse"]
    prompts = [[seed, *prompt_of(299, seed)] for seed in range(3)]
    with scheduling(runner, endless, prefix_cache=700) as scheduler:
        for i, known in [(0, 0), (1, 0), (0, 299), (2, 0), (0, 299), (1, 0)]:
            assert ask(scheduler, endless, prompts[i], 5) == (greedy(runner, prompts[i], 5), known)
            assert sum(prefix.caches.capacity for prefix in scheduler.prefixes._kept) <= 700


def test_a_prefix_of_which_a_part_is_used_is_not_the_oldest(runners: dict[str, Runner], endless: Text):
    runner, first, second = runners["sparse"], prompt_of(300, 0), prompt_of(300, 1)
    with scheduling(runner, endless, prefix_cache=700) as scheduler:
        for prompt, known in [(first, 0), (second, 0), ([*first[:150], *prompt_of(10, 2)], 150), (first, 299)]:
            assert ask(scheduler, endless, prompt, 2)[1] == known


def test_of_what_is_kept_and_what_runs_the_longer_beginning_is_copied(
    runners: dict[str, Runner], endless: Text, slow: None
):
    runner, kept = runners["sparse"], prompt_of(200, 0)
    with scheduling(runner, endless) as scheduler:
        ask(scheduler, endless, kept, 2)
        running, _ = begin(scheduler, endless, [*kept[:50], *prompt_of(50, 1)], 4000)
        wait_until(lambda: running.answer.tokens)
        assert ask(scheduler, endless, kept, 2)[1] == 199


def test_a_conversation_whose_answers_change_leaves_room_for_others(runners: dict[str, Runner], endless: Text):
    """An answer that comes back as other tokens: every turn replaces the one before all the same."""
    runner, other, prompt = runners["sparse"], prompt_of(200, 9), prompt_of(400, 0)
    with scheduling(runner, endless, prefix_cache=1200) as scheduler:
        ask(scheduler, endless, other, 2)
        for turn in range(5):
            found, known = ask(scheduler, endless, prompt, 5)
            assert turn == 0 or known == len(prompt) - 35
            prompt = [*prompt, (found[0] + 1) % toy.END_OF_TEXT, *found[1:], *prompt_of(30, turn + 1)]
        assert ask(scheduler, endless, other, 2) == (greedy(runner, other, 2), 199)


def test_questions_that_come_together_leave_room_for_others(runners: dict[str, Runner], endless: Text):
    """What six requests to one text leave is one copy, and the same prompt again leaves no second one."""
    runner, other, shared = runners["sparse"], prompt_of(200, 9), prompt_of(300, 0)
    with scheduling(runner, endless, prefix_cache=1000) as scheduler:
        ask(scheduler, endless, other, 2)
        requests = [begin(scheduler, endless, [*shared, i], 20) for i in range(6)]
        assert all(ended.wait(30) for _, ended in requests)
        ask(scheduler, endless, [*shared, 5], 2)
        assert ask(scheduler, endless, other, 2) == (greedy(runner, other, 2), 199)
    assert sorted(len(prefix.tokens) for prefix in scheduler.prefixes._kept) == [201, 320]


def tokens_of(length: int, seed: int) -> np.ndarray:
    return np.array(prompt_of(length, seed))


def known(prefixes: PrefixCache, tokens: np.ndarray) -> int:
    return prefixes.longest(np.append(tokens, 1))[0]


def test_the_prefix_cache_is_filled_to_its_limit_and_forgets_what_came_up_least_recently(runners: dict[str, Runner]):
    runner = runners["sparse"]
    prefixes, row = PrefixCache(runner, 400), runner.allocate(1, 512)
    first, second, third = (tokens_of(200, seed) for seed in range(3))
    for tokens in (first, second):
        prefixes.keep(tokens, row)
    assert known(prefixes, first) == known(prefixes, second) == 200
    prefixes.keep(first, row)
    prefixes.keep(third, row)
    assert [known(prefixes, tokens) for tokens in (first, second, third)] == [200, 0, 200]


@pytest.mark.parametrize("length, found", [(SHORTEST, SHORTEST), (SHORTEST - 1, 0)])
def test_a_prefix_is_worth_a_copy_from_the_shortest_on(runners: dict[str, Runner], length: int, found: int):
    runner, tokens = runners["sparse"], tokens_of(length, 0)
    prefixes = PrefixCache(runner, 400)
    prefixes.keep(tokens, runner.allocate(1, 512))
    assert known(prefixes, tokens) == found


def test_a_longer_prefix_replaces_its_beginning(runners: dict[str, Runner]):
    runner, tokens = runners["sparse"], tokens_of(400, 0)
    prefixes, row = PrefixCache(runner, 1000), runner.allocate(1, 512)
    for length in (200, 400):
        prefixes.keep(tokens[:length], row)
    assert [len(prefix.tokens) for prefix in prefixes._kept] == [400]


@pytest.mark.parametrize("failure", [OutOfMemory, MemoryError])
def test_where_memory_is_short_nothing_is_kept(runners: dict[str, Runner], monkeypatch, failure: type[Exception]):
    runner = runners["sparse"]
    prefixes, row = PrefixCache(runner, 400), runner.allocate(1, 512)

    def allocate(*_: object) -> None:
        raise failure("no memory")

    monkeypatch.setattr(type(runner), "allocate", allocate)
    prefixes.keep(tokens_of(200, 0), row)
    assert not prefixes.clear()


def test_backends_of_one_capacity_count_it(runners: dict[str, Runner], endless: Text, monkeypatch):
    runner = runners["sparse"]
    monkeypatch.setattr(prefix_cache, "slots_of", lambda engine, tokens: 1000)
    with scheduling(runner, endless, prefix_cache=1500) as scheduler:
        for seed in range(2):
            ask(scheduler, endless, prompt_of(50, seed), 2)
        assert ask(scheduler, endless, prompt_of(50, 1), 2) == (greedy(runner, prompt_of(50, 1), 2), 49)
    (kept,) = scheduler.prefixes._kept
    assert kept.caches.capacity == 1000 and len(kept.tokens) == 51
    with scheduling(runner, endless, prefix_cache=999) as scheduler:
        ask(scheduler, endless, prompt_of(50, 0), 2)
    assert not scheduler.prefixes._kept


def test_of_what_exceeds_the_limit_the_beginning_is_kept(runners: dict[str, Runner], endless: Text):
    with scheduling(runners["sparse"], endless, prefix_cache=100) as scheduler:
        for known in (0, 100):
            assert ask(scheduler, endless, prompt_of(300, 0), 2) == (
                greedy(runners["sparse"], prompt_of(300, 0), 2),
                known,
            )


def test_without_a_prefix_cache_every_prompt_is_computed(runners: dict[str, Runner], endless: Text):
    with scheduling(runners["sparse"], endless, prefix_cache=0) as scheduler:
        for _ in range(2):
            assert ask(scheduler, endless, prompt_of(30, 0), 2)[1] == 0
        running, ended = begin(scheduler, endless, prompt_of(30, 0), 200)
        wait_until(lambda: running.answer.tokens)
        assert ask(scheduler, endless, prompt_of(30, 0), 2)[1] == 0
        assert ended.wait(30)


@pytest.mark.parametrize("prompt, tokens", [(SMALLEST_CAPACITY + 1, 3), (SMALLEST_CAPACITY - 3, 10)])
def test_what_is_kept_goes_before_a_request_lacks_memory(
    runners: dict[str, Runner], endless: Text, monkeypatch: pytest.MonkeyPatch, prompt: int, tokens: int
):
    """Memory for two batches and nothing else: one that begins, or grows, takes that of what was kept."""
    runner, allocated = runners["sparse"], []
    original = type(runner).allocate

    def allocate(self: Runner, batch: int, capacity: int) -> Any:
        held = [caches.batch * caches.capacity for weakly in allocated if (caches := weakly())]
        if batch * capacity + sum(held) > 3 * 3 * SMALLEST_CAPACITY + 100:
            raise OutOfMemory("no memory for the caches")
        caches = original(self, batch, capacity)
        allocated.append(weakref.ref(caches))
        return caches

    short, long = prompt_of(150, 0), prompt_of(prompt, 1)
    expected = {0: greedy(runner, short, 3), 1: greedy(runner, long, tokens)}
    monkeypatch.setattr(type(runner), "allocate", allocate)
    with scheduling(runner, endless) as scheduler:
        assert ask(scheduler, endless, short, 3) == (expected[0], 0)
        assert ask(scheduler, endless, short, 3) == (expected[0], 149)
        assert ask(scheduler, endless, long, tokens) == (expected[1], 0)
        assert ask(scheduler, endless, short, 3) == (expected[0], 0)


@pytest.mark.parametrize("failure, known", [(OutOfMemory("no memory"), 0), (UserError("ONNX Runtime failed"), 199)])
def test_a_call_that_lacks_memory_is_made_again_without_what_is_kept(
    runners: dict[str, Runner], endless: Text, monkeypatch: pytest.MonkeyPatch, failure: UserError, known: int
):
    """Once; a call that fails for another reason costs nobody else's caches."""
    runner, kept, prompt = runners["sparse"], prompt_of(200, 0), prompt_of(300, 1)
    original, failed = type(runner).run, []

    def run(self: Runner, caches: Any, input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if past.max() == 256 and not failed:
            failed.append(True)
            raise failure
        return original(self, caches, input_ids, past, lengths)

    with scheduling(runner, endless) as scheduler:
        ask(scheduler, endless, kept, 2)
        expected = greedy(runner, prompt, 2)
        monkeypatch.setattr(type(runner), "run", run)
        assert ask(scheduler, endless, prompt, 2)[0] == ([] if known else expected)
        assert failed and ask(scheduler, endless, kept, 2)[1] == known
        assert ask(scheduler, endless, prompt, 2) == (expected, 0 if known else 299), "of what failed nothing is kept"


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_requests_with_common_prefixes_in_any_order(runners: dict[str, Runner], endless: Text, slots: int):
    """Thirty prompts of branching texts at once; some leave early."""
    runner, rng = runners["sparse"], np.random.default_rng(slots)
    texts = [prompt_of(260, 0)]
    for seed in range(1, 8):
        parent = texts[rng.integers(len(texts))]
        texts.append([*parent[: rng.integers(1, 260)], *prompt_of(260, seed)])
    prompts = [texts[rng.integers(len(texts))][: rng.integers(1, 400)] for _ in range(30)]
    limits = rng.integers(1, 12, 30).tolist()
    with scheduling(runner, endless, slots=slots, prefix_cache=1000) as scheduler:
        requests = [begin(scheduler, endless, *pair) for pair in zip(prompts, limits, strict=True)]
        for request, _ in requests[::7]:
            request.cancel()
        assert all(ended.wait(60) for i, (_, ended) in enumerate(requests) if i % 7)
    assert sum(request.cached for request, _ in requests) > 0
    for i, (request, _) in enumerate(requests):
        expected = greedy(runner, prompts[i], limits[i])
        assert request.answer.tokens == (expected if i % 7 else expected[: len(request.answer.tokens)])


def test_usage_tells_what_was_cached(runners: dict[str, Runner], text: Text):
    conversation = [{"role": "user", "content": "What is a KV cache?"}]
    with serving(runners["sparse"]) as client:
        for known in (0, len(text.chat(conversation)) - 1):
            body = {"messages": conversation, "max_tokens": 3, "temperature": 0}
            whole = client.post(CHAT, json=body).json()["usage"]
            assert whole["prompt_tokens_details"] == {"cached_tokens": known}
        *_, last = stream(client, CHAT, {**body, "stream_options": {"include_usage": True}})
        assert last["usage"] == whole


# Limits


def refused(response: httpx.Response, status: int, *words: str, kind: str = "invalid_request_error") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == kind
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"prompt": "x"', "body: JSON decode error: Expecting ',' delimiter"),
        (b"", "Field required"),
        (b"[1, 2]", "dictionary"),
        (b'"text"', "dictionary"),
        (b'{"prompt": "\xff\xfe"}', "error parsing the body"),
        (b'{"prompt": "\\ud83e"}', "not valid Unicode"),
        (b"[" * 5000, ""),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_bodies_that_are_not_requests(client: httpx.Client, content: bytes, word: str):
    response = client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    refused(response, 400, word)
    assert response.json()["error"]["param"] is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
        ({"echo": True}, None), ({"add_generation_prompt": False}, None),
        ({"max_tokens": 10**30}, "max_tokens"), ({"temperature": -0.1}, "temperature"),
        ({"temperature": 3}, "temperature"), ({"temperature": "1"}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"seed": 1.5}, "seed"), ({"stream": "yes"}, "stream"), ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"), ({"n": 2}, "n"), ({"prompt": ""}, None), ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": [toy.V]}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": ["x"] * 17}, "prompt"), ({"logprobs": 3}, None), ({"tools": [{}]}, None),
        ({"repetition_penalty": 1.1}, None), ({"min_p": 0.1}, None), ({"ignore_eos": True}, None),
        ({"best_of": 2}, None), ({"response_format": {"type": "json_object"}}, None), ({"logprobs": 0}, None),
        ({"min_tokens": 5}, None), ({"stop_token_ids": [5]}, None), ({"guided_json": {}}, None), ({"top_k": 5}, None),
        ({"tool_choice": "required"}, None), ({"prompt_logprobs": 0}, None), ({"modalities": ["text", "audio"]}, None),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(client: httpx.Client, change: dict[str, Any], param: str | None):
    response = client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 2, **change})
    refused(response, 400)
    assert (response.json()["error"]["param"] or "").split(".")[0] == (param or "")


def test_a_field_of_several_types_has_one_message(client: httpx.Client):
    for prompt in ([], 5, ["a", 1]):
        response = client.post(COMPLETIONS, json={"prompt": prompt})
        refused(response, 400, "prompt: expected a string, a list of token ids, or")
        assert response.json()["error"]["param"] == "prompt"
    image = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": [image]}]})
    refused(response, 400, "messages.0.content: expected a string, or a list of parts of type text")
    refused(client.post(COMPLETIONS, json={"prompt": "x", "stop": 3}), 400, "stop: expected a string, or a list")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": 3, "best_of": 2}, "body: not supported by this server: best_of, logprobs"),
        ({"prompt": [toy.V]}, "prompt: expected at least one token id, all in 0..256"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(client: httpx.Client, change: dict[str, Any], message: str):
    response = client.post(COMPLETIONS, json={"prompt": "x", **change})
    assert response.json()["error"]["message"] == message


def test_infinite_numbers_are_refused(client: httpx.Client):
    for number in ("NaN", "Infinity"):
        content = f'{{"prompt": "x", "temperature": {number}}}'.encode()
        refused(client.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"}), 400)


def test_bad_chats_are_refused(client: httpx.Client):
    body = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}
    refused(client.post(CHAT, json=body), 400, "max_completion_tokens")
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], "hello"):
        refused(client.post(CHAT, json={"messages": messages}), 400, "messages")
    refused(client.post(CHAT, json={"messages": [{"role": "tool", "content": "x"}]}), 400, "unknown role tool")


def test_what_a_template_would_skip_is_refused(client: httpx.Client):
    user = {"role": "user", "content": "x"}
    for role in ("usr", "function", "\ud800"):
        content = json.dumps({"messages": [user | {"role": role}]})
        headers = {"Content-Type": "application/json"}
        refused(client.post(CHAT, content=content, headers=headers), 400, "messages.0.role: Input should be ")
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function"}]}
    refused(client.post(CHAT, json={"messages": [user, call]}), 400, "not supported by this server: tool_calls")
    said = {"role": "assistant", "content": "y", "tool_calls": None, "function_call": None, "refusal": None}
    assert client.post(CHAT, json={"messages": [user, said, user], "max_tokens": 1}).status_code == 200


def test_a_developer_is_the_system(client: httpx.Client, text: Text):
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    answer = client.post(CHAT, json={"messages": messages, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(text.encode("system: x\nuser: y\nassistant: "))


@pytest.mark.parametrize("wrong", [{}, [{}] * 1000])
@pytest.mark.parametrize("kind", [ChatRequest, *(get_args(kind)[0] for kind in (Prompt, Content, Stop))])
def test_a_list_that_is_all_wrong_is_a_few_errors(kind: Any, wrong: Any):
    """Not some for each element, which would hold up all clients; `expecting` makes one of those for each type."""
    body = [wrong] * 1000
    with pytest.raises(ValidationError) as error:
        TypeAdapter(kind).validate_python({"messages": body} if kind is ChatRequest else body, strict=True)
    assert error.value.error_count() < 10


def test_prompts_beyond_the_capacity_are_refused(client: httpx.Client):
    response = client.post(COMPLETIONS, json={"prompt": "x" * toy.MAX_POSITIONS, "max_tokens": 1})
    refused(response, 400, "4096 tokens of the prompt and 1 of the answer do not fit into this engine's 4096")
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    response = client.post(COMPLETIONS, json={"prompt": "x" * (toy.MAX_POSITIONS - 1), "max_tokens": 2})
    refused(response, 400, "4095 tokens of the prompt and 2 of the answer do not fit")
    assert response.json()["error"]["param"] == "max_tokens"
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * toy.MAX_POSITIONS}]})
    refused(response, 400, " tokens of the prompt do not fit into this engine's 4096")
    complete(client, "x" * (toy.MAX_POSITIONS - 2), 2)


def test_unknown_models_paths_and_methods(client: httpx.Client):
    refused(client.post(COMPLETIONS, json={"prompt": "x", "model": "gpt"}), 404, "'gpt' is not served here")
    response = client.get("/v1/models/gpt")
    refused(response, 404, "'gpt' is not served here")
    assert response.json()["error"]["code"] == "model_not_found"
    refused(client.post(COMPLETIONS, json={"prompt": "x", "model": ""}), 404, "'' is not served here")
    refused(client.get("/v1/nothing"), 404)
    response = client.get(COMPLETIONS)
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    complete(client, "x", 1, model="toy", user="fields that change nothing are ignored", logprobs=None, tools=[])
    defaults = {"repetition_penalty": 1.0, "min_p": 0.0, "ignore_eos": False, "best_of": 1, "n": 1}
    complete(client, "x", 1, response_format={"type": "text"}, top_k=-1, tool_choice="auto", **defaults)


def test_a_body_beyond_the_limit_is_refused(client: httpx.Client):
    refused(client.post(COMPLETIONS, json={"prompt": "x" * 200_000}), 413, "exceeds 100,000 bytes")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 10_000

    headers = {"Content-Type": "application/json"}
    refused(client.post(COMPLETIONS, content=chunks(), headers=headers), 413, "exceeds 100,000 bytes")


def test_more_prompts_than_the_server_ever_takes_are_refused_for_good(runners: dict[str, Runner]):
    with serving(runners["sparse"], slots=1, queue=1) as client:
        refused(client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 400, "at most 2 prompts in one request")
        assert len(complete(client, ["a", "b"], 1)["choices"]) == 2


def test_a_body_that_is_not_said_to_be_json_is_told_so(client: httpx.Client):
    refused(client.post(CHAT, content=b'{"messages": []}'), 400, "sent as Content-Type: application/json")
    headers = {"Content-Type": "application/json; charset=utf-8"}
    refused(client.post(CHAT, content=b'{"messages": []}', headers=headers), 400, "messages: List should have at least")


def test_requests_beyond_the_queue_get_429_and_the_others_their_answers(runners: dict[str, Runner]):
    with serving(runners["sparse"], slots=1, queue=1) as client, ThreadPoolExecutor(6) as pool:
        body = {"prompt": "abc", "max_tokens": 300, "temperature": 0}
        responses = list(pool.map(lambda _: client.post(COMPLETIONS, json=body), range(6)))
        statuses = sorted(response.status_code for response in responses)
        assert statuses.count(200) >= 2 and statuses.count(429) >= 1 and set(statuses) == {200, 429}
        refused(next(r for r in responses if r.status_code == 429), 429, "try again later", kind="rate_limit_error")
        assert len({r.json()["choices"][0]["text"] for r in responses if r.status_code == 200}) == 1
        wait_until(lambda: idle(client))


def test_one_request_beyond_the_queue_is_too_many(runners: dict[str, Runner], endless: Text, slow: None):
    with scheduling(runners["sparse"], endless, slots=1, queue=2) as scheduler:
        for _ in range(3):
            begin(scheduler, endless, [1], 4000)
        with pytest.raises(Busy):
            begin(scheduler, endless, [1], 4000)


# Trouble


def test_a_stop_ends_those_who_wait_and_nobody_comes_after_it(runners: dict[str, Runner], endless: Text, slow: None):
    """Whoever is told of the stop and tries again at once is told the same."""
    told: list[Event] = []
    scheduler = Scheduler(runners["sparse"], slots=1, queue=8)

    def listener(event: Event) -> None:
        if event.error:
            told.append(event)
            with pytest.raises(Stopped):
                begin(scheduler, endless, [1], 2)

    scheduler.start()
    for _ in range(3):
        scheduler.submit(Request([1], Answer(endless, 4000), Sampler(Sampling()), listener))
    wait_until(lambda: scheduler.running)
    scheduler.stop(20)
    assert [type(event.error) for event in told] == [Stopped] * 3


@pytest.mark.parametrize("failure", [UserError, MemoryError])
def test_when_memory_runs_out_one_request_ends_and_the_others_go_on(
    runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
):
    runner = runners["sparse"]
    original = type(runner).allocate

    def allocate(self: Runner, batch: int, capacity: int) -> Any:
        if capacity > SMALLEST_CAPACITY:
            raise failure("no memory for the caches")
        return original(self, batch, capacity)

    monkeypatch.setattr(type(runner), "allocate", allocate)
    with serving(runner) as client, ThreadPoolExecutor(2) as pool:
        expected = alone(runner, prompt_of(20, 0), 50)
        short = pool.submit(complete, client, prompt_of(20, 0), 50)
        response = client.post(COMPLETIONS, json={"prompt": prompt_of(SMALLEST_CAPACITY + 1, 1), "max_tokens": 1})
        refused(response, 503, "no memory for the caches", kind="server_error")
        body = {"prompt": prompt_of(SMALLEST_CAPACITY - 3, 2), "max_tokens": 50, "stream": True, "temperature": 0}
        with client.stream("POST", COMPLETIONS, json=body) as growing:  # it fits, until it grows
            lines = [line for line in growing.iter_lines() if line]
        assert "no memory for the caches" in lines[-1] or lines[-1] == "data: [DONE]"
        assert short.result()["choices"][0]["text"] == expected
        wait_until(lambda: idle(client))


def test_memory_that_runs_out_without_a_word_is_named(runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch):
    def allocate(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(OrtRunner, "allocate", allocate)
    with serving(runners["sparse"]) as client:
        refused(client.post(COMPLETIONS, json={"prompt": "x"}), 503, "out of memory", kind="server_error")


def test_a_failing_call_ends_the_longest_request_of_its_batch(
    runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch
):
    runner = runners["sparse"]
    expected = alone(runner, prompt_of(5, 0), 40)
    original = type(runner).run

    def run(self: Runner, caches: Any, input_ids: np.ndarray, past: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if input_ids.shape[1] == 1 and past.max() > 600:
            raise UserError("ONNX Runtime failed: no memory")
        return original(self, caches, input_ids, past, lengths)

    monkeypatch.setattr(type(runner), "run", run)
    with serving(runner) as client, ThreadPoolExecutor(2) as pool:
        short = pool.submit(complete, client, prompt_of(5, 0), 40)
        body = {"prompt": prompt_of(601, 1), "max_tokens": 100, "temperature": 0, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as failing:
            lines = [line for line in failing.iter_lines() if line]
        assert "ONNX Runtime failed: no memory" in lines[-1]
        assert short.result()["choices"][0]["text"] == expected
        assert complete(client, prompt_of(5, 0), 40)["choices"][0]["text"] == expected


def test_an_error_of_ours_ends_all_requests_and_shows_in_health(
    runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch
):
    runner = runners["sparse"]
    monkeypatch.setattr(type(runner), "run", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the traceback that it prints
    with serving(runner) as client:
        refused(client.post(COMPLETIONS, json={"prompt": "x"}), 503, kind="server_error")
        assert client.get("/health").status_code == 503
        refused(client.post(COMPLETIONS, json={"prompt": "x"}), 503, "the server failed", kind="server_error")


@pytest.mark.parametrize("culprit", ["sampler", "push"])
def test_an_error_of_one_request_ends_no_other(
    runners: dict[str, Runner], endless: Text, culprit: str, monkeypatch: pytest.MonkeyPatch, caplog
):
    runner = runners["sparse"]
    expected = greedy(runner, prompt_of(5, 0), 40)
    events: list[Event] = []
    bad = Request([1, 2, 3], Answer(endless, 9), Sampler(Sampling()), events.append)
    monkeypatch.setattr(bad if culprit == "sampler" else bad.answer, culprit, lambda _: 1 / 0)
    with scheduling(runner, endless) as scheduler:
        good, ended = begin(scheduler, endless, prompt_of(5, 0), 40)
        scheduler.submit(bad)
        assert ended.wait(30)
        wait_until(lambda: events)
        assert scheduler.alive
    assert good.answer.tokens == expected
    assert isinstance(events[-1].error, ZeroDivisionError) and "ZeroDivisionError" in caplog.text


def test_memory_that_runs_out_behind_a_call_ends_its_request(runners: dict[str, Runner], endless: Text, monkeypatch):
    """Its token is lost: the call cannot be made again, whatever memory could be given back."""
    events: list[Event] = []
    bad = Request([1, 2, 3], Answer(endless, 9), Sampler(Sampling()), events.append)

    def sampler(_: np.ndarray) -> int:
        raise MemoryError

    monkeypatch.setattr(bad, "sampler", sampler)
    with scheduling(runners["sparse"], endless) as scheduler:
        ask(scheduler, endless, prompt_of(30, 0), 2)
        scheduler.submit(bad)
        wait_until(lambda: events, seconds=5)
    assert isinstance(events[0].error, MemoryError)


def test_an_error_of_ours_is_no_invitation_to_try_again(runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sampler, "__call__", lambda *_: 1 / 0)
    with serving(runners["sparse"]) as client:
        response = client.post(COMPLETIONS, json={"prompt": "x"})
        refused(response, 500, "this request failed: see the server's log", kind="server_error")


def test_batches_of_all_capacities_take_what_the_command_says(
    runners: dict[str, Runner], endless: Text, monkeypatch: pytest.MonkeyPatch
):
    runner, sizes = runners["sparse"], []
    original = type(runner).allocate

    def allocate(self: Runner, batch: int, capacity: int) -> Any:
        sizes.append(batch * capacity)
        return original(self, batch, capacity)

    monkeypatch.setattr(type(runner), "allocate", allocate)
    scheduler = Scheduler(runner, slots=2, queue=0)
    with begun_together(scheduler, endless, [[1], prompt_of(SMALLEST_CAPACITY + 1, 0)], 3):
        pass
    assert sum(sizes) == scheduler.most_cache_slots > 2 * toy.MAX_POSITIONS


def test_the_caches_of_a_long_request_go_when_shorter_ones_follow(runners: dict[str, Runner], endless: Text):
    with scheduling(runners["sparse"], endless) as scheduler:
        for prompt in (prompt_of(SMALLEST_CAPACITY + 1, 0), [1]):
            ask(scheduler, endless, prompt, 2)
        wait_until(lambda: list(scheduler._batches) == [SMALLEST_CAPACITY], seconds=5)


def test_200_clients_that_leave_cost_neither_rows_nor_memory(runners: dict[str, Runner]):
    with serving(runners["sparse"], slots=3, queue=8, endless=True) as client:

        def leave(number: int) -> None:
            body = {"prompt": prompt_of(40, number), "max_tokens": 3000, "temperature": 0, "stream": number % 4 != 0}
            if not body["stream"]:  # leaves before there is an answer
                with pytest.raises(httpx.ReadTimeout):
                    client.post(COMPLETIONS, json=body, timeout=0.02)
                return
            with client.stream("POST", COMPLETIONS, json=body) as response:
                assert response.status_code == 200
                next(response.iter_lines())

        for number in range(40):
            leave(number)
        wait_until(lambda: idle(client))
        before = resident_bytes()
        for number in range(200):
            leave(number)
        wait_until(lambda: idle(client))
        assert resident_bytes() - before < 8 * 2**20
        assert threading.active_count() < 100
        assert complete(client, prompt_of(30, 0), 3)["choices"][0]["text"] == alone(
            runners["sparse"], prompt_of(30, 0), 3
        )


def test_a_client_that_leaves_gives_up_the_places_of_all_its_prompts(runners: dict[str, Runner], slow: None):
    with serving(runners["sparse"], slots=2, endless=True) as client:
        body = {"prompt": ["a", "b"], "max_tokens": 4000, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: idle(client), seconds=5)


def test_a_waiting_client_that_leaves_gives_up_its_place(runners: dict[str, Runner], slow: None):
    with serving(runners["sparse"], slots=1, queue=1, endless=True) as client:
        body = {"prompt": "abc", "max_tokens": 4000, "stream": True, "temperature": 0}
        with client.stream("POST", COMPLETIONS, json=body) as running:
            lines = running.iter_lines()  # kept: httpx closes the connection of an iterator that is dropped
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETIONS, json={"prompt": "x"}, timeout=0.1)
            wait_until(lambda: client.get("/health").json()["waiting"] == 0, seconds=5)  # the other runs for 40
        wait_until(lambda: idle(client))


# The command


@contextmanager
def command(engine: Path, program: Sequence[str] = ("-m", "engines.serve")) -> Iterator[tuple[Process, str]]:
    """The server in a process of its own, on a free port."""
    process = subprocess.Popen(
        [sys.executable, *program, "--engine", str(engine), "--port", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout
        match = re.search(r"at (http://127.0.0.1:\d+)/v1", process.stdout.readline())
        assert match, process.communicate()
        yield process, match[1]
    finally:
        process.kill()
        process.communicate()


def test_a_stop_lets_running_requests_finish(engines: Path):
    body = {"prompt": "abc", "max_tokens": 60, "temperature": 0, "stream": True}
    with command(engines / "ort/sparse", SLOWLY) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: reachable(client))
        with client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        output, error = process.communicate(timeout=30)
        assert (process.returncode, error) == (0, "")
        assert "Stopped" in output


def test_what_runs_on_after_the_grace_ends_with_an_error(runners: dict[str, Runner], slow: None, capsys):
    body = {"prompt": "abc", "max_tokens": 4000, "temperature": 0, "stream": True}
    with ThreadPoolExecutor(2) as pool, serving(runners["dense"], endless=True, grace=1) as client:
        whole = pool.submit(client.post, COMPLETIONS, json={**body, "stream": False})
        response = client.send(client.build_request("POST", COMPLETIONS, json=body), stream=True)
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: client.get("/health").json()["running"] == 2)
        rest = pool.submit(list, lines)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    assert "the server is shutting down" in [line for line in rest.result() if line][-1]
    refused(whole.result(), 503, "the server is shutting down", kind="server_error")
    assert capsys.readouterr().err == ""


def test_a_second_interrupt_ends_the_grace(engines: Path, tmp_path: Path):
    endless = copy_tree(engines / "ort/sparse", tmp_path / "endless")
    manifest = json.loads((endless / MANIFEST).read_text())
    manifest["model"]["eos_token_id"] = []
    (endless / MANIFEST).write_text(json.dumps(manifest))
    body = {"prompt": "abc", "max_tokens": 4000, "temperature": 0, "stream": True}
    with command(endless, SLOWLY) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: reachable(client))
        with client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert "the server is shutting down" in [line for line in lines if line][-1]
        output, error = process.communicate(timeout=10)
        assert (process.returncode, error) == (0, "")
        assert "Stopping; running requests, 1, have 30 s to end; Ctrl-C again ends them now" in output
        assert "Stopped" in output


def reachable(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_an_address_that_is_taken_is_one_line(engines: Path, capsys: pytest.CaptureFixture[str]):
    with serve.listen("127.0.0.1", 0) as taken:
        options = ["--engine", str(engines / "ort/sparse"), "--port", str(taken.getsockname()[1])]
        code, _, error = run_command(serve.main, options, capsys)
        assert code == 1 and "cannot listen on 127.0.0.1:" in one_line(error)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64, ""])
def test_what_is_no_host_is_one_line(host: str):
    with pytest.raises(UserError, match=f"cannot listen on {host}:8000: "):
        serve.listen(host, 8000)


@pytest.mark.parametrize(
    "options", [["--queue", "-1"], ["--grace", "-1"], ["--prefix-cache", "-1"], ["--slots", "0"], ["--port", "-1"]]
)
def test_wrong_arguments_exit_with_2(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command(serve.main, options, capsys)[0] == 2


def test_more_requests_than_the_engine_has_rows_are_refused(engines: Path, capsys: pytest.CaptureFixture[str]):
    rows = open_engine(engines / "ort/sparse").limits.max_batch
    options = ["--engine", str(engines / "ort/sparse"), "--port", "0", "--slots", str(rows + 1)]
    code, _, error = run_command(serve.main, options, capsys)
    assert code == 1 and f"was built for {rows} rows (engines.build --max-batch)" in one_line(error)


def test_every_option_reaches_the_server(engines: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    seen: dict[str, Any] = {}

    def opened(folder: Path, *, threads: int | None) -> Runner:
        seen["threads"] = threads
        return open_runner(folder, threads=threads)

    def server(app: object, scheduler: Scheduler, grace: int) -> SimpleNamespace:
        seen.update(grace=grace)
        return SimpleNamespace(run=lambda sockets: None)

    monkeypatch.setattr(serve, "open_runner", opened)
    monkeypatch.setattr("engines.app.create_app", lambda scheduler, _, **options: seen.update(options, its=scheduler))
    monkeypatch.setattr("engines.app.Server", server)
    options = "--port 0 --threads 1 --slots 2 --queue 3 --prefix-cache 50 --grace 4 --model-name m --max-body-bytes 999"
    assert run_command(serve.main, ["--engine", str(engines / "ort/sparse"), *options.split()], capsys)[0] == 0
    scheduler = seen.pop("its")
    assert (scheduler.slots, scheduler.queue, scheduler.prefixes.limit) == (2, 3, 50)
    assert seen == {"threads": 1, "grace": 4, "model": "m", "max_body": 999}


def test_without_the_web_framework_the_command_says_what_to_install(engines: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "engines.app")
    code, _, error = run_command(serve.main, ["--engine", str(engines / "ort/sparse")], capsys)
    assert code == 1 and "pip install 'dsa-toolchain[serve]'" in one_line(error)
