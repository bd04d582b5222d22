"""What every command shares: one-line errors, exit codes, console and progress bars.

Exit codes: 0 done, 1 something was wrong with the input or the run, 2 wrong arguments (argparse).
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, and what to do."""


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command's main and exits: errors that a user can cause end in one line, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as interrupt:
        fail(str(interrupt) or "interrupted; nothing half-written was kept")
    except Exception as error:
        if is_disk_full(error):
            where = getattr(error, "filename", None) or "the output"
            fail(f"disk full while writing {where}: free some space and run the command again")
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            fail(f"cannot write {error.filename}: {error.strerror}; choose another --out")
        raise
    sys.exit(0)


def is_disk_full(error: Exception) -> bool:
    """Whether an error tells of a full disk: the system's own, or what numpy, safetensors and torch make of it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    short_write = isinstance(error, OSError) and error.errno is None and text.endswith("written")  # ndarray.tofile
    return short_write or "No space left on device" in text or "PytorchStreamWriter failed writing" in text


def fail(message: str) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(' '.join(message.split()))}")
    sys.exit(1)


def progress_bar(*columns: str) -> Progress:
    """A progress bar with ETA; `columns` are extra task fields to show. Silent when the output is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn("{task.fields[" + name + "]}") for name in columns),
        console=console,
        disable=not console.is_terminal,
    )
