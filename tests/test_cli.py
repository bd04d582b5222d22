"""What the commands share: exit codes, one-line errors, output folders."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from dsa_export import interrupt
from dsa_export.cli import UserError, first_line, path, run
from dsa_export.files import check_output, output_folder, read_manifest, write_atomically, write_manifest

ROOT = Path(__file__).parents[1]


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no such\nmodel"), "error: no such model"),
        (UserError("pip install x[tensorrt]"), "error: pip install x[tensorrt]"),
        (UserError("localhost:-1: no such port"), "error: localhost:-1: no such port"),
        (KeyboardInterrupt(), "error: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "error: disk full while writing /data/x"),
        (OSError("10 requested and 3 written"), "error: disk full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "error: disk full"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "error: disk full"),
        (MemoryError(), "error: out of memory: fewer tokens"),
        (RuntimeError("std::bad_alloc"), "error: out of memory: fewer tokens"),
        (RuntimeException("Exception during initialization: std::bad_alloc"), "error: out of memory: fewer tokens"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "error: out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "error: out of",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "error: /root/x: Permission denied"),
    ],
)
def test_errors_of_the_user_end_in_one_line(error, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(failing(error))
    assert end.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(message) and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\nmore"), "no"),
        (ValueError("\n validation failed:\n   too small\nmore"), "validation failed: too small"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_of_others_in_one_line(error, line):
    assert first_line(error) == line


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert path("~/out") == Path("/home/someone/out") and path("a~b/~") == Path("a~b/~")
    with pytest.raises(argparse.ArgumentTypeError, match="~nobody-here/x"):
        path("~nobody-here/x")


def test_errors_of_ours_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()))


def test_output_appears_when_complete_and_replaces_ours(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with output_folder(out) as folder:
            (folder / "data").write_text(content)
            write_manifest(folder, "test", {})
            assert not out.exists() or (out / "data").read_text() == "first"
        assert (out / "data").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_output_leaves_the_earlier_one(tmp_path):
    out = tmp_path / "out"
    with output_folder(out) as folder:
        write_manifest(folder, "test", {})
    with pytest.raises(RuntimeError), output_folder(out) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (out / "half").exists()


def test_foreign_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "ours").mkdir()
    write_manifest(tmp_path / "ours", "checkpoint", {})
    for out, message in (
        (tmp_path, "not written by this toolchain"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is a file"),
        (Path(), "name a new folder"),
        (tmp_path / "ours", "holds 'checkpoint', which 'onnx' would replace"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(out, "onnx")
    check_output(tmp_path / "new" / "below", "onnx")
    check_output(tmp_path / "ours", "checkpoint")


def test_manifests_that_do_not_fit_name_the_command(tmp_path):
    with pytest.raises(UserError, match="run that first"):
        read_manifest(tmp_path, "onnx", "python -m x")
    write_manifest(tmp_path, "engine", {"path": "x"})
    with pytest.raises(UserError, match=r"'engine', not 'onnx'.*python -m x"):
        read_manifest(tmp_path, "onnx", "python -m x")
    write_atomically(tmp_path / "manifest.json", "{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(tmp_path, "onnx", "python -m x")


@pytest.mark.parametrize(
    "command", ["-m train.warmup", "-m dsa_export.onnx", "-m engines.build", "-m bench.operators", "bench/compare.py"]
)
def test_interrupted_while_it_still_loads_its_libraries(command: str, tmp_path: Path):
    for library in ("torch", "numpy"):
        (tmp_path / f"{library}.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, *command.split()], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (1, f"error: {interrupt.MESSAGE}\n")


def test_other_programs_keep_their_ctrl_c():
    code = "import signal, train, engines; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
