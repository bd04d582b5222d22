"""bench/operators.py without a GPU: it says so; and its floors are the bytes and operations of the README."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.operators import Case, floors
from tests.plugins.conftest import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = subprocess.run([sys.executable, "-m", "bench.operators"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: bench.operators times GPU kernels: no CUDA GPU is visible to torch on this machine"
    ]


def test_floors() -> None:
    decode = floors(Case("decode", 32, 1, 128 * 1024, 2048))
    assert decode["index_topk"][0] == pytest.approx(32 * 131072 * 128, rel=0.01)
    assert decode["sparse_attention"][0] == pytest.approx(32 * 2048 * 512, rel=0.02)
    assert decode["dense"][0] == pytest.approx(32 * 131072 * 512, rel=0.01)
    assert decode["dense"][0] / decode["both"][0] == pytest.approx(3.8, abs=0.1)
    prefill = floors(Case("prefill", 1, 1024, 128 * 1024, 2048))
    assert prefill["index_topk"][1] == pytest.approx(137e9, rel=0.01)
    assert prefill["dense"][1] == pytest.approx(4 * 1024 * 14 * 131072 * 64, rel=0.01)
