"""What a running server gives several clients at once: tokens per second of all, and how long an answer takes.

    python -m engines.serve --engine out/engines/ort/sparse --port 8000
    python -m bench.serving --url http://127.0.0.1:8000 [--clients 1 2 4 8] [--prompt-characters 2000] [--max-tokens 64]

Every client sends its requests one after the other, each with a text of its own (the standard library), greedy. With
--turns a request becomes a conversation about its text: the next prompts are the text so far, the answer and a further
line. One JSON line per number of clients goes to --out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from bench.prompts import modules
from dsa_export.cli import UserError, console, cpu_name, path, positive, run
from dsa_export.files import check_output_file, write_lines

TIMEOUT = 600  # seconds of one answer


def texts(count: int, characters: int) -> list[str]:
    """Beginnings of different modules of the standard library."""
    found = [text[:characters] for text in modules() if len(text) >= characters][:count]
    if len(found) < count:
        raise UserError(
            f"{len(found)} modules have {characters} characters, {count} are needed: fewer clients or requests, or "
            "shorter prompts"
        )
    return found


def connect(url: str) -> httpx.Client:
    """A client of a server; the address may end in /v1. Raises UserError if `url` is no address of one."""
    try:
        address = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise UserError(f"--url {url!r} is no address of a server: write it like http://127.0.0.1:8000")
    return httpx.Client(base_url=address, timeout=TIMEOUT)


@dataclass(frozen=True)
class Answer:
    """What one completion took. cached: tokens of the prompt that the server had computed before."""

    text: str
    prompt: int
    cached: int
    new: int
    seconds: float


def answer(client: httpx.Client, prompt: str, max_tokens: int) -> Answer:
    """One completion. Raises UserError unless the server gives one."""
    start = time.perf_counter()
    try:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        response = client.post("/v1/completions", json=body)
    except (httpx.HTTPError, UnicodeError) as error:  # the second of a name that is no host's
        raise UserError(f"no answer from {client.base_url}: {error}; is `python -m engines.serve` running?") from None
    seconds = time.perf_counter() - start
    if response.status_code != httpx.codes.OK:
        said = f"{response.status_code} {response.reason_phrase}: {response.text[:300]}"
        raise UserError(f"{client.base_url} answers {said}; is --url what `python -m engines.serve` printed?")
    try:
        content = response.json()
        text, usage = str(content["choices"][0]["text"]), content["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0  # not every server tells
        return Answer(text, int(usage["prompt_tokens"]), int(cached), int(usage["completion_tokens"]), seconds)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError(
            f"{client.base_url} answers without a text or a count of tokens: {response.text[:300]!r}; is --url what "
            "`python -m engines.serve` printed?"
        ) from None


def converse(client: httpx.Client, text: str, turns: int, max_tokens: int) -> list[Answer]:
    """The answers to a text and to what follows from each of them."""
    answers = []
    for turn in range(turns):
        answers.append(answer(client, text, max_tokens))
        text += f"{answers[-1].text}\n\n# {turn + 2}. And what does the following do?\n"
    return answers


def measure(
    client: httpx.Client, clients: int, requests: int, turns: int, prompts: Sequence[str], max_tokens: int
) -> dict[str, Any]:
    """`clients` at once, `requests` conversations of each, whose texts begin as none that a server has seen."""
    unseen = uuid.uuid4().hex

    def one(number: int) -> list[list[Answer]]:
        own = range(number * requests, (number + 1) * requests)
        return [converse(client, f"# {i} {unseen}\n{prompts[i]}", turns, max_tokens) for i in own]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        conversations = [conversation for of_one in pool.map(one, range(clients)) for conversation in of_one]
    wall = time.perf_counter() - start
    answers = [answer for conversation in conversations for answer in conversation]
    new = sum(answer.new for answer in answers)
    return {
        "clients": clients,
        "answers": len(answers),
        "prompt_tokens": sum(answer.prompt for answer in answers),
        "cached_tokens": sum(answer.cached for answer in answers),
        "new_tokens": new,
        "seconds": wall,
        "tokens_per_s": new / wall,
        "answer_s": [statistics.median(turn.seconds for turn in same) for same in zip(*conversations, strict=True)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server")
    add("--clients", type=positive, nargs="+", default=[1, 2, 4], metavar="N", help="clients at once")
    add("--requests", type=positive, default=2, metavar="N", help="of each client")
    add("--turns", type=positive, default=1, metavar="N", help="prompts of each request, each with all before it")
    add("--prompt-characters", type=positive, default=2000, metavar="N", help="length of the prompts")
    add("--max-tokens", type=positive, default=64, metavar="N", help="new tokens of each answer")
    add("--out", type=path, default=Path("out/bench/serving.jsonl"), help="JSON lines")
    args = parser.parse_args(argv)
    check_output_file(args.out)
    prompts = texts(max(args.clients) * args.requests, args.prompt_characters)
    counts = ("clients", "answers", "prompt_tokens", "cached_tokens", "new_tokens")
    table = Table(*(name.replace("_", " ") for name in counts), "tokens/s of all", "seconds of an answer, by turn")
    records = []
    with connect(args.url) as client:
        answer(client, prompts[0], 1)
        for clients in args.clients:
            record = measure(client, clients, args.requests, args.turns, prompts, args.max_tokens)
            records.append(record | {"url": args.url, "machine": cpu_name()})
            seconds = ", ".join(f"{seconds:.2f}" for seconds in record["answer_s"])
            table.add_row(*(f"{record[name]:,}" for name in counts), f"{record['tokens_per_s']:.1f}", seconds)
    write_lines(args.out, records)
    console.print(table)
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
