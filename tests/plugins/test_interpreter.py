"""Runs test_kernels.py in Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernels.py runs on the GPU here")
def test_kernels_in_the_interpreter() -> None:
    triton = pytest.importorskip("triton", reason="the interpreter is part of triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of triton {triton.__version__} needs numpy below 2.4")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/plugins/test_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert " passed" in result.stdout.splitlines()[-1]
