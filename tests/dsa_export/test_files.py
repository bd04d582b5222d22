"""Output folders that cannot be made are refused before the work, not after it."""

from __future__ import annotations

import os

import pytest

from dsa_export.cli import UserError
from dsa_export.files import check_output, read_manifest, write_manifest


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
