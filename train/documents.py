"""Text sources: what `--data` names, as a stream of documents.

    stdlib                      the Python standard library's own sources, written once as JSON lines
    *.jsonl, *.json (.gz, .zst) JSON lines: messages, text, or deepctrl-sft-data's instruction, input, output, history
    a folder                    its *.jsonl files, or else every text file in it, one document each
    any other file              plain text, cut into documents of PIECE characters
    hf://…, https://…           JSON lines, streamed

.zst needs the package zstandard, https:// needs aiohttp; neither is installed with the toolchain.

A document is held out for evaluation if its own hash says so: wherever it stands in the source, it is never trained on.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Any

from dsa_export.cli import UserError, first_line, user_message
from dsa_export.files import write_atomically

HELD_OUT_SHARE = 20
"""One document in this many is held out."""
PIECE = 8192
"""Characters of a document that is cut out of a single text file: some 2,000 tokens."""

ROLES = ("system", "user", "assistant")

CACHE = Path("out/data")
"""Where tokens and the standard library's records are kept, unless told otherwise."""

COMPRESSED = frozenset([".gz", ".zst", ".bz2", ".xz", ".lz4"])
TEXT_SUFFIXES = frozenset([
    ".py", ".md", ".txt", ".rst", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".java", ".go", ".rs", ".rb",
    ".sh", ".tex", ".html", ".css", ".sql", ".yaml", ".toml",
])  # fmt: skip


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
    """One JSON line: messages, text, or the fields of deepctrl-sft-data. Raises ValueError with the reason.

    messages: [{"role": "system", "user" or "assistant", "content": text}, …]; the last, the assistant's, is the answer.
    text: plain text. instruction, input, output, history ([[user, assistant], …]): output is the answer.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if "messages" in record:
        document = _conversation(record["messages"])
    elif "text" in record and "output" not in record:  # Alpaca's text is all of the other fields once more
        document = Document((), record["text"])
    else:
        document = _instruction(record)
    if not isinstance(document.answer, str) or not document.answer:
        raise ValueError("no text to learn from: the last message, text or output is empty, or no string")
    for text in (*(content for _, content in document.messages), document.answer):
        text.encode()  # raises for half of a surrogate pair (\ud83d), which no tokenizer takes
    return document


def _conversation(messages: Any) -> Document:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects")
    turns = [(message.get("role"), message.get("content")) for message in messages]
    if not all(role in ROLES and isinstance(content, str) for role, content in turns):
        raise ValueError(f"a message must have a role ({', '.join(ROLES)}) and a content, a string")
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise ValueError("messages must end with the assistant's, an answer to one before")
    return Document(tuple(turns[:-1]), turns[-1][1])


def _instruction(record: dict[str, Any]) -> Document:
    instruction, user_input, output = (record.get(name) or "" for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (instruction, user_input, output)):
        raise ValueError("instruction, input and output must be strings")
    question = "\n".join(part for part in (instruction, user_input) if part)
    if not question:
        raise ValueError("none of messages, text, instruction and input")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError("history must be a list of [user, assistant] pairs")
    messages: list[tuple[str, str]] = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError("history must be a list of [user, assistant] pairs")
        messages += [("user", turn[0]), ("assistant", turn[1])]
    messages.append(("user", question))
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


def training_texts(source: str, allow_malformed: bool, cache: Path | None, most: int) -> Iterator[str]:
    """What a tokenizer learns from: the answers of the first `most` documents that are not held out."""
    read = islice(documents(source, Malformed(allow_malformed), cache), most)
    return (document.answer for document in read if not document.is_held_out())


def documents(source: str, malformed: Malformed, cache: Path | None = None) -> Iterator[Document]:
    """Streams the documents of a source. Raises UserError if there is none, or too many lines are malformed.

    cache: where the standard library's records are kept [CACHE].
    """
    check_source(source)
    if source == "stdlib":
        source = str(stdlib_records(cache))
    if "://" in source:
        yield from _json_lines(source, source.rsplit("/", 1)[-1], malformed)
        return
    path = Path(source)
    if not path.is_dir():
        is_text = not {".jsonl", ".json"} & set(path.suffixes)
        yield from _pieces(path) if is_text else _json_lines(_address(path), path.name, malformed)
        return
    files = visible_files(path)
    records = [f for f in files if _holds_records(f)]
    for file in records:
        yield from _json_lines(_address(file), file.name, malformed)
    if not records:
        yield from _text_files([f for f in files if f.suffix in TEXT_SUFFIXES], path)


def visible_files(folder: Path) -> list[Path]:
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
        if "\0" in text[:PIECE]:
            raise UserError(f"{file} is not text: give text, or JSON lines (*.jsonl)")
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
        if user_message(error) is not None:  # no memory, no permission, a full disk
            raise
        raise UserError(f"cannot read {address}: {first_line(error)}") from None


def stdlib_records(folder: Path | None = None) -> Path:
    """Writes the standard library's modules as deepctrl-sft-data records, once, and returns the file.

    Each asks to continue a module from its first lines. Left out: tests, and tables that are no language.
    """
    folder = folder or CACHE
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
