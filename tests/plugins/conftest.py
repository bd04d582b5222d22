"""The plugin library and the C++ host that drives it, built once (and kept in build/ until a source changes)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library() -> Path:
    if given := os.environ.get("DSA_PLUGIN_LIBRARY"):  # built elsewhere, with another version of triton
        return Path(given).resolve()
    pytest.importorskip("triton", reason="the kernels are compiled by triton")
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    from plugins.embed import build

    folder = ROOT / "build/plugins"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # the other test processes wait and find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder).resolve()


@pytest.fixture(scope="session")
def host(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from plugins.headers import tensorrt_headers

    program = tmp_path_factory.mktemp("host") / "host"
    compile_cpp(
        "host.cpp", program, "-I", str(ROOT / "plugins/native"), "-isystem", str(tensorrt_headers(ROOT / "build"))
    )
    return program


def compile_cpp(source: str, target: Path, *flags: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-deprecated-declarations", *flags]
    subprocess.run([*command, str(HERE / source), "-o", str(target), "-ldl", "-pthread"], check=True)
