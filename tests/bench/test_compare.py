"""python bench/compare.py on the toy: every field, the gate, one-line errors."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bench import compare, matrix, measure, runs
from dsa_export.cli import UserError
from dsa_export.files import MANIFEST
from engines import build
from engines.artifacts import open_engine, runtime_version
from engines.memory import OutOfMemory
from tests.bench import records
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

ROOT = Path(__file__).resolve().parents[2]
TIMING = {
    "kind", "variant", "core", "strongest", "backend", "on_gpu", "precision", "k", "selection", "phase", "context",
    "batch", "queries", "capacity", "caches", "random_indexer", "ms_median", "ms_p10", "ms_p90", "runs", "tokens_per_s",
    "speedup", "speedup_paired", "speedup_predicted", "floor_bytes", "floor_flops", "floor_ms", "floor_ms_by_bytes",
    "floor_ms_by_flops", "floor_fraction", "rates", "ttft_s", "loss", "agreement", "contention", "peak_mib",
    "peak_mib_is", "engine", "source", "machine", "versions", "command", "time",
}  # fmt: skip


def options(export: Path, engines: Path, out: Path) -> list[str]:
    arguments = ["--onnx", str(export), "--engines", str(engines), "--out", str(out), "--runs", "3", "--threads", "1"]
    return [*arguments, "--peers", "none"]


def lines(out: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="session")
def another_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the same weights with k = 64."""
    folder = tmp_path_factory.mktemp("k64")
    toy.write_export(folder / "onnx", topk=64)
    build.build("ort", build.parse_arguments(["--onnx", str(folder / "onnx"), "--out", str(folder / "engines")]))
    return folder / "engines"


@pytest.fixture(scope="module")
def results(export: Path, engines: Path, another_k: Path, tmp_path_factory) -> tuple[Path, str]:
    """Runs the file itself, from another folder, as a user would. Returns the output folder and what was printed."""
    out = tmp_path_factory.mktemp("compare") / "bench"
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), *options(export, engines, out)]
    command += ["--context", "32", "300", "5000", "--batch", "1", "2", "--engines", str(engines), str(another_k)]
    command += ["--score-tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return out, done.stdout


def test_every_case_has_every_field(results: tuple[Path, str]):
    records = lines(results[0], "timing")
    assert all(set(record) == TIMING for record in records)
    assert [(r["k"], r["batch"], r["context"], r["phase"], r["core"]) for r in records] == [
        (k, batch, context, phase, core)
        for k in (16, 64)
        for batch in (1, 2)
        for context in (32, 300)
        for phase in ("decode", "prefill")
        for core in (*toy.DENSE_CORES, "SparseAttention")
    ]
    for record in records:
        assert record["ms_p10"] <= record["ms_median"] <= record["ms_p90"]
        per_call = record["batch"] * record["queries"]
        assert record["tokens_per_s"] == pytest.approx(per_call / record["ms_median"] * 1e3)
        assert record["floor_ms"] == max(record["floor_ms_by_bytes"], record["floor_ms_by_flops"])
        assert record["floor_fraction"] == pytest.approx(record["floor_ms"] / record["ms_median"])
        assert 0 < record["peak_mib"] < 200
        assert 0 < record["ttft_s"] < 60
        assert record["machine"]["threads"] == 1
        assert record["versions"]["onnxruntime"].startswith("1.")
        assert len(record["source"]["sha256"]) == 64
        assert "bench/compare.py --onnx" in record["command"]
        assert 0 <= record["agreement"]["top1"] <= 1
        assert (record["agreement"]["loss_error"] is None) == (record["batch"] == 1), "one block of few tokens a row"
        assert record["agreement"]["tokens"] == record["batch"] * (16 if record["context"] == 32 else 20)
        assert 0 < record["loss"] < 100
    sides = len(toy.DENSE_CORES) + 1
    for *dense, sparse in zip(*(records[i::sides] for i in range(sides)), strict=True):
        strongest = min(dense, key=lambda record: record["ms_median"])
        assert [record["strongest"] for record in dense] == [record is strongest for record in dense]
        assert {record["capacity"] for record in (*dense, sparse)} == {max(sparse["context"], sparse["k"])}
        assert sparse["speedup"] == pytest.approx(strongest["ms_median"] / sparse["ms_median"])
        assert sparse["speedup_predicted"] == pytest.approx(strongest["floor_ms"] / sparse["floor_ms"])
        assert strongest["speedup"] == 1
        if sparse["context"] <= sparse["k"]:
            assert [sparse["loss"]] * len(dense) == pytest.approx([record["loss"] for record in dense], abs=1e-4)


def test_what_does_not_fit_is_listed_and_the_operators_are_profiled(results: tuple[Path, str]):
    skipped = lines(results[0], "skipped")
    assert {(record["context"], record["k"]) for record in skipped} == {(5000, 16), (5000, 64)}
    assert all("beyond the engines' capacity of 4,096 tokens" in record["reason"] for record in skipped)
    for record in lines(results[0], "profile"):
        assert record["context"] == 300
        sparse = record["variant"] == "sparse"
        assert (record["ms"]["indexer, selection"] > 0) == sparse
        assert record["ms"]["attention core"] > 0


def test_it_ends_with_the_tables_the_paths_and_one_sentence(results: tuple[Path, str]):
    out, printed = results
    pictures = {"latency.png", "speedup.png", "memory.png", "operators.png"}
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "report.html", MANIFEST, *pictures}
    *_, paths, sentence = printed.strip().splitlines()
    assert "parity gate green" in printed.splitlines()[0]
    assert paths == f"wrote {out / 'report.html'} and {out / 'results.jsonl'}"
    assert sentence.startswith("At 300 tokens of context (batch 1, ort, fp32) one decoding step takes")
    for title in ("Crossover", "Time to first token", "Agreement and loss", "Where the time goes", "Not measured"):
        assert title in printed
    tables = [line for line in printed.splitlines()[:-2] if not line.startswith("parity gate green")]
    assert max(map(len, tables)) <= 130
    for k in (16, 64):
        assert re.search(rf"k = {k}; dense: ({'|'.join(toy.DENSE_CORES)})\b", printed)


def test_quick_builds_missing_engines_and_uses_random_caches(export: Path, tmp_path: Path, capsys):
    arguments = [*options(export, tmp_path / "engines", tmp_path / "bench"), "--quick", "--context", "200"]
    code, output, error = run_command(compare.main, arguments, capsys)
    assert (code, error) == (0, "")
    assert "building the ort engines" in output
    records = lines(tmp_path / "bench", "timing")
    assert {record["phase"] for record in records} == {"decode", "prefill"}
    assert all(record["agreement"] is record["loss"] is record["ttft_s"] is None for record in records)


def test_engines_that_are_not_there_are_not_replaced_by_others(tmp_path: Path, capsys):
    code, _, error = run_command(compare.main, ["--engines", str(tmp_path / "typo")], capsys)
    assert code == 1 and "typo holds no engines: run `python -m engines.build`, or name the export" in one_line(error)
    assert not list(tmp_path.iterdir())


def test_one_folder_without_engines_among_several_is_named(export, engines, tmp_path: Path, capsys):
    arguments = [*options(export, engines, tmp_path / "bench"), "--engines", str(engines), str(tmp_path / "typo")]
    code, _, error = run_command(compare.main, arguments, capsys)
    assert code == 1 and "typo holds no engines" in one_line(error)


@pytest.mark.parametrize("options", [["--caches", "prefill"], ["--peers", "transformers"]])
def test_quick_contradicts_what_takes_long(options: list[str], capsys):
    code, _, error = run_command(compare.main, ["--quick", *options], capsys)
    assert code == 1 and "--quick takes random caches and no peers" in one_line(error)


def test_every_k_of_a_group_must_be_asked_for(engines: Path):
    (group,), _ = matrix.groups(open_engine(engines / "ort" / name) for name in ("dense", "sparse"))
    group = replace(group, sparse=replace(group.sparse, topk=(8, 16)))
    for k, found in (([8, 16, 64], True), ([16], False), (None, True)):
        assert compare.wanted(group, argparse.Namespace(backend=None, precision=None, k=k)) == found


def test_the_budget_is_what_was_asked_for():
    for options, budget in (
        (["--runs", "7", "--max-seconds", "2"], measure.Budget(7, at_most=2)),
        (["--runs", "7", "--quick"], measure.Budget(7, at_most=compare.QUICK_SECONDS)),
        (["--quick"], measure.Budget(5, at_most=compare.QUICK_SECONDS)),
    ):
        assert compare.budget_of(compare.parse_arguments(options)) == budget


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
    assert not list(tmp_path.glob("bench*"))


def test_a_gate_that_crashes_is_not_left_out(export, engines, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(runs.parity, "gates", lambda *_: 1 / 0)
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "--quick"]
    code, _, error = run_command(compare.main, arguments, capsys)
    assert code == 1 and "the measuring process ended with exit code 1" in error
    assert not list(tmp_path.glob("bench*"))


def two_groups(export: Path, engines: Path, another_k: Path, out: Path) -> list[str]:
    return [*options(export, engines, out), "--engines", str(engines), str(another_k), "--context", "32", "--quick"]


def fails_the_second_time(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    measure_group, calls = compare.measure_group, []

    def measure(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return measure_group(*arguments)

    monkeypatch.setattr(compare, "measure_group", measure)


def test_a_group_that_fails_is_listed(export, engines, another_k, tmp_path: Path, monkeypatch, capsys):
    fails_the_second_time(monkeypatch, UserError("out of memory"))
    code, _, _ = run_command(compare.main, two_groups(export, engines, another_k, tmp_path / "bench"), capsys)
    assert code == 0 and len(lines(tmp_path / "bench", "timing")) > 0
    assert "out of memory" in [record["reason"] for record in lines(tmp_path / "bench", "skipped")]


def engines_for_a_gpu(engines: Path, folder: Path) -> Path:
    """Engines of TensorRT-RTX, as far as that can be told without loading one: this machine has no GPU."""
    for variant in ("dense", "sparse"):
        copy = copy_tree(engines / "ort" / variant, folder / "tensorrt-rtx" / variant)
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest |= {"backend": "tensorrt-rtx", "versions": {"runtime": runtime_version("tensorrt-rtx")}}
        (copy / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="an engine for GPUs is refused where there is none")
def test_engines_that_cannot_run_here_are_listed(export, engines, tmp_path: Path, monkeypatch, capsys):
    others = engines_for_a_gpu(engines, tmp_path / "rtx")
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "--phase", "decode", "--quick"]
    code, _, _ = run_command(compare.main, [*arguments, "--engines", str(engines), str(others)], capsys)
    assert code == 0 and {record["backend"] for record in lines(tmp_path / "bench", "timing")} == {"ort"}
    (skipped,) = lines(tmp_path / "bench", "skipped")
    assert skipped["backend"] == "tensorrt-rtx" and "needs an NVIDIA GPU" in skipped["reason"]
    # Alone they leave nothing to measure, nor a reason to time their peers.
    monkeypatch.setattr(compare, "measure_peers", lambda *_: pytest.fail("measures"))
    arguments = [*options(export, others, tmp_path / "none"), "--context", "32", "--phase", "decode"]
    code, _, error = run_command(compare.main, arguments, capsys)
    assert code == 1 and "nothing could be measured" in one_line(error) and "needs an NVIDIA GPU" in error
    assert not list(tmp_path.glob("none*"))


def test_records_say_what_was_switched_off(monkeypatch):
    monkeypatch.setenv("DSA_HUGE_PAGES", "0")
    arguments = ["--engines", "out/e"]
    facts = compare.provenance(compare.parse_arguments(arguments), arguments)
    assert facts["command"] == "DSA_HUGE_PAGES=0 python bench/compare.py --engines out/e"


def test_a_case_without_memory_costs_no_other(export, engines, tmp_path: Path, monkeypatch, capsys):
    fill = runs.fill

    def fill_short_ones(sessions, case, *others):
        if case.context > 40:
            raise OutOfMemory("the GPU's memory is full")
        return fill(sessions, case, *others)

    monkeypatch.setattr(runs, "fill", fill_short_ones)
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "48", "--phase", "decode"]
    code, _, _ = run_command(compare.main, arguments, capsys)
    timed = lines(tmp_path / "bench", "timing")
    assert code == 0 and {record["context"] for record in timed} == {32}
    assert all(record["peak_mib"] > 0 for record in timed)
    (skipped,) = (r for r in lines(tmp_path / "bench", "skipped") if r.get("context") == 48)
    assert skipped["reason"] == "the GPU's memory is full"


def test_nothing_measured_leaves_nothing(export, engines, tmp_path: Path, monkeypatch, capsys):
    def measure(*_):
        raise UserError("out of memory")

    monkeypatch.setattr(compare, "measure_group", measure)
    monkeypatch.setattr(compare, "measure_peers", lambda *_: [records.peer("transformers", 9.0)])
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "--phase", "decode"]
    code, _, error = run_command(compare.main, arguments, capsys)
    assert code == 1 and "nothing could be measured: out of memory" in one_line(error)
    assert not list(tmp_path.glob("bench*"))


def test_a_peer_says_which_version_of_it_was_measured(export, engines, tmp_path: Path, monkeypatch, capsys):
    peer = records.peer("onnxruntime-genai", 9.0, versions={"onnxruntime-genai": "0.18.0", "onnxruntime": "1.2"})
    monkeypatch.setattr(compare, "measure_peers", lambda *_: [peer])
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "--phase", "decode"]
    code, _, _ = run_command(compare.main, arguments, capsys)
    (written,) = lines(tmp_path / "bench", "peer")
    assert code == 0 and written["versions"]["onnxruntime-genai"] == "0.18.0"
    assert written["versions"]["onnxruntime"] == "1.2" and "numpy" in written["versions"]
    assert all("onnxruntime-genai" not in record["versions"] for record in lines(tmp_path / "bench", "timing"))


def test_peers_that_were_asked_for_are_measured_or_listed(export, engines, tmp_path: Path, monkeypatch):
    """Also where nothing decodes one row, and where the export is gone, which genai does not need."""
    genai = tmp_path / "genai"
    arguments = [*options(export, engines, tmp_path / "bench"), "--genai", str(genai), "--peers", "masked"]
    arguments += ["--genai-python", sys.executable]
    args = compare.parse_arguments(arguments)
    (group,), _ = matrix.groups(matrix.discover([engines])[0])
    records = compare.measure_peers(group, [], np.arange(9), args)
    names = ["masked", "onnxruntime-genai (genai)"]
    assert [record["peer"] for record in records] == names
    assert all("peers decode one row" in record["reason"] for record in records)
    monkeypatch.setitem(group.sparse.manifest, "source", {"path": str(tmp_path / "gone")})
    records = compare.measure_peers(group, [32], np.arange(33), args)
    assert [record["peer"] for record in records] == names
    assert "gone" in records[0]["reason"] and "holds no genai_config.json" in records[1]["reason"]
    json.dumps(records)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--genai", "nothing", "--genai-python", sys.executable], "nothing holds no genai_config.json"),
        (["--genai", "nothing", "--genai-python", "no-python"], "no-python is no program"),
        (["--checkpoint", "nothing"], "no such folder: nothing"),
    ],
)
def test_peers_of_wrong_names_are_refused_before_anything_is_measured(
    export, engines, tmp_path: Path, monkeypatch, capsys, more: list[str], message: str
):
    monkeypatch.setattr(compare, "measure_all", lambda *_: pytest.fail("measures"))
    code, _, error = run_command(compare.main, [*options(export, engines, tmp_path / "bench"), *more], capsys)
    assert code == 1 and message in one_line(error)


def test_by_default_peers_run_where_one_row_is_decoded():
    for more, peers in (
        ([], ["transformers", "masked"]),
        (["--phase", "prefill"], ["none"]),
        (["--batch", "2"], ["none"]),
    ):
        assert compare.parse_arguments(more).peers == peers


def test_timings_outlive_what_is_measured_beside_them(export, engines, tmp_path: Path, monkeypatch, capsys):
    def fail(*_):
        raise UserError("no memory left")

    monkeypatch.setattr(runs, "peak_memory", fail)
    arguments = [*options(export, engines, tmp_path / "bench"), "--context", "32", "--phase", "decode"]
    code, _, _ = run_command(compare.main, arguments, capsys)
    timed = lines(tmp_path / "bench", "timing")
    assert code == 0 and timed and all(record["peak_mib"] is None for record in timed)
    assert "memory and profile: no memory left" in [record["reason"] for record in lines(tmp_path / "bench", "skipped")]


def test_what_was_measured_before_a_stop_is_kept(export, engines, another_k, tmp_path: Path, monkeypatch, capsys):
    fails_the_second_time(monkeypatch, KeyboardInterrupt())
    code, _, error = run_command(compare.main, two_groups(export, engines, another_k, tmp_path / "bench"), capsys)
    assert code == 1 and "what was measured until then is in" in one_line(error)
    assert len(lines(tmp_path / "bench.partial", "timing")) > 0 and not (tmp_path / "bench").exists()


def change_engine(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"edited")


def change_version(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "versions": {"runtime": "0.1"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(change_engine, "dense/model.onnx has 6 bytes instead of"), (change_version, "was built with ort 0.1")],
)
def test_damaged_engines_are_not_measured(export: Path, engines: Path, tmp_path: Path, capsys, damage, message):
    copy_tree(engines, tmp_path / "engines")
    for dense in toy.DENSE_CORES.values():
        damage(tmp_path / "engines" / "ort" / dense)
    code, _, error = run_command(compare.main, options(export, tmp_path / "engines", tmp_path / "bench"), capsys)
    assert code == 1
    assert message in one_line(error)


def test_engines_of_an_earlier_export_are_not_measured(tmp_path: Path, capsys):
    export = toy.write_export(tmp_path / "onnx")
    arguments = options(export, tmp_path / "engines", tmp_path / "bench")
    build.build("ort", build.parse_arguments(["--onnx", str(export), "--out", str(tmp_path / "engines")]))
    manifest = json.loads((export / MANIFEST).read_text())
    manifest["weights"]["sha256"] = "1" * 64
    (export / MANIFEST).write_text(json.dumps(manifest))
    code, _, error = run_command(compare.main, arguments, capsys)
    assert code == 1
    assert "was exported again since" in one_line(error)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--context", "99999"], "no case can be measured: beyond the engines' capacity of 4,096 tokens"),
        (["--batch", "9"], "built for 8 rows"),
        (["--peer-context", "7"], "--peer-context 7: no engine decodes one row there; add it to --context"),
        (["--backend", "tensorrt-rtx"], "no pair of dense and sparse engines for --backend tensorrt-rtx"),
        (["--backend", "tensorflow"], "no backend is called 'tensorflow': choose from ort"),
        (["--k", "17"], "no pair of dense and sparse engines for --k 17"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt cannot be read as text"),
        (["--onnx", "nowhere"], "nowhere/tokenizer.json is missing"),
        (
            ["--onnx", "nowhere", "--engines", "nothing"],
            "nowhere holds no manifest.json: expected the output of `python -m dsa_export.onnx`",
        ),
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
    from bench.matrix import Case
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
