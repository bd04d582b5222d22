"""python -m engines.generate: continues a prompt with an engine, and says how fast.

    python -m engines.generate --prompt "Write a haiku about sparse attention."
    python -m engines.generate --file article.txt --max-new-tokens 200
    git diff | python -m engines.generate --system "Summarise this change in one sentence."
    python -m engines.generate --chat --file article.txt

The answer goes to standard output as it appears, the figures to standard error. With --chat every further line of
standard input is a message that has all before it in view; only what is new is computed. Ctrl-C then ends an answer
early, and Ctrl-D the conversation.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dsa_export.cli import Terminated, UserError, errors, path, positive, progress_bar, run, thread_count
from dsa_export.files import read_text
from engines.sampling import Sampler, Sampling
from engines.session import Runner, Session, common_prefix, open_runner
from engines.text import Answer, Text

LONG_PROMPT = 2048
"""Tokens from which on a progress bar is shown while the prompt is read."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    message = None if args.chat and not (args.prompt or args.file) else read_prompt(args)
    runner = open_runner(args.engine, threads=args.threads)
    text = Text(runner.engine)
    speaker = Speaker(runner, text, args)
    if args.raw:
        speaker.answer(text.encode(message or ""))
    else:
        messages = [{"role": "system", "content": args.system}] if args.system else []
        message = message or next_message()
        while message is not None:
            messages.append({"role": "user", "content": message})
            messages.append({"role": "assistant", "content": speaker.answer(text.chat(messages))})
            message = next_message() if args.chat else None
    if runner.engine.random_indexer and runner.engine.variant == "sparse":
        trusted = max(min(runner.engine.topk), runner.engine.dense_slots)
        errors.print(f"The indexer is random: do not trust answers beyond {trusted} tokens of context")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m engines.generate", description=summary.partition(": ")[2], epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_engine_arguments(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to answer (default: standard input)")
    source.add_argument("--file", type=path, metavar="FILE", help="read the prompt from a UTF-8 file")
    add("--system", metavar="TEXT", help="a system message before the prompt")
    add("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    add("--chat", action="store_true", help="go on with a line of standard input as the next message, and so on")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=temperature, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--top-p", type=probability, default=1.0, metavar="P", help="nucleus sampling (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    args = parser.parse_args(argv)
    if args.raw and (args.system or args.chat):
        parser.error(f"{'--system' if args.system else '--chat'} needs the chat template: leave out --raw")
    if "" in args.stop:
        parser.error("--stop: an empty text would end every answer")
    return args


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What generate and serve share."""
    add = parser.add_argument
    add(
        "--engine", type=path, default=Path("out/engines/ort/sparse"), metavar="DIR",
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
        text = read_text(args.file) if args.file else read_standard_input()
    if not text:
        raise UserError("the prompt is empty: nothing to answer")
    return text


def read_standard_input() -> str:
    if sys.stdin.isatty():
        errors.print("Type the prompt; Ctrl-D ends it")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text (byte {error.start})") from None


def next_message() -> str | None:
    """The next line of standard input that says something; None at its end, or at Ctrl-C."""
    try:
        while not (line := input("> " if sys.stdin.isatty() else "").strip()):
            pass
        return line
    except Terminated:
        raise
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text (byte {error.start})") from None


class Speaker:
    """Answers prompts on a session; what a prompt has in common with the one before is not computed again."""

    def __init__(self, runner: Runner, text: Text, args: argparse.Namespace):
        self.session = Session(runner)
        self.text = text
        self.args = args
        self.sampler = Sampler(Sampling(args.temperature, args.top_p, args.seed))
        self.known: list[int] = []

    def answer(self, prompt: list[int]) -> str:
        """Writes the answer as it appears, and the figures after it; returns it. With --chat Ctrl-C ends it early."""
        limit = self.session.engine.limits.max_context
        if self.args.chat and len(prompt) > limit:
            raise UserError(
                f"the conversation is full: {len(prompt)} tokens, and this engine takes {limit}: begin a new one, or "
                "build the engine with a larger --max-context"
            )
        known = common_prefix(self.known, prompt)
        self.session.truncate(known)
        # The last token of an answer is shown, but need not fit into the caches.
        room = limit - len(prompt) + 1
        after = prompt if self.args.raw else []
        answer = Answer(self.text, max(1, min(self.args.max_new_tokens, room)), self.args.stop, after)
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            write(piece)

        try:
            seconds = stream(self.session, prompt[known:], answer, self.sampler, show)
        except KeyboardInterrupt as interrupt:
            write(" …\n")
            if isinstance(interrupt, Terminated):
                raise
            if not self.args.chat:
                raise KeyboardInterrupt("interrupted: the answer is not whole") from None
        else:
            write("\n")
            errors.print(figures(known, len(prompt) - known, len(answer.tokens), *seconds))
            if answer.finish_reason == "length" and room < self.args.max_new_tokens:
                errors.print(f"The context is full: this engine takes {limit} tokens (engines.build --max-context)")
        self.known = [*prompt, *answer.tokens][: int(self.session.lengths[0])]
        return "".join(shown)


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


def figures(known: int, prompt: int, new: int, prefill_seconds: float, decode_seconds: float) -> str:
    """known: tokens before the prompt's that were in the caches."""
    before = f"{known} known + " if known else ""
    decode = f", decode {(new - 1) / decode_seconds:.1f} tokens/s" if new > 1 else ""
    return (
        f"{before}{prompt} + {new} tokens; time to first token {prefill_seconds:.2f} s, "
        f"prefill {prompt / prefill_seconds:.1f} tokens/s{decode}; peak memory {peak_memory() / 2**20:,.0f} MiB"
    )


def peak_memory() -> int:
    """Bytes that this process held at most: resident memory, and what torch took on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak += torch.cuda.max_memory_allocated()
    return peak


if __name__ == "__main__":
    run(main)
