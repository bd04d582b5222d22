"""Documents to windows: chat format, labels, packing, splits, the cache."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.files import write_atomically
from tests.train.conftest import record, write_jsonl
from train import data
from train.checkpoint import save_state
from train.data import IGNORED, Windows, _middle, _WindowBuilder, check_tokenizer, encode, load_data
from train.documents import Document, Malformed, documents, parse_record

IM_START, IM_END = 1, 2


def load(source: str, tokenizer, **options):
    defaults = {"length": 32, "train_windows": 5, "held_out_windows": 2}
    return load_data(source, tokenizer, **(defaults | options))


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


@pytest.mark.parametrize(
    ("refusing", "said"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}", "no system"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_chat_that_the_template_refuses_is_one_line(tokenizer, monkeypatch, refusing: str, said: str) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(UserError, match=f"roles system, user: .*{said}"):
        encode(Document((("system", "Be brief."), ("user", "Hello")), "Hi"), tokenizer)


def test_plain_text_has_no_prompt(tokenizer) -> None:
    ids, labels = encode(Document((), "text"), tokenizer)
    assert tokenizer.decode(ids) == "text<|im_end|>" and labels == ids


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


def test_only_what_is_needed_is_read(tmp_path: Path, tokenizer) -> None:
    """A2: the source has ten million rows, the run a few."""
    source = write_jsonl(tmp_path / "d.jsonl", [record(f"Row {i}: {'x' * 100}") for i in range(5000)])
    data = load(source, tokenizer, train_windows=3, held_out_windows=1)
    assert len(data.train) == 3 and data.facts["documents_read"] < 500


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


@pytest.mark.parametrize("name", ["missing.jsonl", "empty"])
def test_no_data_is_one_line(tmp_path: Path, tokenizer, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        load(str(tmp_path / name), tokenizer)


# ---------------------------------------------------------------- split


def test_held_out_documents_are_never_trained_on(tmp_path: Path, tokenizer) -> None:
    """Bug of the original: evaluation runs on training rows. Duplicates fall on the same side."""
    rows = [record(f"Unique text {i}.") for i in range(300)]
    source = write_jsonl(tmp_path / "d.jsonl", rows + rows)
    data = load(source, tokenizer, length=60, packing="cut", train_windows=10_000, held_out_windows=10_000)
    train, held_out = ({tuple(row.tolist()) for row in w.input_ids} for w in (data.train, data.held_out))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 300


def held_out_text(start: str) -> str:
    """The start and a number behind it with which a text without messages is held out."""
    return next(text for i in range(1000) if Document((), text := f"{start} {i}").is_held_out())


def test_one_long_document_does_not_fill_the_held_out_windows(tmp_path: Path, tokenizer) -> None:
    """An eighth of them at most, from its middle; of a document of the usual size everything."""
    folder = tmp_path / "texts"
    folder.mkdir()
    long = held_out_text(" ".join(f"w{i}" for i in range(3000)))
    texts = [long, *(held_out_text(f"short text number {i}") for i in range(60))]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    (folder / "trained.txt").write_text("and " * 500)

    def words_of_the_long_one(rows: list[list[int]]) -> list[str]:
        return re.findall(r"\bw\d{4}\b", " ".join(map(tokenizer.decode, rows)))  # none is cut to such a word

    few, most, everything = (load(str(folder), tokenizer, held_out_windows=n) for n in (16, 100, 10_000))
    assert len(few.held_out) == 16 and len(most.held_out) < 100  # drawn at random, and all that there are
    assert few.facts["documents_held_out"] == len(texts)
    ids, taken = encode(Document((), long), tokenizer)[0], 13 * 32
    middle = words_of_the_long_one([ids[(len(ids) - taken) // 2 :][:taken]])
    words = words_of_the_long_one(most.held_out.input_ids.tolist())
    assert set(words) <= set(middle) and len(words) > len(middle) / 2
    assert tokenizer.decode(everything.held_out.input_ids.flatten().tolist()).count("w2999") == 1


def test_one_long_answer_does_not_fill_the_held_out_windows(tmp_path: Path, tokenizer) -> None:
    """Records too, of which the standard library's sources are made: 16 windows are of eight or more of them."""
    rows = [record(f"{i} " * (4000 if i < 60 else 40), instruction=f"Question {i}.") for i in range(900)]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, held_out_windows=16)
    assert len(data.held_out) == 16 and data.facts["documents_held_out"] >= 8


def test_of_a_long_prompt_its_answer_is_held_out() -> None:
    labels = [IGNORED] * 90 + [7] * 10
    assert _middle(labels, 20) == slice(80, 100) and _middle([7] * 100, 20) == slice(40, 60)
    assert _middle([7] * 9 + [IGNORED] * 91, 20) == slice(0, 20)
    assert _middle(labels, 200) == slice(0, 200) and _middle([IGNORED] * 30, 20) == slice(0, 20)


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


def test_what_is_cut_and_held_out_begins_where_its_document_does(records: Path, tokenizer) -> None:
    held_out = load(str(records), tokenizer, packing="cut", length=64).held_out
    assert len(held_out) == 2 and held_out.input_ids[:, 0].eq(IM_START).all()


def test_the_limit_of_documents_is_for_those_that_are_trained_on(records: Path, tokenizer) -> None:
    facts = load(str(records), tokenizer, packing="cut", length=64, max_rows=1).facts
    assert (facts["documents_trained"], facts["documents_held_out"]) == (1, 2)


def test_windows_with_other_labels_are_other_data(records: Path, tokenizer) -> None:
    windows = load(str(records), tokenizer).train
    assert replace(windows, labels=windows.input_ids).sha256() != windows.sha256()


def test_windows_without_a_label_are_dropped(tmp_path: Path, tokenizer) -> None:
    """A window inside a long prompt would make the cross-entropy 0 / 0."""
    source = write_jsonl(tmp_path / "d.jsonl", [record("yes", input="long " * 200 + str(i)) for i in range(40)])
    data = load(source, tokenizer, length=64, train_windows=10_000)
    assert ((data.train.labels[:, 1:] != IGNORED).sum(1) > 0).all()


def test_windows_without_a_label_where_it_is_scored_are_dropped(tmp_path: Path, tokenizer) -> None:
    """Long questions, short answers: of 20 tokens at the end of a window few are an answer's."""
    source = write_jsonl(tmp_path / "d.jsonl", [record("Yes.", instruction=f"{i} " * 20) for i in range(200)])
    windows = {n: load(source, tokenizer, train_windows=9, scored=n).train for n in (None, 20)}
    labelled = {n: (w.labels[:, -19:] != IGNORED).any(1) for n, w in windows.items()}
    assert not labelled[None].all() and labelled[20].all() and len(windows[20]) == 9


@pytest.mark.parametrize(("scored", "kept"), [(None, [1, 2, 3, 4, 5, 6, 7]), (3, [6, 7])])
def test_a_window_is_kept_for_a_label_that_is_predicted(scored: int | None, kept: list[int]) -> None:
    """Of 8 tokens, or of their last 3, the first is not."""
    for place in range(8):
        builder = _WindowBuilder(8, "pack", scored)
        builder.add([*range(8)], [7 if n == place else IGNORED for n in range(8)])
        assert len(builder) == (place in kept), place


def test_too_few_held_out_windows_are_said(tmp_path: Path, tokenizer, capsys) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record(f"Answer {i}.") for i in range(100)])
    found = len(load(source, tokenizer, held_out_windows=1000).held_out)
    assert f"fills {found} held-out windows of 32 tokens, not 1000" in " ".join(capsys.readouterr().out.split())


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


def test_what_is_cut_shorter_is_kept_for_a_label_that_is_predicted() -> None:
    """In the first half of the first window only its first token has one."""
    ids = torch.arange(16, dtype=torch.int32).view(2, 8)
    labels = torch.full((2, 8), IGNORED, dtype=torch.int32)
    labels[0, 0] = labels[0, 4] = labels[0, 5] = labels[1] = 7
    short, long = Windows(ids, labels, torch.tensor([8, 8])).cut([4, 8])
    assert short.input_ids.tolist() == [[4, 5, 6, 7]] and len(long) == 1


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


def test_nothing_learned_in_the_first_tokens_of_any_document(tmp_path: Path, tokenizer) -> None:
    """The prompts are longer than a window: shorter windows would not help."""
    lines = [record("Yes.", instruction=f"A long question, number {i}. " * 5) for i in range(60)]
    source = write_jsonl(tmp_path / "d.jsonl", lines)
    with pytest.raises(UserError, match="do the first 64 tokens hold any that is learned: raise --length"):
        load(source, tokenizer, packing="cut", length=64)
    assert len(load(source, tokenizer, packing="cut", length=512).train) == 5


def test_too_few_documents_to_hold_any_out(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match="split"):
        load(write_jsonl(tmp_path / "d.jsonl", [record("one " * 50)]), tokenizer)


def test_the_same_seed_draws_the_same_windows(records: Path, tokenizer) -> None:
    a, b, c = (load(str(records), tokenizer, seed=seed) for seed in (0, 0, 1))
    for windows in ("sha256", "held_out_sha256"):
        assert a.facts[windows] == b.facts[windows] != c.facts[windows]
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


def test_the_facts_of_tokens_from_the_cache_are_those_of_the_source(tmp_path: Path, tokenizer) -> None:
    """The manifest says how many documents were left out as too short."""
    source = write_jsonl(tmp_path / "d.jsonl", [record("x" * (i % 40 + 1)) for i in range(300)])
    first, again = (load(source, tokenizer, min_tokens=50, cache=tmp_path / "cache").facts for _ in range(2))
    assert first["documents_short"] > 0 and again == first


def test_what_was_tokenized_otherwise_is_not_taken(tmp_path: Path, tokenizer, encoded: list) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [record(f"Answer number {i}.") for i in range(150)])
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] }}"
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = "<|endoftext|>"

    def tokenizes(words=tokenizer, **more) -> bool:
        del encoded[:]
        load(source, words, cache=tmp_path / "cache", train_windows=1000, **more)
        return bool(encoded)

    assert tokenizes() and not tokenizes()
    for options in (
        {"min_tokens": 9}, {"train_on_prompt": True}, {"max_rows": 9}, {"length": 16}, {"words": other},
        {"words": ended}, {"scored": 9}, {"allow_malformed": True}, {"held_out_windows": 3},
    ):  # fmt: skip
        assert tokenizes(**options), options
    write_jsonl(tmp_path / "d.jsonl", [record(f"Answer Number {i}.") for i in range(150)])  # of the same size
    assert tokenizes()


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


def test_a_cache_that_may_not_be_read_is_made_anew_and_one_that_memory_lacks_for_is_not(
    tmp_path: Path, records: Path, tokenizer, encoded: list, monkeypatch
) -> None:
    load(str(records), tokenizer, cache=tmp_path)
    for error, again in ((PermissionError(errno.EACCES, "Permission denied"), True), (MemoryError(), False)):
        del encoded[:]
        monkeypatch.setattr(data, "load_state", lambda *_, error=error: (_ for _ in ()).throw(error))
        with nullcontext() if again else pytest.raises(MemoryError):
            load(str(records), tokenizer, cache=tmp_path)
        assert bool(encoded) == again


def test_tokenizing_goes_on_where_it_was_stopped(
    tmp_path: Path, records: Path, tokenizer, encoded: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["oops", *records.read_text().splitlines()])
    options = {"train_windows": 1000, "length": 50, "allow_malformed": True}  # 50: tokens are left over at the stop
    whole = load(source, tokenizer, **options)
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
        load(source, tokenizer, **options, cache=tmp_path / "cache")
    rest = load(source, tokenizer, **options, cache=tmp_path / "cache")
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
