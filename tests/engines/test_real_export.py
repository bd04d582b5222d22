"""The real export of a small checkpoint: engines compute what torch does, and NVIDIA's compiler takes the graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import compare
from dsa_export.model import dense_twin, load_model
from dsa_export.onnx.__main__ import main as export_main
from engines import build
from engines.artifacts import open_engine, open_export
from engines.session import Session, open_runner
from tests.engines.commands import run_command

LENGTH = 200  # k is 16


@pytest.fixture(scope="module")
def real_export(dsa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dsa_folder.parent)
        export_main(["--model", dsa_folder.name, "--out", str(out)])
    return out


def test_the_checkpoint_is_found_from_every_working_directory(real_export: Path, dsa_folder: Path):
    assert open_export(real_export).manifest["source"]["path"] == str(dsa_folder.resolve())


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_engines_compute_what_torch_does(real_export: Path, dsa_folder: Path, tmp_path: Path, variant: str, capsys):
    options = ["--onnx", str(real_export), "--out", str(tmp_path), "--variant", variant]
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")
    session = Session(open_runner(tmp_path / "ort" / variant), prefill_chunk=33)
    prompt = np.random.default_rng(0).integers(3, session.engine.model.vocab_size, LENGTH)
    torch_model = load_model(dsa_folder)
    torch_model = dense_twin(torch_model) if variant == "dense" else torch_model
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(session.prefill([prompt])[0], expected, atol=1e-3)


def test_both_graphs_build_in_tensorrt_rtx(real_export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(real_export), "--out", str(tmp_path), "--backend", "tensorrt-rtx", "--max-context", "256"]
    options += ["--max-batch", "1"]  # this model has one KV head: see engines.build.tensorrt_rtx.ONE_KV_HEAD
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")
    for variant in ("dense", "sparse"):
        assert open_engine(tmp_path / "tensorrt-rtx" / variant).variant == variant


def test_the_comparison_runs_on_it_with_its_peers(real_export: Path, dsa_folder: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(real_export), "--engines", str(tmp_path / "engines"), "--out", str(tmp_path / "bench")]
    options += ["--checkpoint", str(dsa_folder)]
    code, output, error = run_command(compare.main, [*options, "--context", "64", "--runs", "2"], capsys)
    assert (code, error) == (0, "")
    assert "parity gate green" in output
    records = [json.loads(line) for line in (tmp_path / "bench" / "results.jsonl").read_text().splitlines()]
    peers = {record["peer"]: record for record in records if record["kind"] == "peer"}
    assert set(peers) == {"transformers (sdpa)", "masked (dense scores, top-k mask)"}
    assert all(record["ms_median"] > 0 and record["ttft_s"] > 0 for record in peers.values())
    assert "nodes and" in (tmp_path / "bench" / "report.html").read_text()  # the proof of identical operators

    code, output, error = run_command(compare.main, [*options, "--debug-layers"], capsys)
    assert (code, error) == (0, "")
    assert "16 tokens: all " in output and "tensors agree" in output
    code, output, error = run_command(compare.main, [*options, "--debug-layers", "40"], capsys)
    assert (code, error) == (0, "")
    assert "40 tokens: model.layers.0.self_attn/core is the first of" in output
    assert "beyond k tokens that is what selection does" in output
