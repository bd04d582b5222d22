"""The plugin library on a GPU: the C++ host against the definition, several contexts, CUDA graphs, sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from plugins.index_topk import index_topk
from tests.plugins.cases import read_output, run_host, write_case
from tests.plugins.problems import assert_attention, assert_selection, attention_problem, sets, topk_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: enqueue runs kernels"),
]
DTYPES = [torch.float16, torch.bfloat16]

# lengths, S, C, Hi, Di, k
TOPK_SHAPES = [
    ([131072, 90000, 0, 5], 1, 131072, 8, 64, 2048),
    ([9000, 40], 4, 9001, 7, 128, 4096),
    ([30000], 200, 30000, 4, 64, 512),
    ([100], 3, 100, 16, 64, 128),
]
# B, S, C, Hkv, group, D, K
ATTENTION_SHAPES = [
    (1, 1, 50000, 2, 7, 64, 2048),
    (64, 1, 3000, 2, 7, 64, 2048),
    (2, 64, 4000, 4, 8, 128, 512),
    (3, 8, 900, 3, 1, 128, 4096),
    (2, 3, 5000, 1, 40, 576, 2048),
]


@pytest.mark.parametrize("graph", [0, 1], ids=["streams", "graph"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TOPK_SHAPES, ids=str)
def test_topk(host: Path, library: Path, tmp_path: Path, shape, dtype: torch.dtype, graph: int) -> None:
    problem = topk_problem(*shape, dtype, ties=False, seed=1)
    *inputs, k = problem.arguments()
    like = torch.empty(len(shape[0]), shape[1], k, dtype=torch.int32)
    case = write_case(tmp_path, "IndexTopK", {"k": k}, inputs, like)
    run_host(host, "run", library, case, 3, 20, graph)
    assert_selection(read_output(tmp_path, like), problem)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 70])
@pytest.mark.parametrize(("sinks", "window", "pool"), [(4, 128, 1), (4, 128, 4), (0, 0, 1), (0, 0, 8)])
def test_topk_with_options(
    host: Path, library: Path, tmp_path: Path, S: int, sinks: int, window: int, pool: int, fp8: bool, dtype: torch.dtype
) -> None:
    """Plugin and torch operator alike, bit for bit, and the torch form's sets: the arithmetic is exact."""
    rows, k = 32001, 512
    lengths = [rows * pool, rows * pool // 2 + 1]
    problem = topk_problem(lengths, S, rows, 8, 64, k, dtype, ties=True, seed=5, poison=False)
    *inputs, k = problem.arguments()
    options = {"sinks": sinks, "window": window, "pool": pool}
    scale = None
    if fp8:
        inputs[2] = inputs[2].to(torch.float8_e4m3fn)
        scale = torch.randint(-1, 2, inputs[2].shape[:2], generator=torch.Generator().manual_seed(5)).float().exp2()
    like = torch.empty(2, S, k, dtype=torch.int32)
    tensors = inputs if scale is None else [*inputs, scale]
    run_host(host, "run", library, write_case(tmp_path, "IndexTopK", {"k": k, **options}, tensors, like), 2, 5, 1)
    got = read_output(tmp_path, like)
    on_gpu = [t.cuda() for t in inputs]
    scale_on_gpu = None if scale is None else scale.cuda()
    assert torch.equal(index_topk(*on_gpu, k, **options, index_scale=scale_on_gpu).cpu(), got)
    assert sets(index_topk(*inputs, k, **options, index_scale=scale)) == sets(got)


@pytest.mark.parametrize("graph", [0, 1], ids=["streams", "graph"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention(host: Path, library: Path, tmp_path: Path, shape, dtype: torch.dtype, graph: int) -> None:
    problem = attention_problem(*shape, dtype, seed=2)
    *inputs, scale = problem.arguments()
    like = torch.empty_like(problem.q)
    case = write_case(tmp_path, "SparseAttention", {"scale": scale}, inputs, like)
    run_host(host, "run", library, case, 3, 20, graph)
    assert_attention(read_output(tmp_path, like), problem)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(host: Path, library: Path, tmp_path: Path, tool: str) -> None:
    topk, attention = tmp_path / "topk", tmp_path / "attention"
    for folder in (topk, attention):
        folder.mkdir()
    problem = topk_problem([9000, 40], 3, 9001, 7, 64, 512, torch.bfloat16, ties=True, seed=3)
    *inputs, k = problem.arguments()
    cases = [write_case(topk, "IndexTopK", {"k": k}, inputs, torch.empty(2, 3, k, dtype=torch.int32))]
    attended = attention_problem(2, 3, 900, 2, 7, 64, 512, torch.bfloat16, seed=4)
    *inputs, scale = attended.arguments()
    cases.append(write_case(attention, "SparseAttention", {"scale": scale}, inputs, torch.empty_like(attended.q)))
    for case in cases:
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            host,
            "run",
            library,
            case,
            "1",
            "1",
            "0",
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
