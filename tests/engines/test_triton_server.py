"""The model repository for Triton Inference Server: every input and output has its place in config.pbtxt."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from engines import build, memory, triton_server
from engines.artifacts import Limits, open_export
from engines.ort import NUMPY_DTYPES
from plugins import cpu
from tests.engines import toy
from tests.engines.commands import one_line, run_command


@pytest.fixture(scope="module")
def repository(export: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton")
    options = ["--onnx", str(export), "--out", str(out / "engines"), "--max-context", "512"]
    args = build.parse_arguments([*options, "--triton-repository", str(out / "models")])
    build.build("ort", args)
    return out / "models"


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_the_config_fits_the_graph(repository: Path, variant: str):
    folder = repository / f"{variant}_ort"
    text = (folder / "config.pbtxt").read_text()
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    assert f'name: "{variant}_ort"\nplatform: "onnxruntime_onnx"\nmax_batch_size: 0\n' in text
    assert "kind: KIND_CPU" in text and "profile" not in text and "dynamic_batching" not in text
    graph = onnx.load(folder / "1" / "model.onnx", load_external_data=False).graph
    tensors = {"input": graph.input, "output": graph.output}
    found = {key: re.findall(rf'^{key} {{\n  name: "(.*)"', text, re.MULTILINE) for key in tensors}
    states = {key: re.findall(rf'{key}_name: "(.*)"', text) for key in tensors}
    for key, values in tensors.items():
        assert sorted(found[key] + states[key]) == sorted(value.name for value in values)
    assert [name.replace("past_key_values", "present") for name in states["input"]] == states["output"]
    assert text.count("dims: [ 1, 2, 512, 16 ]") == 2 * 2 * toy.LAYERS  # state and initial state of key and value
    assert text.count("zero_data: true") == len(states["input"])


def test_the_model_lies_beside_it(repository: Path, export: Path):
    version = repository / "sparse_ort" / "1"
    library = {"libdsa_cpu.so"} if cpu.fast_here() else set()
    assert {path.name for path in version.iterdir()} == {"model.onnx", "model.onnx.data"} | library
    named = f'op_library_filename: "{version.resolve() / "libdsa_cpu.so"}"'
    assert (named in (version.parent / "config.pbtxt").read_text()) == bool(library)
    assert "op_library_filename" not in (repository / "dense_ort" / "config.pbtxt").read_text()
    assert (version / "model.onnx.data").samefile(export / "sparse" / "model.onnx.data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "ort", "tensorrt-rtx"], "has no backend for tensorrt-rtx"),
        (["--backend", "tensorrt", "--plans", "two"], "is one plan with both profiles"),
    ],
)
def test_what_triton_cannot_serve_is_refused(export: Path, tmp_path: Path, capsys, options, message):
    options = ["--onnx", str(export), "--out", str(tmp_path), "--triton-repository", str(tmp_path / "models"), *options]
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert message in one_line(error)
    assert not list(tmp_path.iterdir())


def test_memory_estimate(export: Path):
    graph = open_export(export).graphs["sparse"]
    needed = memory.estimate(graph, Limits(max_batch=3, max_context=100, prefill_chunk=10), weight_bytes=1000)
    row = toy.HKV * toy.D * 2 + toy.DI
    assert (needed.weights, needed.caches) == (1000, 3 * 100 * toy.LAYERS * row * 4)
    assert needed.workspace == 30 * graph.workspace_bytes_per_query(100)
    assert needed.total == needed.weights + needed.caches + needed.workspace


def test_every_cache_of_onnx_runtime_has_a_type_there():
    assert NUMPY_DTYPES.keys() <= triton_server.TYPES.keys()
