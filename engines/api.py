"""OpenAI's HTTP API as far as this server speaks it: requests, which are validated strictly, and answers.

Fields that this server does not know are ignored, as clients expect, except those that would change the answer.
Reference: https://platform.openai.com/docs/api-reference (completions, chat, errors, streaming).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# What this server cannot do, with the value that asks for nothing; clients send these defaults, and null.
UNSUPPORTED: dict[str, Any] = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "function_call": "none", "functions": [], "ignore_eos": False,
    "logit_bias": {}, "logprobs": False, "min_p": 0, "presence_penalty": 0, "repetition_penalty": 1,
    "response_format": {"type": "text"}, "suffix": "", "tools": [], "top_k": 0, "top_logprobs": 0,
}  # fmt: skip
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat may fill the context


def expecting(what: str) -> WrapValidator:
    """One message for a field of several types, where pydantic has one for each type that a value is not."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("unexpected", "expected {what}", {"what": what}) from None

    return WrapValidator(validate)


Tokens = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=4)],
    expecting("a string, or a list of at most 4 strings, none of them empty"),
]
Prompt = Annotated[
    str | Annotated[list[str] | Tokens | list[Tokens], Field(min_length=1)],
    expecting("a string, a list of token ids, or a list of several of these, and none of the lists empty"),
]


class ApiError(Exception):
    """An answer with an HTTP status other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, param, code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of request share; null means the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Stop | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> GenerationRequest:
        given = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        used = sorted(name for name in given.keys() & UNSUPPORTED.keys() if given[name] != UNSUPPORTED[name])
        if used:
            raise ValueError(f"not supported by this server: {', '.join(used)}")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    prompt: Prompt

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart], expecting("a string, or a list of parts of type text: the model reads no other")
]


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: Content

    def as_template_input(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Usage:
    """cached_tokens: those of the prompt that an earlier request had computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Reply:
    """Shapes of the answers to one request; the same id and time in all parts of a stream."""

    kind: Literal["text_completion", "chat.completion"]
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: list[str], finish_reasons: list[str | None], usage: Usage) -> dict[str, Any]:
        choices = [
            self._choice(i, {"message": {"role": "assistant", "content": text}}, text, reason)
            for i, (text, reason) in enumerate(zip(texts, finish_reasons, strict=True))
        ]
        return {**self._head(self.kind), "choices": choices, "usage": usage.as_json()}

    def part(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        content = {"content": text} if text else {}
        return {**self._chunk_head(), "choices": [self._choice(index, {"delta": role | content}, text, finish_reason)]}

    def usage_part(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [], "usage": usage.as_json()}

    def _choice(self, index: int, chat: dict[str, Any], text: str, finish_reason: str | None) -> dict[str, Any]:
        content: dict[str, Any] = chat if self.kind == "chat.completion" else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.kind == "chat.completion" else self.kind)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
