"""Finds TensorRT's C++ headers, which its pip packages do not bring."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

# Redistributes NVIDIA's headers of TensorRT 10.14, whose plugin interfaces 10.16 to 11.x keep.
HEADER_WHEEL = "kernel-lens==2.0.1"
HEADER_FOLDER = "kernel_lens/include/tensorrt/"
SYSTEM = ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu")


class HeadersNotFound(Exception):
    """One line: what is missing, and what to do."""


def tensorrt_headers(build: Path) -> Path:
    """The folder of NvInferRuntime.h: TENSORRT_INCLUDE_DIR, else the system's, else unpacked into `build`."""
    if given := os.environ.get("TENSORRT_INCLUDE_DIR"):
        if not (Path(given) / "NvInferRuntime.h").is_file():
            raise HeadersNotFound(f"TENSORRT_INCLUDE_DIR={given} holds no NvInferRuntime.h")
        return Path(given)
    for folder in map(Path, SYSTEM):
        if (folder / "NvInferRuntime.h").is_file():
            return folder
    return _from_wheel(build / "tensorrt-headers")


def _from_wheel(folder: Path) -> Path:
    done = folder / "complete"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run([*command, "--dest", str(folder), HEADER_WHEEL], capture_output=True, text=True)
        if result.returncode:
            raise HeadersNotFound(
                f"no TensorRT headers: set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h "
                f"(pip download {HEADER_WHEEL} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]})"
            )
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith(HEADER_FOLDER) and name.endswith(".h"):
                        (folder / Path(name).name).write_bytes(archive.read(name))
            wheel.unlink()
        done.touch()
    return folder
