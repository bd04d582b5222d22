"""Running the commands in this process, as a shell would: exit code, standard output and error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_export.cli import run


def run_command(
    main: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(lambda: main(arguments))
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def one_line(error: str) -> str:
    """The message of a failed command; asserts that it is all that was said."""
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error.strip()


def copy_tree(source: Path, target: Path) -> Path:
    """A copy without hard links, to be damaged."""
    return Path(shutil.copytree(source, target))
