"""Problems as the C++ host reads them, and what the fake driver writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.int32: "int32",
    torch.int64: "int64",
}


def write_case(folder: Path, plugin: str, attributes: dict[str, float], inputs: list[Tensor], output: Tensor) -> Path:
    """Writes CASE for the host; meta tensors carry no data. The output goes to `folder`/output."""
    lines = [" ".join(["plugin", plugin, *(f"{name} {value!r}" for name, value in attributes.items())])]
    for number, tensor in enumerate([*inputs, output]):
        path = folder / ("output" if tensor is output else f"input{number}")
        is_data = tensor is not output and not tensor.is_meta
        if is_data:
            path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        kind = "output" if tensor is output else "input"
        dims = " ".join(map(str, (tensor.ndim, *tensor.shape)))
        lines.append(f"{kind} {TYPES[tensor.dtype]} {dims} {path if is_data or tensor is output else '-'}")
    case = folder / "case"
    case.write_text("\n".join(lines) + "\n")
    return case


def read_output(folder: Path, like: Tensor) -> Tensor:
    data = torch.from_numpy(np.fromfile(folder / "output", dtype=np.uint8))
    return data.view(like.dtype).view(like.shape)


def run_host(host: Path, *arguments: object, **environment: str) -> str:
    """Standard output of the host; its error output is in the exception if it fails."""
    result = subprocess.run(
        [str(host), *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
