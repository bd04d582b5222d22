"""The C++ compiler, for the libraries that are built on the spot."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

# Static C++ runtime: a library then runs beside whatever runtime the host process brings.
LINK_FLAGS = ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined", "-Wl,-z,noexecstack")


class BuildFailed(Exception):
    """One line, or the compiler's own message."""


def compiler() -> list[str]:
    """The words of the command: g++, or what CXX says."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def run(command: Sequence[str]) -> None:
    """Raises BuildFailed if the command is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildFailed(f"{command[0]} not found: install a C++ compiler, or set CXX") from error
    except OSError as error:
        raise BuildFailed(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise BuildFailed(result.stderr.strip() or f"{command[0]} failed without a message")


def run_all(commands: Iterable[Sequence[str]], jobs: int | None = None) -> None:
    """Runs commands side by side, `jobs` at a time (None: one per processor)."""
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(run, commands))
