"""Between text and tokens: an engine's tokenizer and chat template, and answers as they grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tokenizers.decoders import DecodeStream

from dsa_export.cli import UserError
from engines.artifacts import Engine

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What engines.build copies from the export; a checkpoint may have no chat template."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What bytes that make no whole character are decoded to."""

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}"""


class Text:
    """The tokenizer of an engine. Encoding and decoding may run in different threads."""

    def __init__(self, engine: Engine):
        from transformers import PreTrainedTokenizerFast  # a second, which a build does not need

        self.folder = engine.folder
        self.end_tokens = frozenset(engine.model.eos_token_id)
        tokenizer_files(engine.folder)
        # AutoTokenizer imports torch: two seconds and 300 MB that an engine of ONNX Runtime does not need.
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(engine.folder)
        self.backend = self._tokenizer.backend_tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, which may spell out special tokens. Raises UserError: no tokens, or not text.

        With a token that begins a text where the tokenizer has one (Llama).
        """
        begin = self._tokenizer.bos_token
        return self._encode(text, add_special_tokens=not (begin and text.startswith(begin)))

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, or bytes of another encoding
            raise UserError(f"the prompt is not valid Unicode at character {error.start}") from None
        tokens = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if not text or not tokens:
            raise UserError("the prompt is empty: nothing to continue")
        return tokens

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, up to where the assistant answers. Raises UserError: no template, or it refuses."""
        if not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer in {self.folder} has no chat template: use plain prompts (--raw)")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program
            raise UserError(f"the chat template refuses these messages: {error}") from None
        return self._encode(str(text), add_special_tokens=False)


class Answer:
    """One answer as it grows token by token: what may be shown of it, and why it ended.

    Text is held back while its last character is incomplete and while it may be the beginning of a stop string; stop
    strings and special tokens are not part of the text.

    after: tokens that the answer continues, nothing for the answer of a chat: SentencePiece's decoders drop the space
    that a text begins with.
    """

    def __init__(self, text: Text, max_new_tokens: int, stop: Sequence[str] = (), after: Sequence[int] = ()):
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._text = text
        self._max_new_tokens = max_new_tokens
        self._stop = tuple(stop)
        before = text.backend.decode(after[-1:]) if after else ""
        # Half a character would come out with its other half, as if it were the answer's.
        known = [after[-1]] if before and HALF not in before else []
        self._stream = DecodeStream(known, skip_special_tokens=True)
        self._held = ""
        self._unshown: list[int] = []  # tokens that have made no character yet

    def push(self, token: int) -> str:
        """Appends a token; returns the text that has become certain. Sets finish_reason where the answer ends."""
        self.tokens.append(token)
        if token in self._text.end_tokens:
            return self._finish("stop")
        characters = self._step(token)
        if characters:
            self._unshown = []
        elif self._text.backend.decode([token]):  # and not a special one
            self._unshown.append(token)
        self._held += characters
        if self._cut():
            return self._finish("stop")
        if len(self.tokens) >= self._max_new_tokens:
            return self._finish("length")
        certain = len(self._held) - longest_beginning(self._held, self._stop)
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._text.backend, token) or ""
        except Exception as error:  # tokenizers raises nothing narrower
            if "Invalid prefix" not in str(error):
                raise
        # Bytes that make no character changed how the text before them is decoded, and that has been shown: begin anew.
        self._stream = DecodeStream(skip_special_tokens=True)
        return self._stream.step(self._text.backend, token) or ""

    def _cut(self) -> bool:
        """Ends the text before the first stop string; whether there is one."""
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            self._held = self._held[: min(found)]
        return bool(found)

    def _finish(self, reason: Literal["stop", "length"]) -> str:
        self.finish_reason = reason
        # The stream takes U+FFFD for half a character; it is a whole one where these are its tokens.
        last = self._text.backend.decode(self._unshown)
        before, both = (self._text.backend.encode(t, add_special_tokens=False).ids for t in ("a", f"a{last}"))
        if both[len(before) :] == self._unshown:
            self._held += last
            self._cut()
        shown, self._held = self._held, ""
        return shown


def longest_beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of the stop strings begins."""
    longest = max(map(len, stop), default=1) - 1
    ends = (text[-length:] for length in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(string.startswith(end) for string in stop)), 0)


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of an export or a checkpoint. Raises UserError if tokenizer.json is missing."""
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise UserError(f"{folder / TOKENIZER_FILES[0]} is missing: run `python -m dsa_export.onnx` again")
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
