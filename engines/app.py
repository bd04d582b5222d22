"""The server's application: from HTTP requests to requests of the scheduler, and from its events to answers."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsa_export.cli import UserError, console
from engines.api import (
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Reply,
    Usage,
    error_body,
)
from engines.sampling import Sampler, Sampling
from engines.scheduler import Busy, Event, Scheduler, Stopped
from engines.scheduler import Request as Job
from engines.text import Answer, Text

T = TypeVar("T")
MAX_PROMPTS = 16
"""Prompts of one completion request: a list of them is answered in one go."""
STOP_SECONDS = 60.0
"""How long a stop waits for the call that is running."""
LAST_WORDS_SECONDS = 10
"""How long the open requests of a stopped scheduler have to end, each with an error, before they are cut off."""


def create_app(scheduler: Scheduler, text: Text, *, model: str, max_body: int) -> FastAPI:
    """The application; it starts the scheduler and stops it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop, STOP_SECONDS)

    app = FastAPI(title="dsa-toolchain", lifespan=lifespan)
    app.add_middleware(BodyLimit, limit=max_body)
    service = Service(scheduler, text, model)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"running": scheduler.running, "waiting": scheduler.waiting, "slots": scheduler.slots}
        alive = scheduler.alive
        return JSONResponse({"status": "ok" if alive else "stopped", **state}, 200 if alive else 503)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("Content-Type", ""):  # then the body was not read as JSON
            return JSONResponse(error_body(400, "the body must be sent as Content-Type: application/json"), 400)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if first["type"] != "json_invalid") or None
        detail = f": {first['ctx']['error']}" if first["type"] == "json_invalid" else ""
        said = first["msg"].removeprefix("Value error, ")  # pydantic's words before a validator's own
        return JSONResponse(error_body(400, f"{where or 'body'}: {said}{detail}", where), 400)

    return app


class Server(uvicorn.Server):
    """Runs an application of create_app(). A stop leaves `grace` seconds to running requests, then ends the scheduler.

    uvicorn alone would cut them off: streams without an error event, and with a traceback each. A second signal ends
    the grace.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, grace: int):
        timeout = grace + LAST_WORDS_SECONDS
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=timeout))
        logging.getLogger("uvicorn.error").addFilter(is_no_cancellation)
        self.scheduler = scheduler
        self.grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and self.scheduler.alive:
            self.scheduler.stop(0)
        else:
            if running := self.scheduler.running:
                console.print(
                    f"Stopping; running requests, {running}, have {self.grace} s to end; Ctrl-C again ends them now"
                )
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = asyncio.get_running_loop().call_later(self.grace, self.scheduler.stop, 0)
        await super().shutdown(sockets)
        grace.cancel()


def is_no_cancellation(record: logging.LogRecord) -> bool:
    """Filters what uvicorn logs of a request that it cuts off, such as one whose client has stopped reading."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class BodyLimit:
    """Ends a request with 413 as soon as a body of more than `limit` bytes is announced or has arrived.

    FastAPI's own max_body_size answers in plain text; what is raised here becomes an error of OpenAI's form.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_within_limit() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if max(size, int(Headers(scope=scope).get("content-length", 0))) > self.limit:
                raise HTTPException(413, f"the body exceeds {self.limit:,} bytes")
            return message

        await self.app(scope, receive_within_limit if scope["type"] == "http" else receive, send)


class Service:
    """From a validated request to requests of the scheduler, and from their events to HTTP."""

    def __init__(self, scheduler: Scheduler, text: Text, model: str):
        self.scheduler = scheduler
        self.text = text
        self.model = model
        self.engine = scheduler.runner.engine
        self.max_context = self.engine.limits.max_context
        self.max_prompts = min(MAX_PROMPTS, scheduler.slots + scheduler.queue)
        card = {"id": model, "object": "model", "created": 0, "owned_by": "dsa-toolchain"}
        self.card = {**card, "max_model_len": self.max_context}

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        if len(body.prompts) > self.max_prompts:
            raise ApiError(400, f"prompt: at most {self.max_prompts} prompts in one request", param="prompt")
        prompts = [await self._tokens(prompt) for prompt in body.prompts]
        limit = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        return await self._answer(body, prompts, prompts, limit, Reply("text_completion", self.model), request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        messages = [message.as_template_input() for message in body.messages]
        prompt = await in_thread(self.text.chat, messages)
        limit = body.max_completion_tokens or body.max_tokens
        return await self._answer(body, [prompt], [[]], limit, Reply("chat.completion", self.model), request)

    def check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")

    async def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await in_thread(self.text.encode, prompt)
        if not prompt or max(prompt) >= self.engine.model.vocab_size:
            size = self.engine.model.vocab_size
            raise ApiError(400, f"prompt: expected at least one token id, all in 0..{size - 1}", param="prompt")
        return prompt

    async def _answer(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        continued: list[list[int]],
        limit: int | None,
        reply: Reply,
        request: Request,
    ) -> Response:
        """continued: for each prompt the tokens whose text its answer continues."""
        if body.model is not None:
            self.check_model(body.model)
        answers = [
            Answer(self.text, self._room(prompt, limit), body.stop_strings, after)
            for prompt, after in zip(prompts, continued, strict=True)
        ]
        default = 1.0 if body.temperature is None else body.temperature
        sampling = Sampling(default, 1.0 if body.top_p is None else body.top_p, body.seed)
        arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        requests = [
            Job(prompt, answer, Sampler(sampling, row=i), listener(arrived, i))
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        events = self._events(requests, arrived)

        def usage() -> Usage:
            return Usage(
                prompt_tokens=sum(map(len, prompts)),
                completion_tokens=sum(len(answer.tokens) for answer in answers),
                cached_tokens=sum(request.cached for request in requests),
            )

        try:
            if body.stream:
                # The first event comes before the status line: what fails at once is an HTTP error.
                first = await unless_gone(request, anext(events))
                stream = server_sent_events(first, events, reply, usage if body.wants_usage else None)
                return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            texts = await unless_gone(request, whole_texts(events, len(prompts)))
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; nginx's number for this
        return JSONResponse(reply.whole(texts, [answer.finish_reason for answer in answers], usage()))

    def _room(self, prompt: Sequence[int], limit: int | None) -> int:
        """Tokens that an answer may have: `limit`, or whatever fits behind the prompt."""
        room = self.max_context - len(prompt)
        if room < (limit or 1):
            asked = f" and {limit} of the answer" if limit else ""
            raise ApiError(
                400,
                f"{len(prompt)} tokens of the prompt{asked} do not fit into this engine's {self.max_context}",
                param="max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        return limit or room

    async def _events(
        self, requests: Sequence[Job], arrived: asyncio.Queue[tuple[int, Event]]
    ) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) of all requests until the last one ends. Raises ApiError. Closing it frees their rows."""
        try:
            for request in requests:
                self._submit(request)
            running = len(requests)
            while running:
                i, event = await arrived.get()
                if event.error:
                    if not isinstance(event.error, (UserError, MemoryError, Stopped)):
                        raise ApiError(500, "this request failed: see the server's log")
                    raise ApiError(503, str(event.error) or "out of memory", code="unavailable")
                running -= event.finish_reason is not None
                yield i, event
        finally:
            for request in requests:
                request.cancel()

    def _submit(self, request: Job) -> None:
        try:
            self.scheduler.submit(request)
        except Busy as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded") from None
        except Stopped as error:
            raise ApiError(503, str(error), code="unavailable") from None


def listener(arrived: asyncio.Queue[tuple[int, Event]], choice: int) -> Callable[[Event], None]:
    """Takes a request's events from the scheduler's thread to the event loop that is running now."""
    loop = asyncio.get_running_loop()

    def listen(event: Event) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, (choice, event))

    return listen


async def in_thread(encode: Any, argument: Any) -> list[int]:
    """Tokenizes beside the event loop: a long prompt takes a while. Raises ApiError for what is not a prompt."""
    try:
        return await asyncio.to_thread(encode, argument)
    except UserError as error:
        raise ApiError(400, str(error)) from None


async def whole_texts(events: AsyncIterator[tuple[int, Event]], choices: int) -> list[str]:
    texts: list[list[str]] = [[] for _ in range(choices)]
    async for i, event in events:
        texts[i].append(event.text)
    return ["".join(parts) for parts in texts]


async def server_sent_events(
    first: tuple[int, Event], events: AsyncIterator[tuple[int, Event]], reply: Reply, usage: Any
) -> AsyncIterator[str]:
    """The data lines of a stream; an error after the first token is one of them and ends the stream."""

    def line(i: int, event: Event, *, begins: bool = False) -> str:
        return data_line(reply.part(i, event.text, event.finish_reason, first=begins))

    try:
        yield line(*first, begins=True)  # a chat, which alone tells the role, has one choice
        async for i, event in events:
            yield line(i, event)
    except ApiError as error:
        yield data_line(error.body)
        return
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    if usage:
        yield data_line(reply.usage_part(usage()))
    yield "data: [DONE]\n\n"


def data_line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class ClientGone(Exception):
    """The client closed the connection before there was an answer."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects. Raises ClientGone then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
