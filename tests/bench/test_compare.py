"""python bench/compare.py on the toy: every field, the gate, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench import compare
from dsa_export.files import MANIFEST
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "variant", "backend", "phase", "context", "batch", "k", "dtype", "ms_median", "tokens_per_s", "peak_mib",
    "ms_p10", "ms_p90", "runs", "speedup", "speedup_paired", "speedup_by_bytes", "floor_bytes", "floor_ms",
    "floor_fraction", "copy_bandwidth_gb_s", "queries", "capacity", "caches", "agreement", "fill_seconds",
    "random_indexer", "machine", "versions", "source", "command", "time", "peak_mib_is",
}  # fmt: skip


def options(export: Path, engines: Path, out: Path) -> list[str]:
    return ["--onnx", str(export), "--engines", str(engines), "--out", str(out), "--runs", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def results(export: Path, engines: Path, tmp_path_factory) -> tuple[Path, str]:
    """Runs the file itself, from another folder, as a user would. Returns the output folder and what was printed."""
    out = tmp_path_factory.mktemp("compare") / "bench"
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), *options(export, engines, out)]
    command += ["--context", "32", "300", "--batch", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return out, done.stdout


def test_every_case_has_every_field(results: tuple[Path, str]):
    records = [json.loads(line) for line in (results[0] / "results.jsonl").read_text().splitlines()]
    assert all(set(record) == FIELDS for record in records)
    assert [(r["batch"], r["context"], r["phase"], r["variant"]) for r in records] == [
        (batch, context, phase, variant)
        for batch in (1, 2)
        for context in (32, 300)
        for phase in ("decode", "prefill")
        for variant in ("dense", "sparse")
    ]
    for record in records:
        assert record["ms_p10"] <= record["ms_median"] <= record["ms_p90"]
        per_call = record["batch"] * record["queries"]
        assert record["tokens_per_s"] == pytest.approx(per_call / record["ms_median"] * 1e3)
        assert record["floor_fraction"] == pytest.approx(record["floor_ms"] / record["ms_median"])
        assert 0 < record["peak_mib"] < 200
        assert record["k"] == 16
        assert record["machine"]["threads"] == 1
        assert record["versions"]["backend"].startswith("1.")
        assert len(record["source"]["sha256"]["dense"]) == 64
        assert "bench/compare.py --onnx" in record["command"]
        assert 0 <= record["agreement"]["top1"] <= 1
        assert record["agreement"]["tokens"] == record["batch"] * (16 if record["context"] == 32 else 32)
    for dense, sparse in zip(records[::2], records[1::2], strict=True):
        assert dense["capacity"] == sparse["capacity"] == max(dense["context"], 16)
        assert dense["speedup"] == pytest.approx(dense["ms_median"] / sparse["ms_median"])
        assert dense["speedup_by_bytes"] == pytest.approx(dense["floor_bytes"] / sparse["floor_bytes"])


def test_it_ends_with_the_table_the_paths_and_one_sentence(results: tuple[Path, str]):
    out, printed = results
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "comparison.png", MANIFEST}
    *_, paths, sentence = printed.strip().splitlines()
    assert "parity gate green" in printed.splitlines()[0]
    assert paths == f"wrote {out / 'results.jsonl'} and {out / 'comparison.png'}"
    assert sentence.startswith("At 300 tokens of context (batch 1) one decoding step takes")
    for column in ("dense ms", "sparse ms", "speed-up", "by bytes", "agreement"):
        assert column in printed


def test_random_caches_have_no_agreement_and_missing_engines_are_built(export: Path, tmp_path: Path, capsys):
    arguments = options(export, tmp_path / "engines", tmp_path / "bench")
    arguments += ["--caches", "random", "--context", "200", "--phase", "decode"]
    code, output, error = run_command(compare.main, arguments, capsys)
    assert (code, error) == (0, "")
    assert "building the ort engines" in output
    records = [json.loads(line) for line in (tmp_path / "bench" / "results.jsonl").read_text().splitlines()]
    assert [record["agreement"] for record in records] == [None, None]
    assert {record["phase"] for record in records} == {"decode"}
    assert "building" not in run_command(compare.main, arguments, capsys)[1]


def test_a_red_gate_gives_no_figures(tmp_path: Path, capsys):
    """The sparse graph attends with another scale than the dense one; every hash is right."""
    export = toy.write_export(tmp_path / "onnx")
    path = export / "sparse" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SparseAttention":
            next(attribute for attribute in node.attribute if attribute.name == "scale").f *= 1.01
    onnx.save(model, path)
    manifest = json.loads((export / MANIFEST).read_text())
    manifest["graphs"]["sparse"]["sha256"] = toy.sha256(path)
    (export / MANIFEST).write_text(json.dumps(manifest))
    code, output, error = run_command(compare.main, options(export, tmp_path / "engines", tmp_path / "bench"), capsys)
    assert code == 1
    assert "parity gate red, nothing was measured" in one_line(error)
    assert "speed-up" not in output
    assert not (tmp_path / "bench").exists()


def change_engine(folder: Path) -> None:
    (folder / "dense" / "model.onnx").write_bytes(b"edited")


def change_version(folder: Path) -> None:
    manifest = json.loads((folder / "dense" / MANIFEST).read_text())
    (folder / "dense" / MANIFEST).write_text(json.dumps({**manifest, "versions": {"runtime": "0.1"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(change_engine, "run `python -m engines.build --onnx"), (change_version, "was built with ort 0.1")],
)
def test_damaged_engines_are_not_measured(export: Path, engines: Path, tmp_path: Path, capsys, damage, message):
    copy_tree(engines, tmp_path / "engines")
    damage(tmp_path / "engines" / "ort")
    code, _, error = run_command(compare.main, options(export, tmp_path / "engines", tmp_path / "bench"), capsys)
    assert code == 1
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--context", "99999"], "exceeds the engines' capacity of 4096"),
        (["--batch", "9"], "built for 8 rows"),
        (["--backend", "tensorrt-rtx"], "holds no engines of"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read as text"),
        (["--onnx", "nowhere"], "nowhere holds no manifest.json: expected the output of `python -m dsa_export.onnx`"),
    ],
)
def test_bad_input_is_one_line(export: Path, engines: Path, tmp_path: Path, capsys, extra, message):
    code, _, error = run_command(compare.main, [*options(export, engines, tmp_path / "bench"), *extra], capsys)
    assert code == 1
    assert message in one_line(error)
    assert not (tmp_path / "bench").exists()


def test_a_foreign_output_folder_is_kept(export: Path, engines: Path, tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = run_command(compare.main, options(export, engines, tmp_path), capsys)
    assert code == 1
    assert "was not written by this toolchain" in one_line(error)


def test_the_timed_call_can_be_repeated(export: Path, engines: Path):
    """Timing a case changes neither the caches nor the lengths."""
    from bench.cases import Case
    from bench.runs import call_of
    from engines.session import Session, open_runner

    session = Session(open_runner(engines / "ort" / "sparse"), capacity=128)
    text = np.random.default_rng(0).integers(0, 256, (1, 128))
    session.prefill(list(text))
    before = {name: array.copy() for name, array in session.caches.arrays.items()}
    for case in (Case("decode", 1, 128, 128, 1), Case("prefill", 1, 128, 128, 32)):
        call = call_of(session, case, text)
        for _ in range(3):
            call()
        assert session.lengths.tolist() == [128]
        for name, array in session.caches.arrays.items():
            np.testing.assert_allclose(array, before[name], atol=1e-5)
