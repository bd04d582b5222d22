"""Latent attention and the mixture of experts as engines: ONNX Runtime, TensorRT-RTX's build, a comparison's row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import compare
from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM, load_model
from engines import build as engines_build
from engines.artifacts import open_engine, open_export
from engines.session import Session, open_runner
from tests.conftest import VOCABULARY, build_tokenizer
from tests.dsa_export.conftest import export_command
from tests.dsa_export.test_capture import CONFIGS, SHAPE
from tests.engines.commands import run_command

CONTEXT = 64


@pytest.fixture(scope="module", params=["mla-dsa", "moe"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, export) of a model with weights that make attention sharp."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = DSAConfig(**{**SHAPE, **CONFIGS[request.param], "initializer_range": 0.2})
    DSAForCausalLM(config).save_pretrained(folder / "checkpoint")
    build_tokenizer().save_pretrained(folder / "checkpoint")
    result = export_command("--model", str(folder / "checkpoint"), "--out", str(folder / "onnx"))
    assert result.returncode == 0, result.stderr
    return folder / "checkpoint", folder / "onnx"


def test_an_engine_computes_what_torch_does(exported: tuple[Path, Path], tmp_path: Path, capsys):
    checkpoint, onnx = exported
    options = ["--onnx", str(onnx), "--out", str(tmp_path), "--max-context", str(CONTEXT), "--max-batch", "2"]
    assert run_command(engines_build.main, options, capsys)[0] == 0
    rows = [np.arange(3, 43) * 7 % VOCABULARY, np.arange(5, 20)]
    for variant in ("dense", "sparse"):
        model = load_model(checkpoint, attention="dense" if variant == "dense" else None).eval()
        session = Session(open_runner(tmp_path / "ort" / variant, threads=1), 2)
        session.prefill(rows)
        found = session.decode([9, 9])
        for row, logits in zip(rows, found, strict=True):
            text = torch.from_numpy(np.append(row, 9))[None]
            with torch.no_grad():
                expected = model(text).logits[0, -1]
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-3, rtol=0)


def test_latent_rows_are_not_kept_in_fp16(exported: tuple[Path, Path], tmp_path: Path, capsys):
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path), "--kv-cache", "fp16"]
    code, _, error = run_command(engines_build.main, options, capsys)
    latent = any(tensor.name == "latent" for tensor in open_export(exported[1]).graphs["sparse"].cache)
    assert code == int(latent) and (not latent or "--kv-cache fp16 is of keys and values" in error)


def test_tensorrt_rtx_builds_without_a_gpu(exported: tuple[Path, Path], tmp_path: Path, capsys):
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path), "--backend", "tensorrt-rtx"]
    options += ["--max-context", str(CONTEXT), "--max-batch", "1", "--prefill-chunk", "16"]
    code, _, error = run_command(engines_build.main, options, capsys)
    assert (code, error) == (0, "")
    for variant in ("dense", "sparse"):
        assert len(open_engine(tmp_path / "tensorrt-rtx" / variant).manifest["profiles"]) == 2


def test_the_comparison_gives_a_row(exported: tuple[Path, Path], tmp_path: Path, capsys):
    options = ["--onnx", str(exported[1]), "--engines", str(tmp_path / "engines"), "--out", str(tmp_path / "bench")]
    options += ["--quick", "--context", str(CONTEXT), "--runs", "2", "--peers", "none", "--threads", "1"]
    code, output, error = run_command(compare.main, options, capsys)
    assert (code, error) == (0, "")
    assert "SparseAttention" in output
