"""Ctrl-C while a command is still loading its libraries, which takes seconds: one line, as later from cli.run()."""

from __future__ import annotations

import os
import signal
import sys

MESSAGE = "interrupted; nothing half-written was kept"


def expect(is_command: bool | None = None) -> None:
    """Ends this process at once on SIGINT, until cli.run() takes over.

    is_command: whether this process is a command of ours; None: whether Python is looking for the module of `-m`, as it
    does while it imports the package around it. Another program that imports us is left alone.
    """
    if is_command is None:
        is_command = sys.argv[:1] == ["-m"]
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background job ignores it
    if is_command and is_heard:
        signal.signal(signal.SIGINT, _end)


def loaded() -> None:
    """From here on SIGINT raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(sys.stderr.fileno(), f"error: {MESSAGE}\n".encode())
    os._exit(1)
