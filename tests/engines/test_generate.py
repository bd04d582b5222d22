"""python -m engines.generate, and answers as they grow: what is shown, when it ends, what is refused."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dsa_export.cli import Terminated, UserError
from dsa_export.files import MANIFEST
from engines import build, generate
from engines.artifacts import open_engine
from engines.sampling import Sampling
from engines.session import Session, open_runner
from engines.text import Answer, Text, longest_beginning
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def text(engines: Path) -> Text:
    return Text(open_engine(engines / "ort" / "sparse"))


def pieces(
    text: Text, tokens: list[int], stop: tuple[str, ...] = (), limit: int = 1000, after: Sequence[int] = ()
) -> list[str]:
    answer = Answer(text, limit, stop, after)
    shown = []
    for token in tokens:
        shown.append(answer.push(token))
        if answer.finish_reason:
            break
    return shown


# Answers


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30))
@example("\ufffd")
@example("a\ufffd\ufffd")
@settings(deadline=None)
def test_streamed_text_is_the_text_and_no_character_is_split(text: Text, original: str):
    tokens = text.encode(original)
    shown = pieces(text, [*tokens, toy.END_OF_TEXT])
    assert "".join(shown) == original
    assert original.count("\ufffd") == "".join(shown).count("\ufffd")


def test_a_replacement_character_at_the_end_is_a_character(text: Text):
    """Of a text, of a stop string; half of it is none."""
    *most, last = text.encode("a\ufffd")
    assert "".join(pieces(text, [*most, last, toy.END_OF_TEXT])) == "a\ufffd"
    assert "".join(pieces(text, [*most, last], limit=len(most) + 1)) == "a\ufffd"
    assert "".join(pieces(text, [*most, last, toy.END_OF_TEXT], ("\ufffd",))) == "a"
    assert "".join(pieces(text, [*text.encode("b"), *most, last, toy.END_OF_TEXT], ("a\ufffd",))) == "b"
    assert "".join(pieces(text, [*most, toy.END_OF_TEXT])) == "a"


def test_half_a_character_is_held_back(text: Text):
    tokens = text.encode("a😀b")
    assert len(tokens) == 6
    assert pieces(text, tokens) == ["a", "", "", "", "😀", "b"]


def test_any_tokens_can_be_shown(text: Text):
    tokens = np.random.default_rng(0).integers(0, toy.END_OF_TEXT, 500).tolist()
    assert "".join(pieces(text, tokens))


@given(st.lists(st.integers(0, 258), min_size=1, max_size=15))
@settings(deadline=None)
def test_any_tokens_of_a_tokenizer_with_byte_fallback_can_be_shown(tokens: list[int]):
    """As Llama 2 and Mistral have: bytes that make no character change what stands before them."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁word": 256, "b": 257, "中": 258}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    fallback = cast(Text, SimpleNamespace(backend=backend, end_tokens=frozenset()))
    pieces(fallback, [10, 0xE4, 256, *tokens])
    assert "".join(pieces(fallback, [256, 257])) == "wordb"
    assert "".join(pieces(fallback, [256, 257], after=[257, 257])) == " wordb"
    assert "".join(pieces(fallback, [0xB8, 0xAD, 257], after=[257, 0xE4])) == "\ufffd\ufffdb"
    assert "".join(pieces(fallback, [257, 0xE4, 0xB8, 0xAD, 258])) == "b中中"


def test_a_stop_string_is_never_shown_not_even_its_beginning(text: Text):
    shown = pieces(text, text.encode("one\nEND two"), stop=("\nEND", "x"))
    assert "".join(shown) == "one"
    shown = pieces(text, text.encode("one\nEN two"), stop=("\nEND",))
    assert "".join(shown) == "one\nEN two"


@given(st.text("ab", min_size=1, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None)
def test_stop_strings_cut_where_a_search_would(text: Text, original: str, stop: list[str]):
    """The stop string that is complete first ends the answer; of those complete at once, the longest."""
    expected = original
    for length in range(1, len(original) + 1):
        if complete := [s for s in stop if original[:length].endswith(s)]:
            expected = original[: length - max(map(len, complete))]
            break
    assert "".join(pieces(text, [*text.encode(original), toy.END_OF_TEXT], tuple(stop))) == expected


def test_longest_beginning():
    assert longest_beginning("abc", ("cde",)) == 1
    assert longest_beginning("abcd", ("cde", "bcdx")) == 3
    assert longest_beginning("abc", ("x",)) == 0
    assert longest_beginning("", ("ab",)) == 0
    assert longest_beginning("abc", ()) == 0


def test_an_answer_ends_for_a_reason(text: Text):
    answer = Answer(text, 2)
    answer.push(70)
    assert answer.finish_reason is None
    answer.push(70)
    assert answer.finish_reason == "length"
    answer = Answer(text, 2)
    assert answer.push(toy.END_OF_TEXT) == ""
    assert answer.finish_reason == "stop"


def test_a_prompt_begins_as_its_tokenizer_begins_texts(engines: Path, tmp_path: Path):
    """Llama's adds a token; a conversation has it from the chat template, and a prompt may spell it out."""
    engine = open_engine(engines / "ort" / "dense")
    folder = copy_tree(engine.folder, tmp_path / "dense")
    path = folder / "tokenizer.json"
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [toy.END_OF_TEXT], "tokens": ["<|endoftext|>"]}}
    template = {"type": "TemplateProcessing", "special_tokens": special, "pair": []}
    template["single"] = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
    text, plain = Text(replace(engine, folder=folder)), Text(engine)
    assert text.encode("abc") == [toy.END_OF_TEXT, *plain.encode("abc")] == text.encode("<|endoftext|>abc")
    messages = [{"role": "user", "content": "abc"}]
    assert text.chat(messages) == plain.chat(messages)
    with pytest.raises(UserError, match="the prompt is empty"):
        text.encode("")


# The command


def test_the_answer_is_streamed_and_measured(engines: Path, capsys):
    options = ["--engine", str(engines / "ort/sparse"), "--prompt", "abc", "--max-new-tokens", "9", "--raw"]
    code, output, error = run_command(generate.main, options, capsys)
    assert code == 0
    runner = open_runner(engines / "ort" / "sparse")
    text = Text(runner.engine)
    (tokens,) = Session(runner).generate([text.encode("abc")], 9)
    assert output == "".join(pieces(text, tokens, limit=9)) + "\n"
    for figure in (f"3 + {len(tokens)} tokens", "time to first token", "prefill", "decode", "tokens/s", "peak memory"):
        assert figure in error


@pytest.mark.parametrize(("topk", "slots", "trusted"), [(16, [], 16), ([8, 24], [], 8), ([8, 24], ["64"], 64)])
def test_a_random_indexer_is_trusted_up_to_the_least_k(tmp_path: Path, capsys, topk, slots: list[str], trusted: int):
    """Or up to --dense-slots, where there is no selection."""
    export = toy.write_export(tmp_path / "onnx", topk=topk)
    manifest = json.loads((export / MANIFEST).read_text())
    (export / MANIFEST).write_text(json.dumps(manifest | {"random_indexer": True}))
    options = ["--onnx", str(export), "--out", str(tmp_path), *(["--dense-slots", *slots] if slots else [])]
    build.build("ort", build.parse_arguments(options))
    for variant, is_told in (("sparse", True), ("dense", False)):
        options = ["--engine", str(tmp_path / "ort" / variant), "--raw", "--prompt", "x", "--max-new-tokens", "1"]
        code, _, error = run_command(generate.main, options, capsys)
        told = f"The indexer is random: do not trust answers beyond {trusted} tokens" in " ".join(error.split())
        assert code == 0 and told == is_told


def test_sampling_stop_strings_and_threads_are_those_of_the_command(engines: Path, capsys, monkeypatch):
    options = ["--engine", str(engines / "ort/sparse"), "--prompt", "abc", "--max-new-tokens", "30", "--raw"]
    options += ["--threads", "1"]
    runner = open_runner(engines / "ort" / "sparse")
    opened = []
    monkeypatch.setattr(generate, "open_runner", lambda _, threads: opened.append(threads) or runner)
    text = Text(runner.engine)
    (tokens,) = Session(runner).generate([text.encode("abc")], 30, sampling=Sampling(1.5, 0.6, 3))
    sampled = ["--temperature", "1.5", "--top-p", "0.6", "--seed", "3"]
    whole = "".join(pieces(text, tokens, limit=30))
    assert run_command(generate.main, [*options, *sampled], capsys)[1] == whole + "\n"
    stop = whole[5:7]
    cut = run_command(generate.main, [*options, *sampled, "--stop", "never", "--stop", stop], capsys)[1]
    assert cut == whole[: whole.index(stop)] + "\n" and opened == [1, 1]


def test_figures_are_tokens_per_second():
    said = generate.figures(known=0, prompt=6, new=5, prefill_seconds=2.0, decode_seconds=0.5)
    assert "6 + 5 tokens; time to first token 2.00 s, prefill 3.0 tokens/s, decode 8.0 tokens/s" in said
    said = generate.figures(known=4, prompt=6, new=1, prefill_seconds=2.0, decode_seconds=0.5)
    assert said.startswith("4 known + 6 + 1 tokens; time to first token 2.00 s, prefill 3.0 tokens/s; peak"), (
        "what was known was not computed"
    )


def test_a_temperature_of_zero_may_be_asked_for():
    assert generate.parse_arguments(["--temperature", "0"]).temperature == 0


def test_the_chat_template_is_applied(engines: Path, capsys, monkeypatch):
    seen = []
    original = Session.prefill
    monkeypatch.setattr(
        Session, "prefill", lambda self, rows, *rest: (seen.extend(rows), original(self, rows, *rest))[1]
    )
    options = [
        "--engine",
        str(engines / "ort/dense"),
        "--prompt",
        "Hi",
        "--system",
        "Be brief",
        "--max-new-tokens",
        "1",
    ]
    assert run_command(generate.main, options, capsys)[0] == 0
    text = Text(open_engine(engines / "ort/dense"))
    assert list(seen[0]) == text.encode("system: Be brief\nuser: Hi\nassistant: ")


def test_the_prompt_comes_from_a_file_or_standard_input(engines: Path, tmp_path: Path, capsys, monkeypatch):
    options = ["--engine", str(engines / "ort/dense"), "--max-new-tokens", "4"]
    (tmp_path / "prompt.txt").write_text("häl", encoding="utf-8")
    from_file = run_command(generate.main, [*options, "--file", str(tmp_path / "prompt.txt")], capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("häl".encode())))
    from_stdin = run_command(generate.main, options, capsys)
    assert from_file[:2] == from_stdin[:2] == run_command(generate.main, [*options, "--prompt", "häl"], capsys)[:2]


def conversation(engines: Path, lines: str, capsys, monkeypatch, *options: str) -> tuple[list[str], str]:
    """The answers to the lines of standard input, and what is said beside them."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    answers: list[str] = []
    original = generate.Speaker.answer
    monkeypatch.setattr(
        generate.Speaker, "answer", lambda self, prompt: (answers.append(original(self, prompt)), answers[-1])[1]
    )
    command = ["--engine", str(engines / "ort/sparse"), "--chat", "--max-new-tokens", "9", *options]
    code, output, error = run_command(generate.main, command, capsys)
    assert code == 0
    assert output == "".join(answer + "\n" for answer in answers)
    return answers, error


def test_a_conversation_computes_what_is_new(engines: Path, capsys, monkeypatch):
    """Every answer is the one that the whole conversation gets from an engine that knows nothing of it."""
    answers, error = conversation(engines, "Hi\n\n  what? \nbye", capsys, monkeypatch, "--system", "Be brief")
    session = Session(open_runner(engines / "ort" / "sparse"))
    text, messages = Text(session.engine), [{"role": "system", "content": "Be brief"}]
    for message, answer in zip(("Hi", "what?", "bye"), answers, strict=True):
        messages.append({"role": "user", "content": message})
        prompt = text.chat(messages)
        session.truncate(0)
        (tokens,) = session.generate([prompt], 9)
        assert answer == "".join(pieces(text, tokens, limit=9))
        messages.append({"role": "assistant", "content": answer})
    figures = re.findall(r"(?:(\d+) known \+ )?(\d+) \+ \d+ tokens;", error)
    assert len(figures) == 3 and figures[0][0] == ""
    for known, new in figures[1:]:
        assert int(known) >= len("system: Be brief\nuser: Hi\nassistant: ") and int(new) < 50


def test_a_conversation_begins_with_a_file(engines: Path, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "article").write_text("x" * 300)
    answers, error = conversation(engines, "why?", capsys, monkeypatch, "--file", str(tmp_path / "article"))
    assert len(answers) == 2 and re.search(r"3\d\d known \+ \d\d \+", error)


def test_a_full_conversation_is_told_so(engines: Path, capsys, monkeypatch):
    long = "x" * open_runner(engines / "ort" / "sparse").engine.limits.max_context
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"Hi\n{long}\n".encode())))
    command = ["--engine", str(engines / "ort/sparse"), "--chat", "--max-new-tokens", "9"]
    code, _, error = run_command(generate.main, command, capsys)
    assert code == 1 and "the conversation is full" in error


def test_an_interrupt_ends_an_answer_and_not_the_conversation(engines: Path, capsys, monkeypatch):
    original, calls = Session.decode, []

    def decode(self: Session, tokens: list[int]) -> np.ndarray:
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, tokens)

    monkeypatch.setattr(Session, "decode", decode)
    monkeypatch.setattr(Text, "__init__", endless(Text.__init__))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nbye\n")))
    command = ["--engine", str(engines / "ort/sparse"), "--chat", "--max-new-tokens", "9"]
    code, output, error = run_command(generate.main, command, capsys)
    assert code == 0 and " …\n" in output and len(calls) == 4 + 8
    assert error.count("time to first token") == 1


def test_an_interrupted_answer_says_that_it_is_not_whole(engines: Path, capsys, monkeypatch):
    monkeypatch.setattr(Session, "decode", lambda *_: raise_error(KeyboardInterrupt()))
    monkeypatch.setattr(Text, "__init__", endless(Text.__init__))
    command = ["--engine", str(engines / "ort/sparse"), "--prompt", "Hi"]
    code, output, error = run_command(generate.main, command, capsys)
    assert code == 1 and output.endswith(" …\n")
    assert one_line(error) == "error: interrupted: the answer is not whole"


def test_a_full_context_is_said(engines: Path, capsys, monkeypatch):
    monkeypatch.setattr(Text, "__init__", endless(Text.__init__))
    limit = open_engine(engines / "ort/sparse").limits.max_context
    for tokens, full in ((limit, True), (2, False)):
        command = ["--engine", str(engines / "ort/sparse"), "--prompt", "Hi", "--max-new-tokens", str(tokens)]
        code, _, error = run_command(generate.main, command, capsys)
        assert code == 0 and (f"The context is full: this engine takes {limit} tokens" in error) == full


def test_a_termination_ends_the_conversation(engines: Path, capsys, monkeypatch):
    monkeypatch.setattr(Session, "prefill", lambda *_: raise_error(Terminated()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\nbye\n")))
    code, _, error = run_command(generate.main, ["--engine", str(engines / "ort/sparse"), "--chat"], capsys)
    assert code == 1 and "interrupted" in one_line(error)


def raise_error(error: BaseException) -> None:
    raise error


def endless(init: Any) -> Any:
    """Text whose end tokens end nothing."""

    def without_end(self: Text, engine: Any) -> None:
        init(self, engine)
        self.end_tokens = frozenset()

    return without_end


def refusal(options: list[str], capsys) -> str:
    code, _, error = run_command(generate.main, options, capsys)
    assert code == 1
    return one_line(error)


def test_bad_prompts_end_in_one_line(engines: Path, tmp_path: Path, capsys):
    engine = ["--engine", str(engines / "ort/sparse")]
    (tmp_path / "latin1").write_bytes("häl".encode("latin-1"))
    assert "is not UTF-8 text (byte 1)" in refusal([*engine, "--file", str(tmp_path / "latin1")], capsys)
    assert "missing cannot be read as text: No such file" in refusal(
        [*engine, "--file", str(tmp_path / "missing")], capsys
    )
    assert "the prompt is empty" in refusal([*engine, "--prompt", ""], capsys)
    assert "not valid Unicode at character 1" in refusal([*engine, "--prompt", "a\udcff", "--raw"], capsys)
    long = "x" * (toy.MAX_POSITIONS + 1)
    assert "4097 tokens do not fit into 4096" in refusal([*engine, "--prompt", long, "--raw"], capsys)


def test_an_answer_ends_where_the_engine_ends(engines: Path, capsys):
    options = ["--engine", str(engines / "ort/dense"), "--raw", "--prompt", "x" * (toy.MAX_POSITIONS - 2)]
    code, _, error = run_command(generate.main, options, capsys)
    assert code == 0
    assert "4094 + 3 tokens" in error


def test_an_engine_without_tokenizer_or_template(engines: Path, tmp_path: Path, capsys):
    folder = copy_tree(engines / "ort" / "dense", tmp_path / "engines" / "ort" / "dense")
    (folder / "chat_template.jinja").unlink()
    message = refusal(["--engine", str(folder), "--prompt", "x"], capsys)
    assert "chat_template.jinja is missing: run `python -m engines.build" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--max-new-tokens", "0"],
        ["--stop", ""],
        ["--raw", "--system", "x"],
        ["--raw", "--chat"],
    ],
)
def test_wrong_arguments_exit_with_2(options: list[str], capsys):
    assert run_command(generate.main, options, capsys)[0] == 2


def test_a_reader_that_leaves_ends_the_command_quietly(engines: Path):
    command = [
        sys.executable,
        "-m",
        "engines.generate",
        "--engine",
        str(engines / "ort/dense"),
        "--raw",
        "--prompt",
        "x",
    ]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "4000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait(60) == 0
    process.stderr.close()


def test_a_prompt_needs_text_not_surrogates(text: Text):
    with pytest.raises(UserError, match="not valid Unicode"):
        text.encode("\ud83e")
    with pytest.raises(UserError, match="template refuses these messages: unknown role tool"):
        text.chat([{"role": "tool", "content": "x"}])


def test_a_conversation_that_holds_the_whole_answer_computes_its_last_token(engines: Path, capsys):
    """It was shown, but is not in the caches."""
    runner = open_runner(engines / "ort" / "sparse")
    speaker = generate.Speaker(runner, Text(runner.engine), generate.parse_arguments(["--max-new-tokens", "3"]))
    prompt = [1, 2, 3]
    (answered,) = Session(runner).generate([prompt], 3)
    speaker.answer(prompt)
    speaker.answer([*prompt, *answered, 4, 5])
    assert "5 known + 3 + " in capsys.readouterr().err


def test_the_guides_example_in_python(engines: Path, capsys: pytest.CaptureFixture[str]):
    guide = (Path(__file__).parents[2] / "docs/guide.md").read_text()
    (block,) = re.findall(r"\*\*From Python\*\*.*?\n\n((?:    .*\n|\n)+)", guide)
    code = textwrap.dedent(block).replace("out/qwen-engines/ort/sparse", str(engines / "ort/sparse"))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert len(scope["prompts"]) == 2 and 0 < len(scope["answer"]) <= 64
    assert capsys.readouterr().out.endswith(scope["text"].backend.decode(scope["answer"]) + "\n")
