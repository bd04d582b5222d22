"""Documents to training windows: chat template → tokens and labels → windows of one length.

Sources are read as a stream and only as far as needed (`train/documents.py`); the tokens are cached, and a stopped run
goes on tokenizing where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_export.cli import UserError, console, progress_bar
from dsa_export.model.checkpoint import check_vocabulary
from train.checkpoint import load_state, save_state
from train.documents import HELD_OUT_SHARE, PIECE, Document, Malformed, documents, stdlib_records, visible_files

Batch = dict[str, Tensor]

IGNORED = -100
"""Label of a token that does not count in the cross-entropy (prompt, padding)."""

MAX_ROWS = 20_000
"""Documents to train on, at most, unless told otherwise."""

POOL = 4
"""Windows are drawn at random from this many times what is needed, so that a few long documents do not fill a run."""

HELD_OUT_DOCUMENTS = 8
"""Held-out windows come from so many documents at least, where there are as many: one file is no sample of texts."""

SNAPSHOT_SECONDS = 30
"""Tokens that a killed run loses at most."""


# ---------------------------------------------------------------- tokens


def encode(document: Document, tokenizer: Any, *, train_on_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Token ids and labels of a document: prompt through the chat template, labelled -100; answer; eos.

    Prompt and answer are tokenized apart, so the answer begins where generation would begin. Raises UserError if the
    template refuses the prompt.
    """
    prompt: list[int] = []
    if document.messages:
        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # no system message, roles that must alternate; a template is a program
            roles = ", ".join(role for role, _ in document.messages)
            raise UserError(f"the model's chat template refuses a document with the roles {roles}: {error}") from None
        prompt = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    answer = tokenizer(document.answer, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return ids, ids[:] if train_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer cannot be used to train a model of this vocabulary."""
    check_vocabulary(tokenizer, vocab_size)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token: the answers could not be ended")
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: use that of an instruct checkpoint of the same family")


# ---------------------------------------------------------------- windows


def label_count(batch: Batch) -> int:
    """Tokens of a batch that are predicted: its labels as the model shifts them."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


@dataclass(frozen=True)
class Windows:
    """N windows of T tokens, padded on the right where a document was shorter.

    input_ids [N, T] int32, labels [N, T] int32 (-100: not counted), lengths [N] int64 (valid tokens).
    """

    input_ids: Tensor
    labels: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def cut(self, lengths: Sequence[int]) -> list[Windows]:
        """An equal part for each length, cut to windows of that length; what holds no label to learn from is left out.

        With several lengths: needs windows without padding, of a multiple of each length, and one for each at least.
        """
        if len(lengths) == 1:
            return [self]
        parts = []
        for i, length in enumerate(lengths):
            part = slice(len(self) * i // len(lengths), len(self) * (i + 1) // len(lengths))
            ids, labels = self.input_ids[part].view(-1, length), self.labels[part].view(-1, length)
            kept = (labels[:, 1:] != IGNORED).any(1)
            parts.append(Windows(ids[kept], labels[kept], torch.full((int(kept.sum()),), length)))
        return parts

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> Batch:
        """input_ids, attention_mask, labels [B, longest row] int64, on `device`."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        batch = {
            "input_ids": self.input_ids[rows, :longest].long(),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": self.labels[rows, :longest].long(),
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels, self.lengths):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """Windows to train on, windows of other documents to evaluate on, and facts for the manifest."""

    train: Windows
    held_out: Windows
    facts: dict[str, Any]


def load_data(
    source: str,
    tokenizer: Any,
    length: int,
    *,
    train_windows: int,
    held_out_windows: int,
    min_tokens: int = 0,
    max_rows: int = MAX_ROWS,
    packing: str = "pack",
    seed: int = 0,
    allow_malformed: bool = False,
    train_on_prompt: bool = False,
    scored: int | None = None,
    cache: Path | None = None,
) -> TrainingData:
    """Reads as much of the source as the run needs.

    Args:
        length: T, tokens per window.
        train_windows, held_out_windows: how many windows the run uses; fewer come back if the source has fewer. Packed
            held-out windows take only the middle of a long document, an eighth of all windows at most.
        min_tokens: shorter documents are left out.
        max_rows: training documents at most.
        packing: "pack": documents end to end, cut every T tokens, the rest of the last window dropped;
            "cut": one window per document, its first T tokens, padded if shorter.
        train_on_prompt: label the prompt too (training from scratch).
        scored: only the last so many tokens of a window will count; windows without a label among them are left out.
        cache: folder of the tokens of earlier runs with the same source (files of the same path, size and time),
            tokenizer and options; any seed. None: neither read nor write them.

    Raises UserError: nothing to read, too many malformed lines, nothing left after filtering, too little text.
    """
    wanted = {"train": POOL * train_windows, "held-out": POOL * held_out_windows}
    most = -(-held_out_windows // HELD_OUT_DOCUMENTS) * length  # tokens of one held-out document
    builders = {split: _WindowBuilder(length, packing, scored) for split in wanted}
    reader = _Reader(wanted, max_rows, builders, Malformed(allow_malformed))
    options = [length, wanted, most, min_tokens, max_rows, packing, allow_malformed, train_on_prompt, scored]
    name = f"tokens-{_fingerprint(source, tokenizer, options, cache)}.pt" if cache else ""
    known = _load_tokens(cache, name) if cache else None
    if known:
        reader.restore(known)
    if known and known["done"]:
        console.print(f"{source}: {reader.read} documents, tokenized before ({cache}/{name})")
    else:
        saved = time.monotonic()
        with progress_bar() as progress:
            task = progress.add_task("read data", total=sum(wanted.values()))
            for split, document in reader.unread(source, cache):
                ids, labels = encode(document, tokenizer, train_on_prompt=train_on_prompt)
                if len(ids) < min_tokens:
                    reader.short += 1
                    continue
                if split == "held-out" and packing == "pack":
                    part = _middle(labels, most)
                    ids, labels = ids[part], labels[part]
                reader.add(split, ids, labels)
                progress.update(task, completed=reader.filled())
                if cache and time.monotonic() - saved > SNAPSHOT_SECONDS:
                    _save_tokens(cache, name, reader.state(done=False))
                    saved = time.monotonic()
        reader.malformed.check()
        if cache:
            _save_tokens(cache, name, reader.state(done=True))
    for split, builder in builders.items():
        if len(builder) == 0 and wanted[split]:
            raise UserError(_nothing_left(split, source, reader, min_tokens))
    train = builders["train"].windows(train_windows, seed)
    held_out = builders["held-out"].windows(held_out_windows, seed)
    if len(held_out) < held_out_windows:
        console.print(f"{source} fills {len(held_out)} held-out windows of {length} tokens, not {held_out_windows}")
    facts = {
        "path": source,
        "sha256": train.sha256(),
        "held_out_sha256": held_out.sha256(),
        "documents_read": reader.read,
        "documents_short": reader.short,
        "documents_trained": reader.rows["train"],
        "documents_held_out": reader.rows["held-out"],
        "windows": len(train),
        "windows_held_out": len(held_out),
        "malformed": reader.malformed.summary() if reader.malformed.count else None,
    }
    return TrainingData(train, held_out, facts)


def _middle(labels: list[int], most: int) -> slice:
    """`most` tokens in the middle of a longer document, or around its middle label if there is none among those."""
    start = max(len(labels) - most, 0) // 2
    if all(label == IGNORED for label in labels[start : start + most]):
        counted = [i for i, label in enumerate(labels) if label != IGNORED] or [0]
        start = min(max(counted[len(counted) // 2] - most // 2, 0), max(len(labels) - most, 0))
    return slice(start, start + most)


def _fingerprint(source: str, tokenizer: Any, options: list[Any], cache: Path | None) -> str:
    """What the tokens hang on. Large files are not read for it: their path, size and time of change stand for them."""
    address: Any = source
    if "://" not in source:
        path = stdlib_records(cache) if source == "stdlib" else Path(source)
        files = visible_files(path) if path.is_dir() else [path]
        address = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    words = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([address, words, options]).encode()).hexdigest()[:16]


def _load_tokens(cache: Path, name: str) -> dict[str, Any] | None:
    """What an earlier run tokenized; a file that cannot be read is made anew."""
    try:
        return load_state(cache, name)
    except (UserError, OSError):
        console.print(f"{cache / name} cannot be read: tokenizing again")
        return None


def _save_tokens(cache: Path, name: str, state: dict[str, Any]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    save_state(cache, state, name, shared=True)


def _nothing_left(split: str, source: str, reader: _Reader, min_tokens: int) -> str:
    read, rows, builder = reader.read, reader.rows[split], reader.builders[split]
    if read == 0:
        return f"{source} holds no documents"
    if rows == 0 and reader.short:
        return f"no {split} document of {source} has {min_tokens} tokens ({read} read): lower --min-tokens"
    if rows == 0:
        return (
            f"none of the {read} documents of {source} falls into the {split} split (one in {HELD_OUT_SHARE} is held "
            f"out, by its hash; a file of text is cut into documents of {PIECE} characters): more text is needed"
        )
    if builder.packing == "cut":
        return (
            f"in no {split} document of {source} do the first {builder.length} tokens hold any that is learned: raise "
            "--length, or leave out --packing cut"
        )
    return (
        f"the {split} text of {source} is shorter than one window ({builder.tokens} tokens with labels, --length "
        f"{builder.length}): lower --length, or give more text"
    )


@dataclass
class _Reader:
    """How far a source was read, and what was made of it, by split."""

    wanted: dict[str, int]
    """Windows of each split."""
    max_rows: int
    builders: dict[str, _WindowBuilder]
    malformed: Malformed
    rows: dict[str, int] = field(default_factory=lambda: {"train": 0, "held-out": 0})
    read: int = 0
    short: int = 0

    def unread(self, source: str, cache: Path | None) -> Iterator[tuple[str, Document]]:
        """The documents behind those that were read before, each with its split, until both are full."""
        before, self.read = self.read, 0
        for document in documents(source, self.malformed, cache):
            self.read += 1
            if self.read <= before:
                continue
            if all(self.full(split) for split in self.wanted):
                return
            split = "held-out" if document.is_held_out() else "train"
            if not self.full(split):
                yield split, document

    def add(self, split: str, ids: list[int], labels: list[int]) -> None:
        self.rows[split] += 1
        self.builders[split].add(ids, labels)

    def full(self, split: str) -> bool:
        enough = len(self.builders[split]) >= self.wanted[split]
        return enough or (split == "train" and self.rows[split] >= self.max_rows)

    def filled(self) -> int:
        """Windows, of those that are wanted."""
        return sum(min(len(self.builders[split]), wanted) for split, wanted in self.wanted.items())

    def state(self, *, done: bool) -> dict[str, Any]:
        """All of it, as torch.save keeps it."""
        bad = {"lines": self.malformed.lines, "count": self.malformed.count, "first": self.malformed.first}
        tokens = {split: builder.state() for split, builder in self.builders.items()}
        counts = {"read": self.read, "rows": self.rows, "short": self.short}
        return {"done": done, **counts, "malformed": bad, "builders": tokens}

    def restore(self, state: dict[str, Any]) -> None:
        self.read, self.rows, self.short = state["read"], state["rows"], state["short"]
        for split, builder in self.builders.items():
            builder.restore(state["builders"][split])
        if state["done"]:  # else the lines are read, and counted, again
            self.malformed = Malformed(self.malformed.allowed, **state["malformed"])


class _WindowBuilder:
    """Cuts or packs token lists into windows of one length; windows without any label that counts are dropped."""

    def __init__(self, length: int, packing: str, scored: int | None = None):
        self.length = length
        self.packing = packing
        self.counted = slice(1, None) if scored is None else slice(1 - scored, None)  # the first is never predicted
        self.tokens = 0
        self.pending: tuple[list[int], list[int]] = ([], [])
        self.rows: list[tuple[Tensor, Tensor, int]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.tokens += len(ids)
        if self.packing == "cut":
            self._emit(ids[: self.length], labels[: self.length])
            return
        ids, labels = self.pending[0] + ids, self.pending[1] + labels
        whole = len(ids) // self.length * self.length
        for start in range(0, whole, self.length):
            self._emit(ids[start : start + self.length], labels[start : start + self.length])
        self.pending = (ids[whole:], labels[whole:])

    def _emit(self, ids: list[int], labels: list[int]) -> None:
        if all(label == IGNORED for label in labels[self.counted]):
            return
        padding = self.length - len(ids)
        id_row = torch.tensor(ids + [0] * padding, dtype=torch.int32)
        label_row = torch.tensor(labels + [IGNORED] * padding, dtype=torch.int32)
        self.rows.append((id_row, label_row, len(ids)))

    def state(self) -> dict[str, Any]:
        """All of it, as torch.save keeps it."""
        ids, labels, lengths = zip(*self.rows, strict=True) if self.rows else ([], [], [])
        packed = [torch.stack(list(part)) if part else torch.zeros(0, self.length) for part in (ids, labels)]
        return {"tokens": self.tokens, "pending": self.pending, "rows": [*packed, list(lengths)]}

    def restore(self, state: dict[str, Any]) -> None:
        self.tokens, self.pending = state["tokens"], state["pending"]
        self.rows = list(zip(*state["rows"], strict=True))

    def windows(self, count: int, seed: int) -> Windows:
        """`count` of the windows (or all, if fewer), drawn and ordered by the seed."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        drawn = [self.rows[i] for i in order]
        if not drawn:
            empty = torch.zeros(0, self.length, dtype=torch.int32)
            return Windows(empty, empty, torch.zeros(0, dtype=torch.int64))
        ids, labels, lengths = zip(*drawn, strict=True)
        return Windows(torch.stack(ids), torch.stack(labels), torch.tensor(lengths))
