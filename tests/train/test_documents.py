"""What `--data` names, as documents: records, folders, text, bad lines."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from dsa_export.cli import UserError
from tests.train.conftest import record, write_jsonl
from train import documents as sources
from train.documents import Document, Malformed, check_source, documents, parse_record, stdlib_records


def test_local_files_are_read_without_a_request(tmp_path: Path, monkeypatch) -> None:
    """datasets counts each loading on the hub: offline, a folder of code took a tenth of a second more per file."""
    for name, value in (("HF_UPDATE_DOWNLOAD_COUNTS", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("a request"))
    (tmp_path / "a.py").write_text("pass")
    for source in (tmp_path, tmp_path / "a.py"):
        assert [document.answer for document in documents(str(source), Malformed())] == ["pass"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "Expecting"),
        ("[]", "expected an object"),
        (json.dumps({"instruction": "x", "output": ""}), "no text to learn from"),
        (json.dumps({"instruction": "", "input": "", "output": "y"}), "none of messages, text, instruction and input"),
        (json.dumps({"content": "y"}), "none of messages, text, instruction and input"),
        (json.dumps({"text": ""}), "no text to learn from"),
        (json.dumps({"text": 3}), "no text to learn from"),
        (json.dumps({"text": "half of a pair: \ud83d"}), "surrogates"),
        (json.dumps({"messages": "Hello"}), "must be a list"),
        (json.dumps({"messages": ["Hello", "Hi"]}), "must be a list"),
        (json.dumps({"messages": [{"role": "user", "content": "q"}]}), "must end with the assistant's"),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), "must end with the assistant's"),
        (json.dumps({"messages": [{"role": "tool", "content": "q"}]}), "must have a role"),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "must have a role"),
        (json.dumps({"instruction": 3, "output": "y"}), "strings"),
        (json.dumps(record("y", history=[["only one"]])), "history"),
        (json.dumps(record("y", history="none")), "history"),
        (json.dumps(record("half of a pair: \ud83d")), "surrogates"),
        (json.dumps(record("y", history=[["\ud83d", "half of a pair"]])), "surrogates"),
    ],
)
def test_malformed_records_are_named(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_record(line)


def test_missing_optional_fields_are_fine() -> None:
    assert parse_record('{"input": "q", "output": "a", "history": null}') == Document((("user", "q"),), "a")


def test_chats_and_plain_text_are_read_too() -> None:
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "And?"), ("assistant", "So.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns], "id": 7}
    assert parse_record(json.dumps(chat)) == Document(tuple(turns[:-1]), "So.")
    assert parse_record(json.dumps({"text": "a = 1\n", "meta": {}})) == Document((), "a = 1\n")
    alpaca = {"instruction": "q", "input": "", "output": "a", "text": "q and a"}
    assert parse_record(json.dumps(alpaca)) == Document((("user", "q"),), "a")


def test_empty_lines_and_a_byte_order_mark_are_no_bad_lines(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["\ufeff" + json.dumps(record("one")), "", " ", record("two"), ""])
    malformed = Malformed()
    assert [document.answer for document in documents(source, malformed)] == ["one", "two"]
    assert (malformed.lines, malformed.count) == (2, 0)


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "text.txt.xz", "text.zip"])
def test_a_file_that_is_not_as_compressed_as_its_name_says_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(UserError, match=f"cannot read .*{name}: "):
        list(documents(str(tmp_path / name), Malformed()))


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(errno.EACCES, "Permission denied", "d"), OSError(errno.ENOSPC, "full")]
)
def test_what_says_nothing_of_the_data_is_not_hidden(tmp_path: Path, monkeypatch, error: Exception) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record("text")])

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", failing)
    with pytest.raises(type(error)):
        list(documents(source, Malformed()))


def test_bad_lines_stop_a_long_stream_early(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [*["bad"] * 1000, *[record("good")] * 5000])
    malformed = Malformed()
    with pytest.raises(UserError):
        list(documents(source, malformed))
    assert malformed.lines == 1000


def test_folders_of_records_and_of_text(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("print('hello')\n")
    (tmp_path / "b.md").write_text("# Title\n\ntext\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.py").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    texts = {d.answer for d in documents(str(tmp_path), Malformed())}
    assert texts == {"print('hello')\n", "# Title\n\ntext\n"}
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(record("zipped")) + "\n")
    assert [d.answer for d in documents(str(tmp_path), Malformed())] == ["zipped"]
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not zipped")
    with pytest.raises(UserError, match=r"cannot read .*rows.jsonl.gz: Not a gzipped file"):
        list(documents(str(tmp_path), Malformed()))


def test_a_folder_of_text_is_read_as_its_files_are_whatever_their_names(tmp_path: Path, monkeypatch) -> None:
    """Not through datasets: 13 ms for each file."""
    content = b"\xef\xbb\xbfa\r\nb\rc\x85\xff\xe2\x80\xa8d\n"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b[1].txt").write_text("a pattern")
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("latin")
    alone = [document.answer for document in documents(str(tmp_path / "a.txt"), Malformed())]
    monkeypatch.setattr(sources, "_stream", lambda *_, **__: pytest.fail("a dataset of one file"))
    assert {document.answer for document in documents(str(tmp_path), Malformed())} == {*alone, "a pattern", "latin"}


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match=r"model\.safetensors is not text"):
        list(documents(str(tmp_path / "model.safetensors"), Malformed()))


def test_one_file_of_text_is_cut_into_documents_for_both_splits(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a long book\n" for number in range(40_000))
    (tmp_path / "book.txt").write_text(text)
    found = list(documents(str(tmp_path / "book.txt"), Malformed()))
    assert "".join(document.answer for document in found) == text
    assert all(len(document.answer) < 8300 and document.answer.endswith("\n") for document in found)
    assert {document.is_held_out() for document in found} == {False, True}


def test_a_path_that_looks_like_a_pattern_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows[1].jsonl", [record("text")])
    with pytest.raises(UserError, match="rename it"):
        list(documents(source, Malformed()))


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match="no such data: ''"):
        check_source("")


def test_the_standard_library_is_written_in_the_schema_once(tmp_path: Path) -> None:
    path = stdlib_records(tmp_path)
    with path.open() as file:
        parsed = [parse_record(next(file)) for _ in range(50)]
    assert all(d.messages[0][1].startswith("Continue the Python module ") for d in parsed)
    assert sum(len(d.answer) for d in parsed) > 5 * sum(len(d.messages[0][1]) for d in parsed)
    written = path.stat().st_mtime_ns
    assert stdlib_records(tmp_path) == path and path.stat().st_mtime_ns == written
    assert parsed[0] == next(documents("stdlib", Malformed(), cache=tmp_path))
