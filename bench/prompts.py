"""Real text for the comparison: a file, or the Python standard library's own sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsa_export.cli import UserError
from dsa_export.files import read_text, standard_library

ROW_OFFSET = 997
"""Rows of a batch read the same text from places this many tokens apart."""


def rows(export: Path, prompt_file: Path | None, batch: int, length: int) -> np.ndarray:
    """Tokens of real text, [batch, length] int64, by the tokenizer of the export.

    Raises UserError if there is no tokenizer, or if the file is not text or too short.
    """
    tokens = _tokens(_tokenizer(export), prompt_file, length)
    if len(tokens) < length:
        raise UserError(f"{prompt_file} has {len(tokens)} tokens, {length} are needed: choose a longer file")
    return np.stack([np.roll(tokens, -b * ROW_OFFSET)[:length] for b in range(batch)])


def _tokenizer(export: Path) -> Tokenizer:
    path = export / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: run `python -m dsa_export.onnx` again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing more specific
        raise UserError(f"{path} is not a tokenizer ({error}): run `python -m dsa_export.onnx` again") from None


def _tokens(tokenizer: Tokenizer, prompt_file: Path | None, at_least: int) -> np.ndarray:
    tokens: list[int] = []
    for text in _texts(prompt_file):
        tokens += tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) >= at_least:
            break
    return np.array(tokens, np.int64)


def _texts(prompt_file: Path | None) -> Iterator[str]:
    if prompt_file:
        yield read_text(prompt_file)
    else:
        yield from modules()


def modules() -> Iterator[str]:
    """The modules of the standard library, by name."""
    for path in standard_library("*.py"):
        yield path.read_text(encoding="utf-8", errors="replace")
