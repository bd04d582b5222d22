"""Output folders: written under a temporary name, renamed when complete, traced by a manifest.

Stages hand over files. Each folder that a stage writes holds `manifest.json`: what it is (`kind`), the hash of what it
came from (`source`) and the stage's own facts, so that a number in a table traces back to its weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsa_export.cli import UserError

MANIFEST = "manifest.json"
PARTIAL, REPLACED = ".partial", ".replaced"
REPLACED_AS_A_WHOLE = ("checkpoint", "onnx", "engine", "bench", "evaluation")
"""Kinds of outputs that hold no others; an experiment holds its twins' checkpoints."""
TRAINING_STATE = "state.pt"
"""What a stopped training goes on from, in the partial folder of its output."""


def temporary_name(path: Path, *, shared: bool = False) -> Path:
    """What a file is called until it is complete. shared: several processes may write it at the same time."""
    return path.with_name(path.name + (f".{os.getpid()}" if shared else "") + PARTIAL)


def write_atomically(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a text file under a temporary name and renames it: readers see the old content or the new."""
    partial = temporary_name(path, shared=shared)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines, one per record, and the folder where they go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def read_text(path: Path, most: int = -1) -> str:
    """A UTF-8 file, or its first `most` characters. Raises UserError if it is another kind of file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(most)
    except UnicodeDecodeError as error:
        where = f" (byte {error.start})" if most < 0 else ""  # else it counts from the last piece read
        raise UserError(f"{path} is not UTF-8 text{where}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as text: {error.strerror}") from None


def standard_library(pattern: str) -> list[Path]:
    """Modules of the Python standard library by name: text that is on every machine."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern))


def check_output(out: Path, kind: str | None = None) -> None:
    """Raises UserError if no folder `out` can be made, or if it would replace what this toolchain did not write.

    kind: what is to be written; an earlier output of another kind is then not replaced either, nor what a stopped
    training left of one.
    """
    if out.name in ("", ".."):
        raise UserError(f"{out} cannot be replaced as a whole: name a new folder as the output")
    if out.is_symlink():
        raise UserError(
            f"{out} is a link, which cannot be replaced as a whole: name the folder itself, {out.resolve()}"
        )
    if os.path.ismount(out):
        raise UserError(f"{out} is a mount point, which cannot be replaced as a whole: name a folder below it")
    for folder in out.resolve().parents:
        if (found := manifest_kind(folder)) in REPLACED_AS_A_WHOLE:
            raise UserError(f"{out} lies in {folder}, {found!r} that is replaced as a whole: choose another --out")
    check_writable(out)
    check_writable(out.parent)  # where the folder lies under its temporary name
    if kind not in (None, "checkpoint"):
        _check_no_training(out)
    if not out.exists() or not any(out.iterdir()):
        return
    found = manifest_kind(out)
    if found is None:
        raise UserError(f"{out} exists and was not written by this toolchain: choose another --out, or remove it")
    if kind not in (None, found):
        raise UserError(f"{out} holds {found!r}, which {kind!r} would replace: choose another --out, or remove it")


def check_output_file(path: Path) -> None:
    """Raises UserError if no file `path` can be written. To be called before the work that this would waste."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file as the output")
    check_writable(path.parent)


def check_writable(folder: Path, what: str = "output") -> None:
    """Raises UserError if nothing can be written into a folder, or the folder cannot be made."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link that leads nowhere"
        raise UserError(f"{nearest} is {kind}: choose another {what} folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{nearest} cannot be written to: choose another {what} folder")


@contextmanager
def output_folder(out: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yields `<out>.partial` to write into, and renames it to `out` at the end, replacing an earlier output of ours.

    On an error the partial folder is removed, unless `keep_partial` (training resumes from it). Call check_output()
    before the work that the error would waste. Raises UserError if another process writes there, and if what is at
    `out` in the end is not ours: what was written stays in the partial folder then.
    """
    check_output(out)
    partial = temporary_name(out)
    if not keep_partial:
        remove_partial(out)
    partial.mkdir(parents=True, exist_ok=keep_partial)
    check_output(out)  # a part of the path before `..` may have been missing until now
    with _only_writer(partial):
        try:
            yield partial
        except BaseException:
            if not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        check_output(out)  # it may have appeared meanwhile
        replaced = out.with_name(out.name + REPLACED)
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.replace(replaced)
        partial.replace(out)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(out: Path) -> None:
    """Forgets what a stopped run left of `out`. Raises UserError if it is still running, or was a training."""
    partial = temporary_name(out)
    _check_no_training(out)
    if partial.exists():
        with _only_writer(partial):
            shutil.rmtree(partial)


def _check_no_training(out: Path) -> None:
    partial = temporary_name(out)
    if (partial / TRAINING_STATE).is_file():
        raise UserError(f"{partial} holds a training that was stopped: choose another --out, or remove it")


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder, which the system gives back however the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it, or choose another --out") from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system allows none; of what a symbolic link leads to, not of the link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def weight_files(folder: Path) -> list[Path]:
    """The weights of a Hugging Face folder that are loaded: safetensors files, or pickled ones where there are none."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def checkpoint_hash(folder: Path, digest_of: Callable[[Path], str] = sha256) -> str:
    """One digest over a Hugging Face folder's config.json and its weights, in the order of their names.

    digest_of: a file's, from one who may know it already.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *weight_files(folder)]):
        digest.update(f"{path.name} {digest_of(path)}\n".encode())
    return digest.hexdigest()


def write_manifest(folder: Path, kind: str, source: dict[str, Any], **facts: Any) -> None:
    """Writes manifest.json: {"kind", "source": {"path", "sha256", ...}, **facts}."""
    manifest = {"kind": kind, "source": source, **facts}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")


def as_in_manifest(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts as read_manifest() would give them back: to compare with those of an earlier run."""
    return json.loads(json.dumps(facts, default=str))


def manifest_kind(folder: Path) -> str | None:
    """What a folder's manifest says that it holds; None without a manifest that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text())["kind"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_manifest(folder: Path, kind: str, made_by: str) -> dict[str, Any]:
    """Reads a folder's manifest. Raises UserError, naming the command that makes such a folder, if it is not one."""
    path = folder / MANIFEST
    if not path.is_file():
        below = [path.parent for depth in ("*", "*/*") for path in sorted(folder.glob(f"{depth}/{MANIFEST}"))]
        finished = [near for near in (*below, folder.parent) if near.suffix not in (PARTIAL, REPLACED)]
        meant = [str(near) for near in finished if manifest_kind(near) == kind]
        if meant:
            raise UserError(f"{folder} holds no {MANIFEST}: did you mean {' or '.join(meant)}?")
        raise UserError(f"{folder} holds no {MANIFEST}: expected the output of `{made_by}`; run that first")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): run `{made_by}` again") from None
    found = manifest.get("kind") if isinstance(manifest, dict) else None
    if found != kind:
        raise UserError(f"{folder} holds {found!r}, not {kind!r}: expected the output of `{made_by}`")
    manifest_object(folder, manifest, "source", made_by)
    return manifest


def manifest_object(folder: Path, manifest: dict[str, Any], name: str, made_by: str) -> dict[str, Any]:
    """An entry of a folder's manifest that is a JSON object. Raises UserError if it is not."""
    entry = manifest.get(name)
    if not isinstance(entry, dict):
        raise UserError(f"{folder / MANIFEST} lacks or misstates {name!r}: run `{made_by}` again")
    return entry
