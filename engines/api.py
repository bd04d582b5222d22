"""OpenAI's HTTP API as far as this server speaks it: requests, which are validated strictly, and answers.

Fields that this server does not know are ignored, as clients expect, except those that would change the answer.
Reference: https://platform.openai.com/docs/api-reference (completions, chat, errors, streaming).
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

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

# What this server cannot do, with the values that ask for nothing; clients send these defaults, and null.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,), "allowed_token_ids": (), "bad_words": ([],), "best_of": (1,),
    "chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,), "echo": (False,),
    "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "guided_choice": (),
    "guided_grammar": (), "guided_json": (), "guided_regex": (), "ignore_eos": (False,),
    "include_stop_str_in_output": (False,), "length_penalty": (1,), "logit_bias": ({},), "logprobs": (False,),
    "min_p": (0,), "min_tokens": (0,), "modalities": (["text"],), "presence_penalty": (0,), "prompt_logprobs": (),
    "repetition_penalty": (1,), "response_format": ({"type": "text"},), "skip_special_tokens": (True,),
    "stop_token_ids": ([],), "structured_outputs": (), "suffix": ("",), "tool_calls": ([],),
    "tool_choice": ("none", "auto"), "tools": ([],), "top_k": (0, -1), "top_logprobs": (0,),
    "truncate_prompt_tokens": (), "use_beam_search": (False,),
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


FIRST_ERROR = Field(fail_fast=True)
"""Of a wrong list: an error for each element of a large body takes seconds, and some hundred times its size."""
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], FIRST_ERROR]
Texts = Annotated[list[str], FIRST_ERROR]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=4), FIRST_ERROR],
    expecting("a string, or a list of at most 4 strings, none of them empty"),
]
Prompt = Annotated[
    str | Annotated[Texts | Tokens | Annotated[list[Tokens], FIRST_ERROR], Field(min_length=1)],
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


class Checked(BaseModel):
    """An object that may have any fields, but none that would change the answer and be ignored."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> Self:
        given = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        used = sorted(name for name in given.keys() & UNSUPPORTED.keys() if asks_for_something(name, given[name]))
        if used:
            raise ValueError(f"not supported by this server: {', '.join(used)}")
        return self


def asks_for_something(name: str, value: Any) -> bool:
    """Whether a field of UNSUPPORTED has a value that would change the answer; 0 is not False."""
    return not any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in UNSUPPORTED[name]
    )


class GenerationRequest(Checked):
    """What both kinds of request share; null means the default."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: Stop | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

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
    str | Annotated[list[TextPart], FIRST_ERROR],
    expecting("a string, or a list of parts of type text: the model reads no other"),
]


class ChatMessage(Checked):
    role: Literal["system", "developer", "user", "assistant", "tool"]  # templates skip those that they do not know
    content: Content

    def as_template_input(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
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
