"""The runner of TensorRT and TensorRT-RTX, as far as it can be tested without a GPU.

What the products compute is stood in for by ONNX Runtime, which works on the addresses and shapes that the runner sets:
wrong bindings give wrong numbers. What is checked before loading is checked with real files.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, sha256
from engines import artifacts, build, tensorrt_runner
from engines.artifacts import open_engine
from engines.ort import CUDA_PROVIDER
from engines.ort_cuda import OrtCudaRunner
from engines.scheduler import Batch, Row
from engines.session import Runner, Session, open_runner
from engines.tensorrt_runner import DECODE, PREFILL, TensorRTRunner, check_gpu
from plugins import cpu
from tests.engines import toy
from tests.engines.commands import copy_tree

CAPACITY, CHUNK = 512, 32
STREAM = 0x5EA


@pytest.fixture(scope="module")
def standard_engines(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of standard operators: what stands in for NVIDIA's products here has no others."""
    folder = tmp_path_factory.mktemp("standard")
    build.build("ort", build.parse_arguments(["--onnx", str(export), "--out", str(folder), "--standard-operators"]))
    return folder


def plan_folder(
    standard_engines: Path, tmp_path: Path, variant: str, backend: str = "tensorrt", **changes: Any
) -> Path:
    """An engine folder of an NVIDIA backend: a real manifest, and the toy's graph where the plan would be."""
    folder = copy_tree(standard_engines / "ort" / variant, tmp_path / "engines" / backend / variant)
    plan = folder / "engine.plan"
    plan.write_bytes(b"plan")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {
        "backend": backend,
        "limits": {"max_batch": 4, "max_context": CAPACITY, "prefill_chunk": CHUNK},
        "files": {"engine.plan": {"bytes": 4, "sha256": sha256(plan)}},
        "profiles": [
            {"name": "decode", "plan": "engine.plan", "number": 0},
            {"name": "prefill", "plan": "engine.plan", "number": 1},
        ],
        "compute_capability": ["8.9"],
        **changes,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


class Context:
    """IExecutionContext: runs the toy's graph on the memory behind the addresses."""

    def __init__(self, graph: Path):
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1
        self.refused: set[str] = set()
        self.changed: list[str] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changed.append(name)
        self.shapes[name] = shape
        fits = {"input_ids": shape[-1] == 1 if self.profile == 0 else shape[-1] <= CHUNK}
        return fits.get(name, True) and (not name.startswith("past_key") or shape[2] == CAPACITY)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changed.append(name)
        self.addresses[name] = address
        return name not in self.refused

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        binding = self.session.io_binding()
        for tensor in self.session.get_inputs():
            binding.bind_ortvalue_input(tensor.name, self._value(tensor.name, tensor.type, self.shapes[tensor.name]))
        for tensor in self.session.get_outputs():
            past = tensor.name.replace("present", "past_key_values")
            shape = self.shapes.get(past, (self.shapes["input_ids"][0], 1, toy.V))
            assert tensor.name == "logits" or self.addresses[tensor.name] == self.addresses[past]
            binding.bind_ortvalue_output(tensor.name, self._value(tensor.name, tensor.type, shape))
        self.session.run_with_iobinding(binding)
        return True

    def _value(self, name: str, kind: str, shape: tuple[int, ...]) -> Any:
        element = {"tensor(int64)": ctypes.c_int64, "tensor(float)": ctypes.c_float}[kind]
        memory = (element * int(np.prod(shape))).from_address(self.addresses[name])
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ctypeslib.as_array(memory).reshape(shape))


class Logger:
    ERROR, INTERNAL_ERROR, INFO = "error", "internal error", "info"

    def __init__(self) -> None: ...


def product(graph: Path, loads: bool = True) -> Any:
    """A module with the names of tensorrt's that the runner uses."""

    class Runtime:
        def __init__(self, logger: Any):
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            self.logger.log(Logger.INFO, "loading")
            if loads:
                return types.SimpleNamespace(create_execution_context=lambda: Context(graph))
            self.logger.log(Logger.ERROR, "header\nis wrong")
            self.logger.log(Logger.ERROR, "so it failed")
            return None

    return types.SimpleNamespace(__version__="0", ILogger=Logger, Runtime=Runtime)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU of compute capability 8.9 whose memory is this machine's. Returns a way to choose the product."""
    version = artifacts.runtime_version
    monkeypatch.setattr(artifacts, "runtime_version", lambda backend: version("ort"))
    monkeypatch.setattr(TensorRTRunner, "device", torch.device("cpu"))
    monkeypatch.setattr(TensorRTRunner, "_new_stream", lambda self: types.SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(TensorRTRunner, "_on_stream", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(TensorRTRunner, "_compute_capability", lambda self: "8.9")

    def choose(module: Any) -> None:
        monkeypatch.setattr(tensorrt_runner.importlib, "import_module", lambda name: module)

    return choose


@pytest.fixture(params=["dense", "sparse"])
def pair(
    request: pytest.FixtureRequest, standard_engines: Path, tmp_path: Path, machine: Any, runners: dict[str, Runner]
) -> tuple[Runner, Runner]:
    folder = plan_folder(standard_engines, tmp_path, request.param)
    machine(product(folder / "model.onnx"))
    return runners[request.param], open_runner(folder)


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, toy.END_OF_TEXT, length) for length in lengths]


def test_a_session_computes_what_onnx_runtime_does(pair: tuple[Runner, Runner]):
    expected, found = (Session(runner, 3) for runner in pair)
    assert found.capacity == CAPACITY and found.chunk_tokens() == CHUNK
    rows = prompts(70, 1, 240)
    np.testing.assert_allclose(found.prefill(rows), expected.prefill(rows), atol=1e-4)
    for token in range(5):
        np.testing.assert_allclose(found.decode([token] * 3), expected.decode([token] * 3), atol=1e-4)


def test_rows_are_views_into_the_device_memory(pair: tuple[Runner, Runner]):
    """As the server uses them: row 1 is pre-filled alone, rows 1 and 2 decode together."""
    results = []
    for runner in pair:
        batch = Batch(runner, 3, CAPACITY)
        rows = [Row(types.SimpleNamespace(prompt=prompt)) for prompt in prompts(1, 40, 33)]  # type: ignore[arg-type]
        for row in rows:
            batch.take(row)
        for row in rows[1:]:
            while (logits := batch.prefill(row)) is None:
                pass
            row.pending = np.array([logits.argmax()])
        results.append(np.stack([logits.copy() for _, logits in batch.decode()]))
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)


def test_onnx_runtime_on_device_memory(
    standard_engines: Path, runners: dict[str, Runner], monkeypatch: pytest.MonkeyPatch
):
    """The runner of the CUDA provider, with this machine's memory as the device's."""
    monkeypatch.setattr(OrtCudaRunner, "device", torch.device("cpu"))
    monkeypatch.setattr(OrtCudaRunner, "providers", ("CPUExecutionProvider",))
    for variant in ("dense", "sparse"):
        runner = runners[variant]
        expected, found = (
            Session(r, 2) for r in (runner, OrtCudaRunner(open_engine(standard_engines / "ort" / variant)))
        )
        for rows in (prompts(200, 3), prompts(100, 70)):
            np.testing.assert_allclose(found.prefill(rows), expected.prefill(rows), atol=1e-4)
        assert found.capacity == 512
        np.testing.assert_allclose(found.decode([1, 2]), expected.decode([1, 2]), atol=1e-4)
    monkeypatch.setattr(OrtCudaRunner, "providers", (CUDA_PROVIDER, "CPUExecutionProvider"))  # which does not load here
    with pytest.raises(UserError, match="ONNX Runtime cannot load CUDAExecutionProvider: onnxruntime-gpu wants"):
        OrtCudaRunner(open_engine(standard_engines / "ort" / "dense"))
    with pytest.raises(UserError, match="dense-gqa was built for CPUs: remove it"):
        OrtCudaRunner(open_engine(standard_engines / "ort" / "dense-gqa"))
    if cpu.fast_here():
        with pytest.raises(
            UserError, match="sparse was built for CPUs, and there is a GPU here: run `python -m engines"
        ):
            OrtCudaRunner(runners["sparse"].engine)


def test_each_phase_has_its_profile(pair: tuple[Runner, Runner]):
    _, runner = pair
    numbers = {name: context.profile for name, context in runner._contexts.items()}  # type: ignore[attr-defined]
    assert numbers == {DECODE: 0, PREFILL: 1}
    caches = runner.allocate(1, 1)
    with pytest.raises(UserError, match=r"does not take input_ids of shape \[1, 33\].*python -m engines.build"):
        runner.run(caches, np.zeros((1, CHUNK + 1), np.int64), np.array([0]), np.array([1]))


def test_an_address_that_is_refused_is_not_passed_over(pair: tuple[Runner, Runner]):
    """TensorRT would go on with the address of before: another row's cache."""
    _, runner = pair
    caches = runner.allocate(1, 1)
    runner._contexts[DECODE].refused.add("past_key_values.0.key")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"cannot bind past_key_values.0.key at 0x.*python -m engines.build"):
        runner.run(caches, np.zeros((1, 1), np.int64), np.array([0]), np.array([1]))


def test_a_step_changes_no_cache_that_is_bound(pair: tuple[Runner, Runner]):
    """Every change makes TensorRT call onShapeChange of all plugins behind it."""
    _, runner = pair
    caches, others = runner.allocate(1, 1), runner.allocate(1, 1)
    context = runner._contexts[DECODE]  # type: ignore[attr-defined]

    def changed(caches: Any, past: int) -> set[str]:
        context.changed.clear()
        runner.run(caches, np.zeros((1, 1), np.int64), np.array([past]), np.array([1]))
        return {name for name in context.changed if "." in name}

    everything = changed(caches, 0)
    assert {"past_key_values.0.key", "present.1.value"} < everything
    assert changed(caches, 1) == set()
    assert changed(others, 0) == everything


def test_the_capacity_is_the_builds(pair: tuple[Runner, Runner]):
    _, runner = pair
    assert runner.allocate(2, 1).capacity == CAPACITY
    with pytest.raises(UserError, match="was built for 512 tokens per row, not for 513"):
        runner.allocate(1, CAPACITY + 1)
    with pytest.raises(UserError, match="513 tokens do not fit into 512"):
        Session(runner).prefill(prompts(CAPACITY + 1))


def test_a_plan_that_the_product_refuses(standard_engines: Path, tmp_path: Path, machine: Any):
    folder = plan_folder(standard_engines, tmp_path, "dense")
    machine(product(folder / "model.onnx", loads=False))
    with pytest.raises(UserError, match=r"cannot load .*engine.plan \(header is wrong\): run `python -m engines.build"):
        open_runner(folder)


def test_the_real_product_refuses_what_is_no_plan(
    standard_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """TensorRT-RTX itself, up to where it would need a GPU: a file of the right size and hash that is no plan."""
    version = artifacts.runtime_version("tensorrt-rtx")
    folder = plan_folder(standard_engines, tmp_path, "dense", "tensorrt-rtx", versions={"runtime": version})
    monkeypatch.setattr(TensorRTRunner, "_new_stream", lambda self: None)
    monkeypatch.setattr(TensorRTRunner, "_compute_capability", lambda self: "8.9")
    with pytest.raises(UserError, match=r"cannot load .*engine.plan .*--backend tensorrt-rtx"):
        open_runner(folder)


def test_two_plans_are_loaded_for_the_two_phases(standard_engines: Path, tmp_path: Path, machine: Any):
    profiles = [{"name": name, "plan": f"{name}.plan", "number": 0} for name in (PREFILL, DECODE)]
    folder = plan_folder(standard_engines, tmp_path, "dense", profiles=profiles, files={})
    for name in (DECODE, PREFILL):
        (folder / f"{name}.plan").write_text(name)
    loaded = []
    module = product(folder / "model.onnx")
    original = module.Runtime.deserialize_cuda_engine
    module.Runtime.deserialize_cuda_engine = lambda self, plan: (loaded.append(plan), original(self, plan))[1]
    machine(module)
    open_runner(folder)
    assert loaded == [b"decode", b"prefill"]


# What is checked before anything is loaded


def test_a_truncated_plan(standard_engines: Path, tmp_path: Path, machine: Any):
    folder = plan_folder(standard_engines, tmp_path, "dense")
    (folder / "engine.plan").write_bytes(b"pla")
    with pytest.raises(UserError, match=r"has 3 bytes instead of 4 \(truncated or replaced\): run `python -m engines"):
        open_runner(folder, verify=False)


def test_no_gpu_or_another_one(standard_engines: Path, tmp_path: Path, machine: Any):
    engine = open_engine(plan_folder(standard_engines, tmp_path, "dense"))
    with pytest.raises(UserError, match="torch sees no GPU"):
        check_gpu(engine, None)
    with pytest.raises(
        UserError, match=r"built for compute capability 8.9, this GPU has 9.0: run `python -m engines.bu"
    ):
        check_gpu(engine, "9.0")
    check_gpu(engine, "8.9")
    check_gpu(open_engine(plan_folder(standard_engines, tmp_path / "open", "dense", compute_capability=[])), "12.0")


def test_without_a_gpu_the_command_says_so(standard_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    version = artifacts.runtime_version("tensorrt-rtx")
    folder = plan_folder(standard_engines, tmp_path, "dense", "tensorrt-rtx", versions={"runtime": version})
    with pytest.raises(UserError, match="needs an NVIDIA GPU and a CUDA build of torch"):
        open_runner(folder)
