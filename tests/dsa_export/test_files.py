"""Output folders that cannot be made are refused before the work, not after it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_export.cli import UserError
from dsa_export.files import (
    TRAINING_STATE,
    check_output,
    check_output_file,
    checkpoint_hash,
    output_folder,
    read_manifest,
    read_text,
    remove_partial,
    write_atomically,
    write_manifest,
)


def test_two_processes_do_not_write_one_folder(tmp_path):
    """The second is refused, and takes nothing from the first; what a stopped one left is free."""
    out = tmp_path / "out"
    with output_folder(out, keep_partial=True) as partial:
        (partial / "state").write_text("of the first")
        for keep in (True, False):
            with pytest.raises(UserError, match="another process is writing"), output_folder(out, keep_partial=keep):
                pass
        with pytest.raises(UserError, match="another process is writing"):
            remove_partial(out)
        write_manifest(partial, "checkpoint", {})
    assert (out / "state").read_text() == "of the first"
    with pytest.raises(ZeroDivisionError), output_folder(out, keep_partial=True):
        raise ZeroDivisionError
    remove_partial(out)
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_not_ours_is_not_replaced_however_late_it_is_seen(tmp_path):
    """By a part of the path before `..` that is missing at first, or as a folder that appears during the work."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("precious")
    late = output_folder(tmp_path / "missing" / ".." / "theirs")
    with pytest.raises(UserError, match="not written by this toolchain"), late:
        pytest.fail("the work began")
    new = tmp_path / "new"
    with pytest.raises(UserError, match="not written by this toolchain"), output_folder(new) as partial:
        (partial / "result").write_text("of hours")
        theirs.replace(new)
    assert (new / "file").read_text() == "precious" and (tmp_path / "new.partial" / "result").read_text() == "of hours"


def test_no_other_command_forgets_a_stopped_training(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), output_folder(out, keep_partial=True) as partial:
        (partial / TRAINING_STATE).write_text("of hours")
        raise KeyboardInterrupt
    for refused in (lambda: check_output(out, "onnx"), lambda: remove_partial(out), output_folder(out).__enter__):
        with pytest.raises(UserError, match=r"out.partial holds a training that was stopped"):
            refused()
    check_output(out, "checkpoint")
    with output_folder(out, keep_partial=True) as partial:
        assert (partial / TRAINING_STATE).read_text() == "of hours"


def test_a_mount_point_is_refused_and_a_folder_below_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match=r"is a mount point, .*: name a folder below it"):
        check_output(tmp_path)
    check_output(tmp_path / "below")


def test_the_parent_must_be_writable_for_the_temporary_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    check_output(out)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to"):
        check_output(out)


def test_a_folder_too_high_or_too_low_names_the_right_ones(tmp_path):
    for name in ("ort/dense", "ort/sparse", "ort/old.partial"):
        (tmp_path / name / "part").mkdir(parents=True)
        write_manifest(tmp_path / name, "engine", {})
    for near in (tmp_path, tmp_path / "ort"):
        with pytest.raises(UserError, match=f"did you mean {tmp_path}/ort/dense or {tmp_path}/ort/sparse\\?"):
            read_manifest(near, "engine", "the command")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/ort/dense\\?"):
        read_manifest(tmp_path / "ort/dense/part", "engine", "the command")
    with pytest.raises(UserError, match="expected the output of `the command`; run that first"):
        read_manifest(tmp_path, "onnx", "the command")


def test_a_checkpoints_hash_is_that_of_the_weights_that_are_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("one")
    pickled = checkpoint_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("two")
    assert checkpoint_hash(tmp_path) != pickled
    (tmp_path / "model.safetensors").write_text("what transformers prefers")
    preferred = checkpoint_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert checkpoint_hash(tmp_path) == preferred
    (tmp_path / "config.json").write_text('{"index_topk": 8}')
    assert checkpoint_hash(tmp_path) != preferred, "the same weights with another k are another checkpoint"


def test_an_output_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    with pytest.raises(UserError, match="out is a link, which cannot be replaced"):
        check_output(tmp_path / "out")


def test_a_link_that_leads_nowhere_is_refused_before_the_work(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for check, out in ((check_output, "link/out"), (check_output, "link/deep/out"), (check_output_file, "link/file")):
        with pytest.raises(UserError, match="link is a link that leads nowhere"):
            check(tmp_path / out)
    with pytest.raises(UserError, match="link is a link, which cannot be replaced"):
        check_output(tmp_path / "link")


def test_texts_are_utf8_whatever_the_locale(tmp_path):
    """Others read them so."""
    code = "import dsa_export.files as f; f.write_atomically(f.Path('x'), '\\u2192')"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | locale, check=True)
    assert (tmp_path / "x").read_bytes() == "→".encode()


def test_a_text_is_read_as_it_stands(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\r\nb\rü\n".encode())
    assert read_text(path) == "a\r\nb\rü\n" and read_text(path, 2) == "a\r"
    path.write_bytes("ü".encode() * 300_000 + b"\xff")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 600000\)"):
        read_text(path)
    with pytest.raises(UserError, match=r"is not UTF-8 text$"):
        read_text(path, 400_000)


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "of the run before")

    def full(self, text, **_):
        self.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "of this one")
    assert path.read_text() == "of the run before" and list(tmp_path.iterdir()) == [path]
