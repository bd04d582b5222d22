"""Native sparse attention as graphs and engines: export, parity, ragged batches, byte counts, a session, a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import compare, floors
from bench.matrix import Case
from dsa_export.files import read_manifest
from dsa_export.model import load_model
from engines import build as engines_build
from engines.artifacts import open_engine, open_export
from engines.prefix_cache import PrefixCache
from engines.session import Session, open_runner
from tests.conftest import build_tokenizer
from tests.dsa_export.conftest import Graph, export_command
from tests.dsa_export.test_nsa import OPTIONS, build
from tests.engines.commands import run_command


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, export) of a model with one layer."""
    folder = tmp_path_factory.mktemp("nsa")
    build(layers=1).save_pretrained(folder / "checkpoint")
    build_tokenizer().save_pretrained(folder / "checkpoint")
    result = export_command("--model", str(folder / "checkpoint"), "--out", str(folder / "onnx"))
    assert result.returncode == 0, result.stderr
    return folder / "checkpoint", folder / "onnx"


def test_the_export_says_what_it_checked(exported):
    manifest = read_manifest(exported[1], "onnx", "")
    assert manifest["parity"]["sparse"]["passed"] and manifest["parity"]["dense"]["passed"]
    assert manifest["identical_operators"] is None
    assert manifest["shared_weights"]["shared"] > 5 and manifest["shared_weights"]["sparse_only"] > 5
    assert manifest["topk"] == OPTIONS["nsa_selection_size"] * OPTIONS["nsa_selected_blocks"]
    caches = {entry["name"]: entry for entry in manifest["graphs"]["sparse"]["cache"]}
    assert caches["compressed"]["shape"] == ["batch", 4, "capacity_per_4", 16]
    assert caches["window"]["shape"] == ["batch", 4, "capacity", 16]
    assert [entry["name"] for entry in manifest["graphs"]["dense"]["cache"]] == ["key", "value"]


def test_dense_slots_are_refused(exported, tmp_path: Path, capsys):
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path / "engines"), "--dense-slots", "64"]
    code, _, error = run_command(engines_build.main, options, capsys)
    assert code == 1 and "--dense-slots is for DSA" in error
    assert not (tmp_path / "engines").exists()


@torch.no_grad()
def test_chunks_and_decoding_of_rows_of_different_lengths(exported, tokens):
    checkpoint, onnx = exported
    model = load_model(checkpoint)
    graph = Graph(onnx / "sparse" / "model.onnx", batch=2)
    rows = [tokens[0].tolist(), tokens[1].tolist()]
    done = [0, 0]
    for chunk in [(13, 5), (20, 3), (1, 17), *[(1, 1)] * 9]:
        logits = graph.step([row[start : start + n] for row, start, n in zip(rows, done, chunk, strict=True)])
        done = [start + n for start, n in zip(done, chunk, strict=True)]
        for b, (row, end) in enumerate(zip(rows, done, strict=True)):
            expected = model(torch.tensor([row[:end]]), use_cache=False, logits_to_keep=1).logits[0, 0]
            np.testing.assert_allclose(logits[b], expected, atol=1e-4, err_msg=f"row {b}, {end} tokens")


@torch.no_grad()
def test_an_engine_generates_what_torch_does(exported, tokens, tmp_path, capsys):
    checkpoint, onnx = exported
    options = ["--onnx", str(onnx), "--out", str(tmp_path), "--variant", "sparse", "--backend"]
    for backend in ("ort", "torch"):
        assert run_command(engines_build.main, [*options, backend], capsys)[0::2] == (0, "")
    prompts = [tokens[0, :37].tolist(), tokens[1, :5].tolist()]
    expected = [
        load_model(checkpoint).generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, pad_token_id=0)[
            0, len(p) :
        ]
        for p in prompts
    ]
    for backend in ("ort", "torch"):
        session = Session(open_runner(tmp_path / backend / "sparse"), batch=2, prefill_chunk=11, capacity=48)
        for answer, want in zip(session.generate(prompts, 20), expected, strict=True):
            assert answer == want.tolist()


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_another_text_after_the_first_tokens(exported, tokens, tmp_path, capsys, backend: str):
    """Compressed blocks, whole or not, that the forgotten tokens were part of are written anew."""
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path), "--variant", "sparse", "--backend", backend]
    assert run_command(engines_build.main, options, capsys)[0::2] == (0, "")
    runner = open_runner(tmp_path / backend / "sparse")
    first, second = tokens[0, :45], tokens[1, :45]
    for common in (1, 7, 16, 30, 44):
        session, alone = Session(runner), Session(runner)
        session.prefill([first])
        session.truncate(common)
        expected = alone.prefill([torch.cat([first[:common], second[common:]]).numpy()])
        np.testing.assert_allclose(session.prefill([second[common:].numpy()]), expected, atol=1e-4)
        for token in first[:6].tolist():
            np.testing.assert_allclose(session.decode([token]), alone.decode([token]), atol=1e-4)


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_short_prompt_takes_the_beginning_of_a_long_one(exported, tokens, tmp_path, capsys, backend: str):
    """From larger caches to smaller ones, of which the compressed have fewer rows than the prefix tokens."""
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path), "--variant", "sparse", "--backend", backend]
    assert run_command(engines_build.main, options, capsys)[0::2] == (0, "")
    runner = open_runner(tmp_path / backend / "sparse")
    long, short = np.tile(tokens[0].numpy(), 20)[:700], Session(runner)
    session, prefixes = Session(runner), PrefixCache(runner, 1000)
    session.prefill([long])
    prefixes.keep(long, session.caches)
    known, prefix = prefixes.longest(long[:200])
    assert known == 199 and short.capacity < 700
    runner.copy(prefix.caches, short.caches, known)
    short.lengths[:] = known
    np.testing.assert_allclose(short.prefill([long[199:200]]), Session(runner).prefill([long[:200]]), atol=1e-4)


def test_bytes_that_a_call_reads(exported):
    graph = open_export(exported[1]).graphs["sparse"]
    row = 2 * 16 * 4  # one branch's K or V of one token: 2 heads of 16, fp32
    context, selected, window, block, stride = 1001, 32, 10, 8, 4
    expected = 2 * row * (selected + window + block + context // stride + 1)  # the last block has begun
    assert graph.cache_bytes_read(context) == expected
    assert graph.cache_bytes_read(6) == 2 * row * (6 + 6 + 6 + 2)
    scores = 3 * (1000 // stride + 2) * 14 * 4  # of 14 heads, in fp32: as they are, masked, probabilities
    assert graph.workspace_bytes_per_query(1000) == scores + 2 * selected * 2 * 16 * 4 * 2
    assert graph.cache_bytes_per_token() == 2 * row * (1 + 1 + 1 + 1 / stride)
    dense = open_export(exported[1]).graphs["dense"]
    assert dense.cache_bytes_read(context) == 2 * row * context


def test_tensorrt_rtx_builds_without_a_gpu(exported, tmp_path, capsys):
    options = ["--onnx", str(exported[1]), "--out", str(tmp_path), "--backend", "tensorrt-rtx", "--variant", "sparse"]
    options += ["--max-context", "64", "--max-batch", "2", "--prefill-chunk", "16"]
    code, _, error = run_command(engines_build.main, options, capsys)
    assert (code, error) == (0, "")
    _, prefill = open_engine(tmp_path / "tensorrt-rtx" / "sparse").manifest["profiles"]
    assert prefill["shapes"]["past_key_values.0.window"] == [[1, 4, 64, 16], [1, 4, 64, 16], [2, 4, 64, 16]]


def test_the_comparison_gives_a_row(exported, tmp_path, capsys):
    options = ["--onnx", str(exported[1]), "--engines", str(tmp_path / "engines"), "--out", str(tmp_path / "bench")]
    options += ["--quick", "--context", "64", "--runs", "2", "--peers", "none", "--threads", "1"]
    code, output, error = run_command(compare.main, options, capsys)
    assert (code, error) == (0, "")
    assert "no parity gate" in output and "equals dense attention at no length" in output
    engine = open_engine(tmp_path / "engines" / "ort" / "sparse")
    attended = 32 + 64 // 4 + 10  # selected, compressed and window rows
    flops = 2 * engine.manifest["step_weights"] + 4 * 14 * 16 * attended
    assert floors.call_flops(engine, Case("decode", 1, 64, 64, 1)) == flops
    flops = 2 * engine.manifest["step_weights"] + 4 * 14 * 16 * (6 + 6 // 4 + 6)
    assert floors.call_flops(engine, Case("decode", 1, 6, 64, 1)) == flops, "the window is not full"


def test_options_of_an_indexer_are_refused(exported, tmp_path):
    result = export_command("--model", str(exported[0]), "--out", str(tmp_path / "x"), "--topk", "8")
    assert result.returncode == 1 and "has native sparse attention" in result.stderr
