"""Output folders that cannot be made are refused before the work, not after it."""

from __future__ import annotations

import os

import pytest

from dsa_export.cli import UserError
from dsa_export.files import check_output


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
