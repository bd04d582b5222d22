"""Backend torch: the same numbers as ONNX Runtime, whatever the session does with the caches."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, checkpoint_hash
from dsa_export.onnx.__main__ import main as export_main
from engines import build, generate
from engines.memory import OutOfMemory
from engines.session import Runner, Session, open_runner
from tests.engines.commands import copy_tree, one_line, run_command

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(dsa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(dsa_folder, tmp_path_factory.mktemp("checkpoint") / "dsa")


@pytest.fixture(scope="module")
def real_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "onnx"
    export_main(["--model", str(checkpoint), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def built(real_export: Path) -> Path:
    folder = real_export.parent / "engines"
    for backend in ("ort", "torch"):
        build.build(backend, build.parse_arguments(["--onnx", str(real_export), "--out", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def torch_engines(real_export: Path) -> Path:
    """Without those of ONNX Runtime, which are others where that would use the GPU."""
    folder = real_export.parent / "torch engines"
    for name, more in (("engines", []), ("short", ["--variant", "sparse", "--dense-slots", "256"])):
        options = ["--onnx", str(real_export), "--out", str(folder / name), "--backend", "torch", *more]
        build.build("torch", build.parse_arguments(options))
    (folder / "engines" / "torch" / "dense at first").symlink_to(folder / "short" / "torch" / "sparse")
    return folder / "engines" / "torch"


@pytest.fixture(scope="module", params=["dense", "sparse", "dense at first"])
def pair(request: pytest.FixtureRequest, real_export: Path, built: Path) -> tuple[Runner, Runner]:
    variant = request.param
    if variant == "dense at first":
        built, variant = built / "dense at first", "sparse"
        options = ["--onnx", str(real_export), "--out", str(built), "--variant", variant, "--dense-slots", "256"]
        for backend in ("ort", "torch"):
            build.build(backend, build.parse_arguments([*options, "--backend", "ort", "torch"]))
    return open_runner(built / "ort" / variant), open_runner(built / "torch" / variant)


def prompts(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 512, length) for length in lengths]


def test_pickled_weights_are_linked_too(real_export: Path, checkpoint: Path, tmp_path: Path):
    folder = copy_tree(checkpoint, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    export = copy_tree(real_export, tmp_path / "onnx")
    manifest = json.loads((export / MANIFEST).read_text())
    manifest["source"] = {"path": str(folder), "sha256": checkpoint_hash(folder)}
    (export / MANIFEST).write_text(json.dumps(manifest))
    arguments = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--variant", "sparse"]
    build.build("torch", build.parse_arguments(arguments))
    assert open_runner(tmp_path / "engines" / "torch" / "sparse")


def test_a_build_reads_a_checkpoint_once(real_export: Path, checkpoint: Path, tmp_path: Path, monkeypatch):
    """To see that it is the one that was exported, and for the manifests of both engines."""
    folder = copy_tree(checkpoint, tmp_path / "copy")
    export = copy_tree(real_export, tmp_path / "onnx")
    manifest = json.loads((export / MANIFEST).read_text())
    (export / MANIFEST).write_text(json.dumps(manifest | {"source": manifest["source"] | {"path": str(folder)}}))
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, kind: (hashed.append(Path(f.name).name), digest(f, kind))[1])
    build.build("torch", build.parse_arguments(["--onnx", str(export), "--out", str(tmp_path / "engines")]))
    assert hashed.count("model.safetensors") == hashed.count("config.json") == 1


def test_torch_computes_what_onnx_runtime_does(pair: tuple[Runner, Runner]):
    """Rows of different lengths, in chunks, across a growth of the caches, then decoding."""
    sessions = [Session(runner, 3, prefill_chunk=50) for runner in pair]
    for rows in (prompts([70, 1, 240]), prompts([100, 30, 40])):
        expected, found = (session.prefill(rows) for session in sessions)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert [session.capacity for session in sessions] == [512, 512]
    for token in range(5, 9):
        expected, found = (session.decode([token] * 3) for session in sessions)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("slots", [None, 64])
def test_short_caches_are_attended_to_densely(
    real_export: Path, tmp_path: Path, slots: int | None, monkeypatch: pytest.MonkeyPatch
):
    options = ["--onnx", str(real_export), "--out", str(tmp_path), "--backend", "torch"]
    build.build("torch", build.parse_arguments([*options, *(["--dense-slots", str(slots)] if slots else [])]))
    sparse, dense = (open_runner(tmp_path / "torch" / name) for name in ("sparse", "dense"))
    few = slots or sparse.engine.max_topk
    assert sparse.engine.dense_slots == few and sparse.engine.selecting_slots == few + 1
    tokens = prompts([few - 1])
    expected = Session(dense, capacity=few).prefill(tokens)

    session = Session(sparse, capacity=few)
    with monkeypatch.context() as patch:  # neither selection nor index queries
        for name in ("index_topk", "round_queries", "sparse_attention"):
            patch.setattr(f"dsa_export.model.attention.dsa.{name}", None)
        np.testing.assert_array_equal(session.prefill(tokens), expected)
    session.reserve(few + 1, exact=True)  # what was cached while they were short serves the selection later
    other = Session(sparse, capacity=few + 1)
    other.prefill(tokens)
    if not slots:
        np.testing.assert_allclose(session.decode([7]), other.decode([7]), atol=TOLERANCE)
    for name, one, two in zip(
        sparse.engine.cache_names(), session.caches.tensors.values(), other.caches.tensors.values(), strict=True
    ):
        first_layer = name[0].startswith("0.")
        assert not slots or not first_layer or torch.allclose(one[:, :, : few - 1], two[:, :, : few - 1], atol=1e-5)


def test_compiled_decoding_computes_the_same(real_export: Path, built: Path, tmp_path: Path):
    """What torch.compile makes of the first batch and capacity fits every other one."""
    options = ["--onnx", str(real_export), "--out", str(tmp_path), "--variant", "sparse", "--compile"]
    build.build("torch", build.parse_arguments([*options, "--backend", "torch"]))
    runners = [open_runner(folder / "torch" / "sparse") for folder in (built, tmp_path)]
    assert [runner.compiles for runner in runners] == [False, True]
    for lengths in ([62, 9], [40, 62, 5]):
        sessions = [Session(runner, len(lengths), capacity=64) for runner in runners]
        for session in sessions:
            session.prefill(prompts(lengths))
        for token in range(5, 9):
            expected, found = (session.decode([token] * len(lengths)) for session in sessions)
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
            if (lengths, token) == ([62, 9], 5):
                compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert sessions[1].capacity > 64
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch.compile needs another compiler")
def test_a_compiled_engine_without_a_compiler_is_not_built(real_export: Path, tmp_path: Path):
    options = ["--onnx", str(real_export), "--out", str(tmp_path / "engines"), "--variant", "sparse", "--compile"]
    command = [sys.executable, "-m", "engines.build", "--backend", "torch", *options]
    environment = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1 and "torch.compile failed for" in one_line(done.stderr)
    assert "/nowhere/g++" in done.stderr and "or build the engine without --compile" in done.stderr
    assert not any((tmp_path / "engines" / "torch").iterdir())


def test_rows_are_views_of_the_same_memory(pair: tuple[Runner, Runner]):
    for runner in pair:
        caches, prompt = runner.allocate(3, 64), prompts([20])[0]
        one = np.ones(1, np.int64)
        middle = runner.rows(caches, 1, 2)
        runner.run(middle, prompt[None], 0 * one, 20 * one)
        tail = runner.run(runner.rows(caches, 1, 3), np.array([[7], [7]]), np.array([20, 0]), np.array([1, 1])).copy()
        expected = Session(runner).prefill([[*prompt, 7]])[0]
        np.testing.assert_allclose(tail[0], expected, atol=TOLERANCE)
        other = runner.allocate(1, 128)
        runner.copy(middle, other, 20)
        np.testing.assert_allclose(
            runner.run(other, np.array([[7]]), 20 * one, one)[0], expected, atol=TOLERANCE
        )  # fmt: skip


def test_the_weights_cost_no_space(checkpoint: Path, built: Path):
    for variant in ("dense", "sparse"):
        linked = built / "torch" / variant / "model.safetensors"
        assert linked.samefile(checkpoint / "model.safetensors")


def test_the_command_runs_it(built: Path, capsys: pytest.CaptureFixture[str]):
    answers = []
    for backend in ("ort", "torch"):
        options = ["--engine", str(built / backend / "sparse"), "--prompt", "def main", "--raw"]
        code, output, _ = run_command(generate.main, [*options, "--max-new-tokens", "12"], capsys)
        assert code == 0
        answers.append(output)
    assert answers[0] == answers[1]


def test_a_random_indexer_is_the_exported_one(qwen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export_main(["--model", str(qwen_folder), "--random-indexer", "--topk", "16", "--out", str(tmp_path / "onnx")])
    options = ["--onnx", str(tmp_path / "onnx"), "--out", str(tmp_path), "--variant", "sparse"]
    for backend in ("ort", "torch"):
        assert run_command(build.main, [*options, "--backend", backend], capsys)[0] == 0
    rows = prompts([200])
    expected, found = (Session(open_runner(tmp_path / b / "sparse")).prefill(rows) for b in ("ort", "torch"))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_a_checkpoint_that_changed_or_is_gone(real_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export = copy_tree(real_export, tmp_path / "onnx")
    manifest = json.loads((export / MANIFEST).read_text())
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--backend", "torch"]
    for source, message in (
        ({**manifest["source"], "sha256": "0" * 64}, "has changed since it was exported"),
        ({"path": "Qwen/Qwen2.5-0.5B", "sha256": None}, "is no folder here"),
    ):
        (export / MANIFEST).write_text(json.dumps({**manifest, "source": source}))
        code, _, error = run_command(build.main, options, capsys)
        assert code == 1 and message in one_line(error)
    assert not (tmp_path / "engines" / "torch" / "dense").exists()


@pytest.mark.parametrize(
    "failure, raised",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"), OutOfMemory),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory),  # a graph that is instantiated or launched
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (RuntimeError("an error of ours"), RuntimeError),
    ],
)
def test_no_memory_for_a_call_is_said(
    pair: tuple[Runner, Runner], failure: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    """So that a server gives up what it keeps, and lives on."""

    def fail(*_: object) -> None:
        raise failure

    _, runner = pair
    monkeypatch.setattr(type(runner), "_call", fail)
    with pytest.raises(raised) as said:
        Session(runner).prefill([[1, 2, 3]])
    assert type(said.value) is raised


def test_no_memory_for_the_caches_is_said(pair: tuple[Runner, Runner]):
    for runner in pair:
        with pytest.raises(UserError, match=r"no memory for .* GiB of caches"):
            runner.allocate(1, 2**42)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("variant", ["dense", "sparse", "dense at first"])
def test_cuda_graphs_equal_eager(torch_engines: Path, variant: str, monkeypatch: pytest.MonkeyPatch):
    """Decoding by replay equals the same calls without a graph, also after the caches grew, and for single rows."""
    runner = open_runner(torch_engines / variant)
    graphed, eager = Session(runner, 2), Session(runner, 2)
    rows = prompts([250, 30])
    for session in (graphed, eager):
        session.prefill(rows)
    for token in range(5, 20):
        found = graphed.decode([token, token]).copy()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_replay", lambda caches, inputs: runner._call(caches, [t.cuda() for t in inputs]))
            expected = eager.decode([token, token])
        np.testing.assert_allclose(found, expected, atol=1e-2)
    assert graphed.caches.capture is not None  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_of_several_views_share_memory(torch_engines: Path):
    """A batch and one of its rows in turn, each by its own graph: neither disturbs the other."""
    runner = open_runner(torch_engines / "sparse")
    caches = runner.allocate(2, 64)
    runner.randomise(caches, 0)
    row = runner.rows(caches, 1, 2)

    def step(view, rows: int) -> np.ndarray:
        return runner.run(view, np.full((rows, 1), 5), np.full(rows, 40), np.ones(rows, np.int64))

    both, alone = step(caches, 2), step(row, 1)
    np.testing.assert_allclose(alone[0], both[1], atol=1e-2)
    np.testing.assert_array_equal(step(caches, 2), both)
    np.testing.assert_array_equal(step(row, 1), alone)
