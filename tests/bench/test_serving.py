"""bench/serving.py against a real server of a small engine, on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import serving
from engines.session import Runner
from tests.engines.commands import one_line, run_command
from tests.engines.test_serve import serving as server


def test_several_clients(runners: dict[str, Runner], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serving.jsonl"
    with server(runners["sparse"], endless=True) as client:
        options = ["--clients", "1", "3", "--requests", "2", "--prompt-characters", "60", "--max-tokens", "5"]
        code, output, error = run_command(
            serving.main, ["--url", str(client.base_url), "--out", str(out), *options], capsys
        )
    assert code == 0, error
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["clients"], r["requests"], r["new_tokens"]) for r in records] == [(1, 2, 10), (3, 6, 30)]
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(record["new_tokens"] / record["seconds"])
        assert 0 < record["answer_s"] <= record["seconds"]
    assert str(out) in output


def test_no_server_and_too_long_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--url", "http://127.0.0.1:9"], "is `python -m engines.serve` running?"),
        (["--prompt-characters", "100000000"], "0 modules have 100000000 characters, 8 are needed"),
    ):
        code, _, error = run_command(serving.main, [*options, "--out", str(tmp_path / "none")], capsys)
        assert code == 1 and message in one_line(error)
    assert not (tmp_path / "none").exists()
