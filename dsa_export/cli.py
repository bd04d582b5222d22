"""What every command shares: one-line errors, exit codes, types of arguments, console and progress bars.

Exit codes: 0 done, 1 something was wrong with the input or the run, 2 wrong arguments (argparse).
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import platform
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsa_export import interrupt
from plugins import UnsupportedOnGPU


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # run() decides what it means; rich would exit with 1


console = _Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


FULL_DISK = (
    "No space left", "PytorchStreamWriter failed writing", "StorageFull", "unexpected pos ", "file write failed",
)  # fmt: skip
"""What the system, torch and safetensors say when a disk is full."""
OUT_OF_MEMORY = ("allocate memory", "tried to allocate", "out of memory", "ALLOC_FAILED", "bad_alloc")
"""What torch, CUDA and C++ say when memory runs out, of the processor or of a GPU."""


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, and also where Ctrl-C only ends an answer."""


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command's main and exits: errors that a user can cause end in one line, without a traceback."""
    interrupt.loaded()
    prepare_streams()
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(Terminated()))
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as reason:
        fail(str(reason) or interrupt.MESSAGE)
    except Exception as error:
        if not (isinstance(error, BrokenPipeError) and is_unread(sys.stdout.fileno())):
            message = user_message(error)
            if message is None:
                raise
            fail(message)
        # Who reads the output has seen enough, such as `head`. Python flushes it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def prepare_streams() -> None:
    """Lets a command run to its end where nobody listens, or in a locale that lacks characters that it prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_unread(output: int) -> bool:
    """Whether what is written to a file descriptor goes to a pipe or socket that nobody reads any more."""
    poll = select.poll()
    poll.register(output, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def user_message(error: Exception) -> str | None:
    """What to say of an error that a user can cause; None for an error of ours."""
    if isinstance(error, UserError | UnsupportedOnGPU):
        return str(error)
    if is_disk_full(error):
        # Of the two files of a copy the second is the one that is written.
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or "the output"
        return f"disk full while writing {where}: free some space and run the command again"
    if is_out_of_memory(error):
        return "out of memory: fewer tokens or rows at a time need less (docs/guide.md, When something fails)"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def is_disk_full(error: Exception) -> bool:
    """Whether an error tells of a full disk: the system's own, or what numpy, safetensors and torch make of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    short_write = isinstance(error, OSError) and error.errno is None and str(error).endswith("written")
    return short_write or says(error, FULL_DISK)  # the first is of ndarray.tofile


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error tells that memory ran out, of the processor or of a GPU, whichever library raised it."""
    return isinstance(error, MemoryError) or says(error, OUT_OF_MEMORY)


def says(error: BaseException, signs: Iterable[str]) -> bool:
    """Whether one of the signs stands in an error's message."""
    text = str(error)
    return any(sign in text for sign in signs)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and what it announces there with a colon; without a message, its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def fail(message: str) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(' '.join(message.split()))}")
    sys.exit(1)


def path(text: str) -> Path:
    """The type of an argument that is a file or folder. ~ is the home folder where the shell left it: in --out=~/x."""
    try:
        text.encode()  # safetensors, tokenizers and onnx take no other names
        given = Path(text).expanduser()
        given.resolve()
        return given
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: choose another name") from None
    except RuntimeError as error:  # there is no such user, or links lead in a circle
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def positive(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """The type of an argument that is a whole number of at least 0."""
    return _at_least(0, text)


def thread_count(text: str) -> int:
    """The type of an argument that is a number of threads: at most one for each processor that may be used."""
    if positive(text) > usable_cpus():
        raise argparse.ArgumentTypeError(f"{text} threads are more than the {usable_cpus()} processors here")
    return int(text)


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def progress_bar(*columns: str) -> Progress:
    """A progress bar with ETA; `columns` are extra task fields to show. Silent when the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn("{task.fields[" + name + "]}") for name in columns),
        console=console,
        disable=not console.is_terminal,
    )


def print_wide(shown: Iterable[RenderableType], width: int) -> None:
    """Prints tables as they are, without markup; into a pipe or file at their full width."""
    printer = Console(
        file=console.file, width=None if console.is_terminal else width, highlight=False, emoji=False, markup=False
    )
    for one in shown:
        printer.print(one)


def cpu_name() -> str:
    """The processor's name and the number of its cores that may be used."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found.group(1) if found else name
    return f"{name}, {usable_cpus()} core{'s' * (usable_cpus() > 1)}"
