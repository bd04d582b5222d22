"""Records to windows: chat format, labels, packing, splits, bad lines."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from pathlib import Path

import datasets
import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.files import write_atomically
from train import data
from train.checkpoint import save_state
from train.data import (
    IGNORED,
    Document,
    Malformed,
    check_source,
    check_tokenizer,
    documents,
    encode,
    load_data,
    parse_record,
    stdlib_records,
)

IM_START, IM_END = 1, 2


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def record(output: str, **fields) -> dict:
    return {"instruction": "Say it.", "input": "", "output": output, "history": []} | fields


def load(source: str, tokenizer, **options):
    defaults = {"length": 32, "train_windows": 5, "held_out_windows": 2}
    return load_data(source, tokenizer, **(defaults | options))


def test_local_files_are_read_without_a_request(tmp_path: Path, monkeypatch) -> None:
    """datasets counts each loading on the hub: offline, a folder of code took a tenth of a second more per file."""
    for name, value in (("HF_UPDATE_DOWNLOAD_COUNTS", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("a request"))
    (tmp_path / "a.py").write_text("pass")
    for source in (tmp_path, tmp_path / "a.py"):
        assert [document.answer for document in documents(str(source), Malformed())] == ["pass"]


# ---------------------------------------------------------------- the chat format


def test_chat_format_and_labels(tokenizer) -> None:
    """A1: history and input in the prompt, which is labelled -100; every answer token trains; eos at the end."""
    line = json.dumps(record("An answer.", input="With input.", history=[["Hello", "Hi"], ["And?", "So."]]))
    ids, labels = encode(parse_record(line), tokenizer)
    expected_prompt = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
        "<|im_start|>user\nSay it.\nWith input.<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = sum(label == IGNORED for label in labels)
    assert tokenizer.decode(ids[:prompt]) == expected_prompt
    assert labels[:prompt] == [IGNORED] * prompt
    assert tokenizer.decode(ids[prompt:]) == "An answer.<|im_end|>"
    assert labels[prompt:] == ids[prompt:]
    assert ids[-1] == tokenizer.eos_token_id == IM_END


def test_training_on_the_prompt_labels_everything(tokenizer) -> None:
    ids, labels = encode(parse_record(json.dumps(record("Yes."))), tokenizer, train_on_prompt=True)
    assert labels == ids and labels is not ids


def test_plain_text_has_no_prompt(tokenizer) -> None:
    ids, labels = encode(Document((), "text"), tokenizer)
    assert tokenizer.decode(ids) == "text<|im_end|>" and labels == ids


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "Expecting"),
        ("[]", "expected an object"),
        (json.dumps({"instruction": "x", "output": ""}), "no output"),
        (json.dumps({"instruction": "", "input": "", "output": "y"}), "neither instruction nor input"),
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


# ---------------------------------------------------------------- sources


def test_more_than_one_percent_of_bad_lines_stops_the_run(tmp_path: Path, tokenizer) -> None:
    good = [record(f"Answer number {i}, long enough.") for i in range(195)]
    source = write_jsonl(tmp_path / "d.jsonl", [*good[:2], "not json", *good[2:], '{"output": 1}', "[" * 100_000])
    with pytest.raises(
        UserError, match=r"3 of 198 lines are malformed \(d.jsonl line 3: .*line 197: .*allow-malformed"
    ):
        load(source, tokenizer, train_windows=10_000)
    facts = load(source, tokenizer, train_windows=10_000, allow_malformed=True).facts
    assert facts["malformed"].startswith("3 of 198 lines")


def test_one_percent_of_bad_lines_is_reported_and_left_out(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [*[record(f"Answer {i}.") for i in range(99)], "oops"])
    data = load(source, tokenizer, train_windows=10_000)
    assert data.facts["malformed"].startswith("1 of 100 lines") and "line 100" in data.facts["malformed"]


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


def test_bad_lines_stop_a_long_stream_early(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [*["bad"] * 1000, *[record("good")] * 5000])
    malformed = Malformed()
    with pytest.raises(UserError):
        list(documents(source, malformed))
    assert malformed.lines == 1000


def test_only_what_is_needed_is_read(tmp_path: Path, tokenizer) -> None:
    """A2: the source has ten million rows, the run a few."""
    source = write_jsonl(tmp_path / "d.jsonl", [record(f"Row {i}: {'x' * 100}") for i in range(5000)])
    data = load(source, tokenizer, train_windows=3, held_out_windows=1)
    assert len(data.train) == 3 and data.facts["documents_read"] < 500


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
    monkeypatch.setattr(data, "_stream", lambda *_, **__: pytest.fail("a dataset of one file"))
    assert {document.answer for document in documents(str(tmp_path), Malformed())} == {*alone, "a pattern", "latin"}


def test_what_lies_beside_records_is_not_read(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [record(f"Unique text {i}.") for i in range(200)])
    notes = tmp_path / ".cache" / "huggingface" / "download" / "rows.jsonl.metadata"  # of `hf download --local-dir`
    notes.parent.mkdir(parents=True)
    notes.write_text("c0ffee\n")
    (tmp_path / "rows.jsonl.sha256").write_text("c0ffee\n")
    assert list(documents(str(tmp_path), Malformed())) == list(documents(source, Malformed()))
    cache = tmp_path.with_name("tokens")
    load(str(tmp_path), tokenizer, cache=cache)
    notes.write_text("changed\n")
    load(str(tmp_path), tokenizer, cache=cache)
    assert len(list(cache.iterdir())) == 1


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


@pytest.mark.parametrize("name", ["missing.jsonl", "empty"])
def test_no_data_is_one_line(tmp_path: Path, tokenizer, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        load(str(tmp_path / name), tokenizer)


def test_the_standard_library_is_written_in_the_schema_once(tmp_path: Path) -> None:
    path = stdlib_records(tmp_path)
    with path.open() as file:
        parsed = [parse_record(next(file)) for _ in range(50)]
    assert all(d.messages[0][1].startswith("Continue the Python module ") for d in parsed)
    assert sum(len(d.answer) for d in parsed) > 5 * sum(len(d.messages[0][1]) for d in parsed)
    written = path.stat().st_mtime_ns
    assert stdlib_records(tmp_path) == path and path.stat().st_mtime_ns == written


# ---------------------------------------------------------------- split


def test_held_out_documents_are_never_trained_on(tmp_path: Path, tokenizer) -> None:
    """Bug of the original: evaluation runs on training rows. Duplicates fall on the same side."""
    rows = [record(f"Unique text {i}.") for i in range(300)]
    source = write_jsonl(tmp_path / "d.jsonl", rows + rows)
    data = load(source, tokenizer, length=60, packing="cut", train_windows=10_000, held_out_windows=10_000)
    train, held_out = ({tuple(row.tolist()) for row in w.input_ids} for w in (data.train, data.held_out))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 300


def test_the_split_does_not_depend_on_the_order(tmp_path: Path, tokenizer) -> None:
    rows = [record(f"Unique text {i}.") for i in range(200)]
    sides = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        data = load(write_jsonl(tmp_path / f"{name}.jsonl", order), tokenizer, length=60, packing="cut",
                    train_windows=10_000, held_out_windows=10_000)  # fmt: skip
        sides.append({tuple(row.tolist()) for row in data.held_out.input_ids})
    assert sides[0] == sides[1]


# ---------------------------------------------------------------- windows


def test_packing_keeps_every_token_in_order(tmp_path: Path, tokenizer) -> None:
    rows = [record(f"Text {i}. " * (i % 7 + 1)) for i in range(60)]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    stream_ids, stream_labels = [], []
    for document in documents(source, Malformed()):
        if not document.is_held_out():
            ids, labels = encode(document, tokenizer)
            stream_ids += ids
            stream_labels += labels
    data = load(source, tokenizer, length=64, train_windows=10_000)
    assert (data.train.lengths == 64).all()
    starts = {tuple(stream_ids[i : i + 64]): i for i in range(0, len(stream_ids) - 63, 64)}
    found = [starts[tuple(row.tolist())] for row in data.train.input_ids]
    dropped = [i for i in starts.values() if all(label == IGNORED for label in stream_labels[i + 1 : i + 64])]
    assert sorted(found + dropped) == sorted(starts.values())
    for start, labels in zip(found, data.train.labels, strict=True):
        assert labels.tolist() == stream_labels[start : start + 64]


def test_cutting_pads_on_the_right_and_masks_the_padding(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record("x" * (i % 90 + 1)) for i in range(200)])
    data = load(source, tokenizer, length=100, packing="cut", train_windows=50)
    assert data.train.lengths.min() < 100 and data.train.lengths.max() == 100
    batch = data.train.batch(torch.arange(50))
    padding = torch.arange(100) >= data.train.lengths[:, None]
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["attention_mask"] == (~padding).long()).all()
    short = data.train.batch(data.train.lengths.argmin()[None])
    assert short["input_ids"].shape[1] == data.train.lengths.min()


def test_windows_without_a_label_are_dropped(tmp_path: Path, tokenizer) -> None:
    """A window inside a long prompt would make the cross-entropy 0 / 0."""
    source = write_jsonl(tmp_path / "d.jsonl", [record("yes", input="long " * 200 + str(i)) for i in range(40)])
    data = load(source, tokenizer, length=64, train_windows=10_000)
    assert ((data.train.labels[:, 1:] != IGNORED).sum(1) > 0).all()


def test_windows_are_cut_into_shorter_ones(tmp_path: Path, tokenizer) -> None:
    """Every token of the long windows stands in one part, in order; a piece of prompt alone is left out."""
    source = write_jsonl(tmp_path / "d.jsonl", [record("yes " * 30, input="long " * 40 + str(i)) for i in range(60)])
    train = load(source, tokenizer, length=128, train_windows=10).train
    short, long = train.cut([32, 128])
    assert long.input_ids.equal(train.input_ids[5:]) and long.labels.equal(train.labels[5:])
    pieces = train.input_ids[:5].reshape(-1, 32)
    kept = [row for row, labels in enumerate(train.labels[:5].reshape(-1, 32)) if (labels[1:] != IGNORED).any()]
    assert 0 < len(kept) < len(pieces)
    assert short.input_ids.equal(pieces[kept]) and short.lengths.tolist() == [32] * len(kept)


def test_min_tokens_and_max_rows(tmp_path: Path, tokenizer) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record("x" * (10 if i % 2 else 200) + str(i)) for i in range(200)])
    data = load(source, tokenizer, min_tokens=150, max_rows=7, train_windows=10_000, packing="cut")
    assert data.facts["documents_trained"] == len(data.train) == 7
    assert data.facts["documents_short"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_tokens": 5000}, "lower --min-tokens"),
        ({"length": 5000}, "shorter than one window"),
    ],
)
def test_nothing_left_is_one_line(tmp_path: Path, tokenizer, options: dict, message: str) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record(f"Short {i}.") for i in range(60)])
    with pytest.raises(UserError, match=message):
        load(source, tokenizer, **options)


def test_too_few_documents_to_hold_any_out(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match="split"):
        load(write_jsonl(tmp_path / "d.jsonl", [record("one " * 50)]), tokenizer)


def test_the_same_seed_draws_the_same_windows(records: Path, tokenizer) -> None:
    a, b, c = (load(str(records), tokenizer, seed=seed) for seed in (0, 0, 1))
    assert a.facts["sha256"] == b.facts["sha256"] != c.facts["sha256"]
    assert torch.equal(a.train.input_ids, b.train.input_ids)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """The documents that were tokenized."""
    seen: list[Document] = []

    def counted(document: Document, *args, **options):
        seen.append(document)
        return encode(document, *args, **options)

    monkeypatch.setattr(data, "encode", counted)
    return seen


def test_a_second_run_does_not_tokenize_again(tmp_path: Path, records: Path, tokenizer, encoded: list) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [*[record(f"Answer number {i}.") for i in range(150)], "oops"])
    options = {"cache": tmp_path / "cache", "train_windows": 1000}
    first = load(source, tokenizer, **options)
    count = len(encoded)
    again, reseeded = load(source, tokenizer, **options), load(source, tokenizer, **options, seed=1)
    assert len(encoded) == count > 100
    assert again.facts == first.facts and "line 151" in again.facts["malformed"]
    assert torch.equal(again.train.input_ids, first.train.input_ids)
    assert torch.equal(again.held_out.labels, first.held_out.labels)
    assert reseeded.facts["sha256"] == load(source, tokenizer, seed=1, train_windows=1000).facts["sha256"]
    del encoded[:]
    load(source, tokenizer, **options, packing="cut")
    assert len(encoded) == count
    write_jsonl(tmp_path / "d.jsonl", [record(f"Another number {i}.") for i in range(150)])
    assert load(source, tokenizer, **options).facts["sha256"] != first.facts["sha256"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".pt"]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, records: Path, tokenizer, encoded: list, capsys, damage) -> None:
    whole = load(str(records), tokenizer, cache=tmp_path)
    [file] = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    del encoded[:]
    again = load(str(records), tokenizer, cache=tmp_path)
    assert encoded and again.facts == whole.facts
    assert f"{file.name} cannot be read: tokenizing again" in capsys.readouterr().out.replace("\n", "")
    del encoded[:]
    load(str(records), tokenizer, cache=tmp_path)
    assert not encoded


def test_tokenizing_goes_on_where_it_was_stopped(
    tmp_path: Path, records: Path, tokenizer, encoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(str(records), tokenizer, train_windows=1000)
    count = len(encoded)
    monkeypatch.setattr(data, "SNAPSHOT_SECONDS", 0)
    del encoded[:]
    counted = data.encode

    def stopped(*args, **options):
        if len(encoded) == 40:
            raise KeyboardInterrupt
        return counted(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "encode", stopped)
        load(str(records), tokenizer, train_windows=1000, cache=tmp_path)
    rest = load(str(records), tokenizer, train_windows=1000, cache=tmp_path)
    assert len(encoded) == count
    assert rest.facts == whole.facts and torch.equal(rest.train.labels, whole.train.labels)


def test_a_tokenizer_of_another_model_is_refused(tokenizer) -> None:
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(UserError, match="does not match the model"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)


def write_again_and_again(folder: Path) -> None:
    for _ in range(200):
        write_atomically(folder / "records", "x" * 10_000, shared=True)
        save_state(folder, {"tokens": torch.zeros(500)}, "tokens.pt", shared=True)


def test_processes_can_share_the_cache(tmp_path: Path):
    """Two evaluations that start together tokenise the same data."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_again_and_again, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records", "tokens.pt"]
