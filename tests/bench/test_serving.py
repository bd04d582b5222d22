"""bench/serving.py against a real server of a small engine, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench import serving
from engines.session import Runner
from tests.engines.commands import one_line, run_command
from tests.engines.test_serve import serving as server


def test_several_clients(runners: dict[str, Runner], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "serving.jsonl"
    with server(runners["sparse"], endless=True) as client:
        options = ["--clients", "3", "3", "--requests", "2", "--prompt-characters", "60", "--max-tokens", "5"]
        code, output, error = run_command(
            serving.main, ["--url", f"{client.base_url}/v1", "--out", str(out), *options], capsys
        )
    assert code == 0, error
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["clients"], r["answers"], r["new_tokens"]) for r in records] == [(3, 6, 30)] * 2
    for record in records:
        assert record["tokens_per_s"] == pytest.approx(record["new_tokens"] / record["seconds"])
        assert 0 < record["answer_s"][0] <= record["seconds"]
        assert record["cached_tokens"] == 0  # texts of their own, run by run
    assert str(out) in output


def test_conversations(runners: dict[str, Runner], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every turn finds the ones before it computed, but for what of the answer becomes other tokens as a text."""
    out = tmp_path / "serving.jsonl"
    with server(runners["sparse"]) as client:
        options = ["--clients", "2", "--requests", "1", "--prompt-characters", "200", "--max-tokens", "1"]
        options += ["--turns", "3", "--url", str(client.base_url), "--out", str(out)]
        assert run_command(serving.main, options, capsys)[0] == 0
    record = json.loads(out.read_text())
    assert record["answers"] == 6 and len(record["answer_s"]) == 3
    assert 2 * (230 + 270) < record["cached_tokens"] < record["prompt_tokens"] - 2 * 200


def test_no_server_and_too_long_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--url", "http://127.0.0.1:9"], "is `python -m engines.serve` running?"),
        (["--url", f"http://{'a' * 64}"], "is `python -m engines.serve` running?"),  # no host's name is so long
        (["--prompt-characters", "100000000"], "0 modules have 100000000 characters, 8 are needed"),
    ):
        code, _, error = run_command(serving.main, [*options, "--out", str(tmp_path / "none")], capsys)
        assert code == 1 and message in one_line(error)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("url", ["http://[::", "127.0.0.1:8000", "localhost:8000", "ftp://127.0.0.1", "http://", ""])
def test_what_is_no_address(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run_command(serving.main, ["--url", url, "--out", str(tmp_path / "none")], capsys)
    assert code == 1 and f"--url {url!r} is no address of a server" in one_line(error)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """The address of a server that gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    "status, body, message",
    [
        (200, b"<html>\n<p>hello", "answers without a text or a count of tokens: '<html>"),
        (200, b"\xff\x00", "answers without a text or a count of tokens"),
        (200, b'{"choices": []}', "answers without a text or a count of tokens: '{\"choices\": []}'"),
        (200, b'{"usage": null}', "answers without a text or a count of tokens"),
        (
            200,
            b'{"usage": {"prompt_tokens": 1, "completion_tokens": "many"}}',
            "answers without a text or a count of tokens",
        ),
        (200, b"[1]", "answers without a text or a count of tokens"),
        (404, b"no such\npage", "answers 404 Not Found: no such page; is --url"),
        (503, b"", "answers 503 Service Unavailable"),
    ],
)
def test_answers_of_other_servers(
    status: int, body: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body) as url:
        code, _, error = run_command(serving.main, ["--url", url, "--out", str(tmp_path / "none")], capsys)
    assert code == 1 and f"{url} {message}" in one_line(error).replace(f"{url}/", url)


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is measured: there is no server."""
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "below", "is a file")):
        code, _, error = run_command(serving.main, ["--out", str(out)], capsys)
        assert code == 1 and message in one_line(error)
