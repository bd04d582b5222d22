"""What a user sees of a reader that leaves and of a disk that is full while a file is copied."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import pytest

from dsa_export.cli import console, path, user_message


@pytest.mark.parametrize("call", ["print(i)", "print(i, flush=True)", "console.print(i)"])
def test_a_reader_that_has_seen_enough_is_no_error(call: str):
    script = f"from dsa_export.cli import console, run; run(lambda: [{call} for i in range(100_000)])"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_another_broken_pipe_is_an_error():
    """Of a child process or a connection, while the output is read on."""
    script = "from dsa_export.cli import run; run(lambda: (_ for _ in ()).throw(BrokenPipeError(32, 'Broken pipe')))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1 and "BrokenPipeError" in result.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_ends_well_where_a_standard_stream_is_closed(closed: str):
    script = "import sys; from dsa_export.cli import *; run(lambda: [console.print('a'), print(sys.stdin.read())])"
    result = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script], capture_output=True)
    assert result.returncode == 0 and result.stderr == b""


def test_what_a_locale_cannot_show_ends_no_command():
    script = "from dsa_export.cli import *; run(lambda: [console.print('2 × 3', chr(0xDCFF)), print('2 × 3')])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (result.returncode, result.stdout) == (0, b"2 ? 3 ?\n2 ? 3\n")


def test_a_name_that_the_libraries_cannot_write_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8"):
        path("out/\udcff")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="pathlib resolves such links, and what opens them says so")
def test_links_that_lead_in_a_circle_are_a_wrong_argument(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("link", "link/out"):
        with pytest.raises(argparse.ArgumentTypeError, match="Symlink loop"):
            path(str(tmp_path / name))


def test_a_name_in_brackets_is_printed_as_it_is(capsys):
    console.print("wrote out/a[b]/[/c]")
    assert capsys.readouterr().out == "wrote out/a[b]/[/c]\n"


def test_a_full_disk_names_the_copy_and_not_its_source():
    error = OSError(errno.ENOSPC, "No space left on device", "onnx/model.onnx.data", None, "engines/model.onnx.data")
    assert "disk full while writing engines/model.onnx.data" in str(user_message(error))
