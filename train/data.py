"""Text to training windows: records → chat template → tokens and labels → windows of one length.

Sources (`--data`):
    stdlib                      the Python standard library's own sources, written once as JSON lines
    *.jsonl, *.json (.gz, .zst) JSON lines in the deepctrl-sft-data schema: instruction, input, output, history
    a folder                    its *.jsonl files, or else every text file in it, one document each
    any other file              one plain text document
    hf://…, https://…           JSON lines, streamed

.zst needs the package zstandard, https:// needs aiohttp; neither is installed with the toolchain.

Everything is read as a stream and only as far as needed; the tokens are cached, and a stopped run goes on tokenizing
where it was. A document is held out for evaluation if its own hash says so:
wherever it stands in the source, it is never trained on.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import Tensor

from dsa_export.cli import UserError, console, progress_bar
from dsa_export.files import write_atomically
from train.checkpoint import load_state, save_state

IGNORED = -100
"""Label of a token that does not count in the cross-entropy (prompt, padding)."""

HELD_OUT_SHARE = 20
"""One document in this many is held out."""
PIECE = 8192
"""Characters of a document that is cut out of a single text file: some 2,000 tokens."""

MAX_ROWS = 20_000
"""Documents to train on, at most, unless told otherwise."""

POOL = 4
"""Windows are drawn at random from this many times what is needed, so that a few long documents do not fill a run."""

CACHE = Path("out/data")
"""Where tokens and the standard library's records are kept, unless told otherwise."""

SNAPSHOT_SECONDS = 30
"""Tokens that a killed run loses at most."""

COMPRESSED = frozenset([".gz", ".zst", ".bz2", ".xz", ".lz4"])
TEXT_SUFFIXES = frozenset(
    [
        ".py",
        ".md",
        ".txt",
        ".rst",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".js",
        ".ts",
        ".java",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".tex",
        ".html",
        ".css",
        ".sql",
        ".yaml",
        ".toml",
    ]
)


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Document:
    """Chat messages before the answer, and the answer. Plain text has no messages."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    answer: str

    def is_held_out(self) -> bool:
        """Decided by the content alone, so that a duplicate is on the same side and no order matters."""
        digest = hashlib.blake2b(json.dumps([self.messages, self.answer]).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def parse_record(line: str) -> Document:
    """One line of deepctrl-sft-data. Raises ValueError with the reason if it is malformed."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    instruction, user_input, output = (record.get(name) or "" for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (instruction, user_input, output)):
        raise ValueError("instruction, input and output must be strings")
    if not output:
        raise ValueError("no output")
    question = "\n".join(part for part in (instruction, user_input) if part)
    if not question:
        raise ValueError("neither instruction nor input")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError("history must be a list of [user, assistant] pairs")
    messages: list[tuple[str, str]] = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError("history must be a list of [user, assistant] pairs")
        messages += [("user", turn[0]), ("assistant", turn[1])]
    messages.append(("user", question))
    for text in (*(content for _, content in messages), output):
        text.encode()  # raises for half of a surrogate pair (\ud83d), which no tokenizer takes
    return Document(tuple(messages), output)


@dataclass
class Malformed:
    """Counts the lines that could not be read, and stops the run when they are more than 1 %."""

    allowed: bool = False
    lines: int = 0
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(f"{where}: {reason}")

    def check(self) -> None:
        if self.count * 100 > self.lines and not self.allowed:
            raise UserError(
                f"{self.count} of {self.lines} lines are malformed ({'; '.join(self.first)}): "
                "mend the file, or pass --allow-malformed"
            )

    def summary(self) -> str:
        return f"{self.count} of {self.lines} lines malformed and left out ({'; '.join(self.first)})"


def check_source(source: str) -> None:
    """Raises UserError if a source is a path, and nothing is there."""
    if not source:  # an unset variable of a script: as a path it would be the current folder
        raise UserError("no such data: '' (an empty name)")
    if source != "stdlib" and "://" not in source and not Path(source).exists():
        raise UserError(f"no such data: {source}")


def documents(source: str, malformed: Malformed) -> Iterator[Document]:
    """Streams the documents of a source. Raises UserError if there is none, or too many lines are malformed."""
    check_source(source)
    if source == "stdlib":
        source = str(stdlib_records())
    if "://" in source:
        yield from _json_lines(source, source.rsplit("/", 1)[-1], malformed)
        return
    path = Path(source)
    if not path.is_dir():
        is_text = not {".jsonl", ".json"} & set(path.suffixes)
        yield from _pieces(path) if is_text else _json_lines(_address(path), path.name, malformed)
        return
    files = _visible_files(path)
    records = [f for f in files if _holds_records(f)]
    for file in records:
        yield from _json_lines(_address(file), file.name, malformed)
    if not records:
        yield from _text_files([f for f in files if f.suffix in TEXT_SUFFIXES], path)


def _visible_files(folder: Path) -> list[Path]:
    """All below a folder but what is hidden, such as the notes that a download keeps of its own files."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def _holds_records(file: Path) -> bool:
    """*.jsonl, and compressed also *.json."""
    if file.suffix in COMPRESSED:
        return Path(file.stem).suffix in (".jsonl", ".json")
    return file.suffix == ".jsonl"


def _json_lines(address: str, name: str, malformed: Malformed) -> Iterator[Document]:
    for number, line in enumerate(_stream(address, sample_by="line"), start=1):
        if not line or line.isspace():
            continue
        malformed.lines += 1
        try:
            document = parse_record(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            malformed.add(f"{name} line {number}", str(error))
        else:
            yield document
        if malformed.lines % 1000 == 0:
            malformed.check()
    malformed.check()


def _text_files(files: list[Path], folder: Path) -> Iterator[Document]:
    """One document per file of a folder. Read without `datasets`, which takes a hundred times as long to open one."""
    if not files:
        raise UserError(f"no *.jsonl and no text files in {folder}")
    # Neighbours in a source tree are alike: an order that is stable, but not alphabetical.
    for file in sorted(files, key=lambda f: hashlib.blake2b(os.fsencode(f.relative_to(folder))).digest()):
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document((), text)


def _pieces(file: Path) -> Iterator[Document]:
    """A file of text as documents of PIECE characters and what is left of a line."""
    for text in _stream(_address(file), sample_by="document"):
        start = 0
        while start < len(text):
            end = text.find("\n", start + PIECE) + 1 or len(text)
            if text[start:end].strip():
                yield Document((), text[start:end])
            start = end


def _address(file: Path) -> str:
    if glob.has_magic(str(file.resolve())):
        raise UserError(f"cannot read {file}: *, ? and [ ] in its path would be taken for a pattern; rename it")
    return str(file.resolve())


def _stream(address: str, sample_by: str) -> Iterator[str]:
    """Lines or whole files through `datasets`, which reads local, compressed and remote files alike."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # one request for each file, local ones too
    try:
        rows = datasets.load_dataset(
            "text", data_files=address, split="train", streaming=True, sample_by=sample_by, encoding_errors="replace"
        )
        for row in rows:
            yield row["text"]
    except Exception as error:  # missing, not reachable, not as compressed as its name says: each library has its own
        raise UserError(f"cannot read {address}: {(str(error).splitlines() or ['empty'])[0]}") from None


def stdlib_records(folder: Path = CACHE) -> Path:
    """Writes the standard library's modules as deepctrl-sft-data records, once, and returns the file.

    Each asks to continue a module from its first lines. Left out: tests, and tables that are no language.
    """
    path = folder / f"stdlib-{python_version()}.jsonl"
    if path.is_file():
        return path
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "encodings", "pydoc_data", "idle_test", "__pycache__"}
    modules = [f for f in root.rglob("*.py") if not left_out & set(f.relative_to(root).parts)]
    modules.sort(key=lambda f: hashlib.blake2b(f.relative_to(root).as_posix().encode()).digest())
    lines = []
    for module in modules:
        text = module.read_text(encoding="utf-8", errors="replace")
        start = text.find("\n", min(300, len(text) // 4)) + 1
        if not text[start:].strip() or not start:
            continue
        instruction = f"Continue the Python module {module.relative_to(root).as_posix()}."
        record = {"instruction": instruction, "input": text[:start], "output": text[start:], "history": []}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"no Python sources in {root}: pass --data")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines), shared=True)
    return path


# ---------------------------------------------------------------- tokens


def encode(document: Document, tokenizer: Any, *, train_on_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Token ids and labels of a document: prompt through the chat template, labelled -100; answer; eos.

    Prompt and answer are tokenized apart, so the answer begins where generation would begin.
    """
    prompt: list[int] = []
    if document.messages:
        messages = [{"role": role, "content": content} for role, content in document.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    answer = tokenizer(document.answer, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return ids, ids[:] if train_on_prompt else [IGNORED] * len(prompt) + ids[len(prompt) :]


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the tokenizer cannot be used with a model of this vocabulary."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer does not match the model: it has token id {highest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that came with the checkpoint"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token: the answers could not be ended")
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: use that of an instruct checkpoint of the same family")


# ---------------------------------------------------------------- windows


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

    def batch(self, rows: Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
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
    cache: Path | None = None,
) -> TrainingData:
    """Reads as much of the source as the run needs.

    Args:
        length: T, tokens per window.
        train_windows, held_out_windows: how many windows the run uses; fewer come back if the source has fewer.
        min_tokens: shorter documents are left out.
        max_rows: training documents at most.
        packing: "pack": documents end to end, cut every T tokens, the rest of the last window dropped;
            "cut": one window per document, its first T tokens, padded if shorter.
        train_on_prompt: label the prompt too (training from scratch).
        cache: folder of the tokens of earlier runs with the same source (files of the same path, size and time),
            tokenizer and options; any seed. None: neither read nor write them.

    Raises UserError: nothing to read, too many malformed lines, nothing left after filtering, too little text.
    """
    malformed = Malformed(allow_malformed)
    wanted = {"train": POOL * train_windows, "held-out": POOL * held_out_windows}
    builders = {name: _WindowBuilder(length, packing) for name in wanted}
    rows = dict.fromkeys(wanted, 0)
    read = short = 0
    options = [length, wanted, min_tokens, max_rows, packing, allow_malformed, train_on_prompt]
    name = f"tokens-{_fingerprint(source, tokenizer, options)}.pt"
    known = _load_tokens(cache, name) if cache else None
    if known:
        rows, short = known["rows"], known["short"]
        for split, builder in builders.items():
            builder.restore(known["builders"][split])

    def state(done: bool) -> dict[str, Any]:
        tokens = {split: builder.state() for split, builder in builders.items()}
        bad = {"lines": malformed.lines, "count": malformed.count, "first": malformed.first}
        return {"done": done, "read": read, "rows": rows, "short": short, "malformed": bad, "builders": tokens}

    if known and known["done"]:
        read, malformed = known["read"], Malformed(allow_malformed, **known["malformed"])
        console.print(f"{source}: {read} documents, tokenized before ({cache}/{name})")
    else:
        tokenized = known["read"] if known else 0
        saved = time.monotonic()
        with progress_bar() as progress:
            task = progress.add_task("read data", total=sum(wanted.values()))
            for document in documents(source, malformed):
                read += 1
                if read <= tokenized:
                    continue
                split = "held-out" if document.is_held_out() else "train"
                full = {name: len(builders[name]) >= wanted[name] for name in wanted}
                full["train"] |= rows["train"] >= max_rows
                if all(full.values()):
                    break
                if full[split]:
                    continue
                ids, labels = encode(document, tokenizer, train_on_prompt=train_on_prompt)
                if len(ids) < min_tokens:
                    short += 1
                    continue
                rows[split] += 1
                builders[split].add(ids, labels)
                progress.update(task, completed=sum(min(len(builders[name]), wanted[name]) for name in wanted))
                if cache and time.monotonic() - saved > SNAPSHOT_SECONDS:
                    _save_tokens(cache, name, state(done=False))
                    saved = time.monotonic()
        malformed.check()
        if cache:
            _save_tokens(cache, name, state(done=True))
    for split, builder in builders.items():
        if len(builder) == 0 and wanted[split]:
            raise UserError(_nothing_left(split, source, read, short, min_tokens, rows[split], builder.tokens, length))
    train = builders["train"].windows(train_windows, seed)
    held_out = builders["held-out"].windows(held_out_windows, seed)
    facts = {
        "path": source,
        "sha256": train.sha256(),
        "held_out_sha256": held_out.sha256(),
        "documents_read": read,
        "documents_short": short,
        "documents_trained": rows["train"],
        "documents_held_out": rows["held-out"],
        "windows": len(train),
        "windows_held_out": len(held_out),
        "malformed": malformed.summary() if malformed.count else None,
    }
    return TrainingData(train, held_out, facts)


def _fingerprint(source: str, tokenizer: Any, options: list[Any]) -> str:
    """What the tokens hang on. Large files are not read for it: their path, size and time of change stand for them."""
    address: Any = source
    if "://" not in source:
        path = stdlib_records() if source == "stdlib" else Path(source)
        files = _visible_files(path) if path.is_dir() else [path]
        address = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    words = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([address, words, options]).encode()).hexdigest()[:16]


def _load_tokens(cache: Path, name: str) -> dict[str, Any] | None:
    """What an earlier run tokenized; a file that cannot be read is made anew."""
    try:
        return load_state(cache, name)
    except UserError:
        console.print(f"{cache / name} cannot be read: tokenizing again")
        return None


def _save_tokens(cache: Path, name: str, state: dict[str, Any]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    save_state(cache, state, name, shared=True)


def _nothing_left(
    split: str, source: str, read: int, short: int, min_tokens: int, rows: int, tokens: int, length: int
) -> str:
    if read == 0:
        return f"{source} holds no documents"
    if rows == 0 and short:
        return f"no {split} document of {source} has {min_tokens} tokens ({read} read): lower --min-tokens"
    if rows == 0:
        return (
            f"none of the {read} documents of {source} falls into the {split} split (one in {HELD_OUT_SHARE} is held "
            f"out, by its hash; a file of text is cut into documents of {PIECE} characters): more text is needed"
        )
    return (
        f"the {split} text of {source} is shorter than one window ({tokens} tokens with labels, --length {length}): "
        "lower --length, or give more text"
    )


class _WindowBuilder:
    """Cuts or packs token lists into windows of one length; windows without any label to learn from are dropped."""

    def __init__(self, length: int, packing: str):
        self.length = length
        self.packing = packing
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
        if all(label == IGNORED for label in labels[1:]):  # the first token is never predicted
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
