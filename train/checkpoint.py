"""What training writes to disk: the state to resume from, and the finished checkpoint."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dsa_export.cli import FULL_DISK, UserError, first_line, is_out_of_memory, says
from dsa_export.files import TRAINING_STATE, temporary_name
from dsa_export.model.checkpoint import quiet_transformers
from train.precision import exact


def save_state(folder: Path, state: dict[str, Any], name: str = TRAINING_STATE, *, shared: bool = False) -> None:
    """Writes a state under a temporary name and renames it: whatever happens, a whole state is there.

    shared: several processes may write it at the same time.
    """
    path = folder / name
    partial = temporary_name(path, shared=shared)
    try:
        with disk_errors(path), partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_state(folder: Path, name: str = TRAINING_STATE) -> dict[str, Any] | None:
    """The last state saved in a folder, or None.

    Raises UserError for a broken one; what says nothing of the file (no memory, no permission) as it comes.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of broken pickles torch raises anything, an IndexError too
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # that of a failed read has no name
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): remove it, or start again with --overwrite"
        ) from None


def save_checkpoint(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes the Hugging Face files: config, weights, tokenizer.

    What bf16 holds exactly, such as all that a stage left as it was in a bf16 checkpoint, is written in bf16.
    """
    state = model.state_dict()
    held = {t.data_ptr(): exact(t, torch.bfloat16) for t in state.values() if t.is_floating_point()}  # tied ones once
    state = {name: t if (low := held.get(t.data_ptr())) is None else low for name, t in state.items()}
    with disk_errors(folder), quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
        for file in folder.glob("*.safetensors"):  # safetensors lets nobody else read them, whatever the umask
            file.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
        tokenizer.save_pretrained(folder)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises as an OSError of `path` what torch and safetensors say of a full disk, and Python without a name."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if says(error, FULL_DISK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
