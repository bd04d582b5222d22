"""python -m engines.generate: continues a prompt with an engine, and says how fast.

    python -m engines.generate --prompt "Write a haiku about sparse attention."
    python -m engines.generate --file article.txt --max-new-tokens 200
    git diff | python -m engines.generate --system "Summarise this change in one sentence."

The answer goes to standard output as it appears, the figures to standard error.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dsa_export.cli import UserError, errors, positive, progress_bar, run, thread_count
from engines.sampling import Sampler, Sampling
from engines.session import Session, open_runner
from engines.text import Answer, Text

LONG_PROMPT = 2048
"""Tokens from which on a progress bar is shown while the prompt is read."""


def main() -> None:
    args = parse_arguments()
    prompt_text = read_prompt(args)
    runner = open_runner(args.engine, threads=args.threads)
    text = Text(runner.engine)
    prompt = text.encode(prompt_text) if args.raw else text.chat(conversation(args.system, prompt_text))
    session = Session(runner)
    # The last token of an answer is shown, but need not fit into the caches.
    room = runner.engine.limits.max_context - len(prompt) + 1
    answer = Answer(text, max(1, min(args.max_new_tokens, room)), args.stop)
    sampler = Sampler(Sampling(args.temperature, args.top_p, args.seed))
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    prefill_seconds, decode_seconds = stream(session, prompt, answer, sampler, write)
    write("\n")
    errors.print(figures(len(prompt), len(answer.tokens), prefill_seconds, decode_seconds))
    if runner.engine.random_indexer and runner.engine.variant == "sparse":
        errors.print(f"The indexer is random: do not trust answers beyond {min(runner.engine.topk)} tokens of context")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m engines.generate", description=summary.partition(": ")[2], epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_engine_arguments(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to answer (default: standard input)")
    source.add_argument("--file", type=Path, metavar="FILE", help="read the prompt from a UTF-8 file")
    add("--system", metavar="TEXT", help="a system message before the prompt")
    add("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=temperature, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--top-p", type=probability, default=1.0, metavar="P", help="nucleus sampling (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    args = parser.parse_args(arguments)
    if args.raw and args.system:
        parser.error("--system needs the chat template: leave out --raw")
    if "" in args.stop:
        parser.error("--stop: an empty text would end every answer")
    return args


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What generate and serve share."""
    add = parser.add_argument
    add(
        "--engine", type=Path, default=Path("out/engines/ort/sparse"), metavar="DIR",
        help="an engine folder written by engines.build (default: %(default)s)",
    )  # fmt: skip
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: all that may be used)")


def temperature(value: str) -> float:
    if not 0 <= float(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a temperature: 0 or more")
    return float(value)


def probability(value: str) -> float:
    if not 0 < float(value) <= 1:
        raise argparse.ArgumentTypeError(f"{value} does not lie between 0 and 1")
    return float(value)


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt's text. Raises UserError if it is empty, or if the file cannot be read as UTF-8."""
    text = args.prompt
    if text is None:
        if not args.file and sys.stdin.isatty():
            errors.print("Type the prompt; Ctrl-D ends it")
        try:
            data = args.file.read_bytes() if args.file else sys.stdin.buffer.read()
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{args.file or 'standard input'} is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise UserError("the prompt is empty: nothing to answer")
    return text


def conversation(system: str | None, prompt: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def stream(
    session: Session, prompt: list[int], answer: Answer, sampler: Sampler, show: Callable[[str], object]
) -> tuple[float, float]:
    """Generates until the answer ends; returns the seconds up to its first token, and from there to its last."""
    start = time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("reading the prompt", total=len(prompt), visible=len(prompt) >= LONG_PROMPT)
        logits = session.prefill([prompt], lambda tokens: progress.advance(task, tokens))
    show(answer.push(sampler(logits[0])))
    first = time.perf_counter()
    while not answer.finish_reason:
        logits = session.decode([answer.tokens[-1]])
        show(answer.push(sampler(logits[0])))
    return first - start, time.perf_counter() - first


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def figures(prompt: int, new: int, prefill_seconds: float, decode_seconds: float) -> str:
    decode = f", decode {(new - 1) / decode_seconds:.1f} tokens/s" if new > 1 else ""
    return (
        f"{prompt} + {new} tokens; time to first token {prefill_seconds:.2f} s, "
        f"prefill {prompt / prefill_seconds:.1f} tokens/s{decode}; peak memory {peak_memory() / 2**20:,.0f} MiB"
    )


def peak_memory() -> int:
    """Bytes that this process held at most: resident memory, and a GPU's if torch or TensorRT used one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated()
    return peak


if __name__ == "__main__":
    run(main)
