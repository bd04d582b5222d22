"""Peak memory is what the formula says, growing adds one tensor at a time, and memory that runs out is one line."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from bench.measure import in_child
from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, sha256
from dsa_export.memory import PeakMemory
from engines import ort
from engines.artifacts import Limits
from engines.memory import Estimate, OutOfMemory, check, estimate
from engines.session import Runner, Session, open_runner
from tests.engines import toy
from tests.engines.commands import copy_tree

MIB = 2**20
SLACK = 24 * MIB  # activations outside attention, arenas' rounding, the interpreter's own


def peak_of_a_full_session(folder: Path, batch: int) -> tuple[float, int]:
    """MiB gained by loading an engine and running a chunk at its last positions, and the formula's bytes."""
    memory = PeakMemory()
    session = Session(open_runner(folder, threads=1, verify=False), batch, capacity=toy.MAX_POSITIONS)
    session.pretend(toy.MAX_POSITIONS - 129)
    session.prefill([np.arange(128)] * batch)
    session.decode([1] * batch)
    peak = memory.mib()
    assert peak is not None
    weights = sum(file["bytes"] for file in session.engine.manifest["files"].values())
    limits = Limits(batch, toy.MAX_POSITIONS, session.engine.limits.prefill_chunk)
    return peak, estimate(session.engine, limits, weights).total


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_the_peak_is_weights_caches_and_a_bounded_workspace(engines: Path, variant: str):
    measured, formula = in_child(peak_of_a_full_session, engines / "ort" / variant, 8, method="spawn")
    assert 0.4 * formula < measured * MIB < formula + SLACK


def peak_of_growing(folder: Path, release: bool) -> float:
    """MiB that full caches need beyond themselves to become twice as large."""
    runner = open_runner(folder, threads=1, verify=False)
    small = runner.allocate(1, 2**18)
    runner.randomise(small, 0)
    memory = PeakMemory()
    memory.reset()
    large = runner.allocate(1, 2**19)
    runner.copy(small, large, 2**18, release=release)
    peak = memory.mib()
    assert peak is not None
    return peak


def test_tensorrt_rtx_builds_in_several_times_its_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engines.memory.available_memory", lambda: 3 * MIB)
    needed = Estimate(weights=2 * MIB, caches=0, workspace=0)
    check("torch", needed)
    with pytest.raises(UserError, match="tensorrt-rtx needs about 8 MiB and this machine has 3 MiB"):
        check("tensorrt-rtx", needed)


def test_an_engine_has_the_threads_that_it_is_given(engines: Path):
    runner = open_runner(engines / "ort" / "sparse", threads=3, verify=False)
    assert runner.session.get_session_options().intra_op_num_threads == 3  # type: ignore[attr-defined]


def test_growing_gives_the_old_caches_back_tensor_by_tensor(engines: Path):
    """Tensors of 32 MiB, which the allocator returns to the system at once; huge pages round what is touched up.

    Spawned: in the heap of a process that has run tests a hole may be as large, and what fills it stays.
    """
    whole = toy.LAYERS * 2**18 * (2 * toy.HKV * toy.D + toy.DI) * 4 / MIB
    sparse = engines / "ort" / "sparse"
    assert in_child(peak_of_growing, sparse, True, method="spawn") < 0.7 * whole
    assert in_child(peak_of_growing, sparse, False, method="spawn") > 0.9 * whole


@pytest.mark.parametrize(
    "error",
    [
        state.RuntimeException("[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc"),
        state.Fail("[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 8"),
    ],
)
def test_no_memory_while_loading(error: Exception, engines: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ort.onnxruntime, "InferenceSession", refuse)
    with pytest.raises(UserError, match=r"cannot load .*model.onnx: memory is full"):
        open_runner(engines / "ort" / "dense")


def test_an_engine_whose_graph_was_edited_by_hand(engines: Path, tmp_path: Path):
    """With its hash made to fit, the edit reaches ONNX Runtime, which refuses it: still one line."""
    folder = copy_tree(engines / "ort" / "sparse", tmp_path / "sparse")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / "model.onnx"
    manifest["files"]["model.onnx"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="NoSuchOperator"):
        open_runner(folder)


def test_no_memory_for_caches(runners: dict[str, Runner]):
    with pytest.raises(
        OutOfMemory, match=r"^no memory for 2097152\.0 GiB of caches \(1 rows of 4398046511104 tokens\)$"
    ):
        runners["dense"].allocate(1, 2**42)  # of 512 bytes


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError("Failed to allocate memory for requested buffer of size 134217728"), " of 128 MiB"),
        (MemoryError(), ""),
    ],
)
def test_no_memory_while_running(runner: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception, size: str):
    def refuse(*_: object) -> None:
        raise error

    session = Session(runner)
    monkeypatch.setattr(runner, "session", types.SimpleNamespace(run_with_iobinding=refuse))
    with pytest.raises(
        OutOfMemory, match=rf"no memory for the workspace{size} of a call of .*: fewer or shorter rows need less"
    ):
        session.prefill([[1, 2, 3]])
    assert session.lengths.tolist() == [0]
    monkeypatch.undo()
    assert np.isfinite(session.prefill([[1, 2, 3]])).all()
