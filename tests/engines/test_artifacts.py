"""What a manifest promises is checked before anything is loaded; the message says what to run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST
from engines import artifacts, build
from engines.artifacts import open_engine, open_export
from engines.session import Session, open_runner
from tests.engines import toy
from tests.engines.commands import copy_tree


@pytest.fixture
def engine_folder(engines: Path, tmp_path: Path) -> Path:
    return copy_tree(engines / "ort" / "sparse", tmp_path / "engines" / "ort" / "sparse")


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(UserError) as error:
        open_engine(folder, **options)
    return str(error.value)


def test_another_version_of_the_runtime(engine_folder: Path):
    edit(engine_folder, versions={"runtime": "1.2.3"})
    message = refusal(engine_folder)
    assert "was built with ort 1.2.3, installed is 1." in message
    assert "python -m engines.build --onnx " in message and f"--out {engine_folder.parent.parent}" in message


def test_another_patch_release_of_onnx_runtime_is_accepted(engine_folder: Path):
    major, minor, *_ = artifacts.runtime_version("ort").split(".")
    edit(engine_folder, versions={"runtime": f"{major}.{minor}.999"})
    assert open_engine(engine_folder).variant == "sparse"


def test_a_plan_needs_the_exact_version(engine_folder: Path):
    installed = artifacts.runtime_version("tensorrt-rtx")
    edit(engine_folder, backend="tensorrt-rtx", versions={"runtime": installed[:-1] + "x"})
    assert "--backend tensorrt-rtx" in refusal(engine_folder)


def test_the_version_is_that_of_whichever_package_is_there(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.99.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert artifacts.runtime_version("ort") == "1.99.0"
    with pytest.raises(UserError, match="backend torch needs torch: pip install torch"):
        artifacts.runtime_version("torch")


BUILDS = [
    "--backend ort --variant sparse --max-batch 3 --max-context 900 --prefill-chunk 64 --dense-slots 100",
    "--backend ort --variant dense --max-batch 8 --max-context 5000 --prefill-chunk 128 --beyond-positions",
]


@pytest.mark.parametrize("options", BUILDS)
def test_the_advice_builds_the_same_engine_again(export: Path, tmp_path: Path, options: str):
    """Also from the manifest of a damaged engine, and into folders whose names have spaces."""
    given = build.parse_arguments(["--onnx", str(export), "--out", str(tmp_path / "my engines"), *options.split()])
    build.build("ort", given)
    folder = next((tmp_path / "my engines" / "ort").iterdir())
    edit(folder, versions={})
    command = refusal(folder).split("`")[1]
    assert build.parse_arguments(shlex.split(command)[3:]) == given


@pytest.mark.parametrize(
    ("facts", "options"),
    [
        ({"backend": "torch", "compiled": True}, "--compile"),
        ({"files": {"decode.plan": {}, "prefill.plan": {}}}, "--plans two"),
        ({"plugin": {"path": "/a b/lib.so"}}, "--plugin-library '/a b/lib.so'"),
        ({"plugins_serialized": True}, "--serialize-plugins"),
    ],
)
def test_the_advice_names_options_of_other_backends(facts: dict[str, object], options: str):
    folder = Path("/e") / str(facts.get("backend", "tensorrt")) / "sparse"
    command = artifacts.rebuild_command(folder, {"limits": "damaged", **facts})
    assert command.startswith("python -m engines.build --onnx out/onnx --out /e ") and command.endswith(options)


def test_the_advice_names_no_folder_where_a_moved_engine_would_not_be_replaced():
    command = artifacts.rebuild_command(Path("/e/tensorrt/sparse"), {"backend": "ort"})
    assert "--out" not in command


def test_an_engine_opens_in_every_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its export lies at onnx/, as seen from where it was built; another lies at onnx/ elsewhere."""
    for number, folder in enumerate((tmp_path / "here", tmp_path / "there")):
        toy.write_export(folder / "onnx", seed=number)
    monkeypatch.chdir(tmp_path / "here")
    build.build("ort", build.parse_arguments(["--onnx", "onnx", "--out", "engines", "--variant", "dense"]))
    engine = tmp_path / "here/engines/ort/dense"
    monkeypatch.chdir(tmp_path / "there")
    assert open_engine(engine).manifest["source"]["path"] == str((tmp_path / "here/onnx").resolve())
    set_at(engine, "source.path", "onnx")  # as older manifests have it
    open_engine(engine)


def test_an_edited_graph(engine_folder: Path):
    path = engine_folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert "model.onnx is not the file that was written" in refusal(engine_folder)
    assert open_engine(engine_folder, verify=False).variant == "sparse"


@pytest.mark.parametrize("bytes_more", [-1, 1])
def test_weights_of_another_size_are_noticed_without_reading_them(engine_folder: Path, bytes_more: int):
    path = engine_folder / "model.onnx.data"
    os.truncate(path, path.stat().st_size + bytes_more)
    assert "truncated or replaced" in refusal(engine_folder, verify=False)


def test_missing_weights(engine_folder: Path):
    (engine_folder / "model.onnx.data").unlink()
    assert "model.onnx.data is missing: run `python -m engines.build" in refusal(engine_folder)


FIELDS = [
    "limits",
    "cache",
    "backend",
    "versions",
    "files",
    "model",
    "topk",
    "source",
    "compute_capability",
    "profiles",
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_without_a_field(engine_folder: Path, field: str):
    manifest = json.loads((engine_folder / MANIFEST).read_text())
    del manifest[field]
    (engine_folder / MANIFEST).write_text(json.dumps(manifest))
    assert f"lacks or misstates '{field}'" in refusal(engine_folder)


def test_a_folder_that_is_no_engine(export: Path, tmp_path: Path):
    assert "expected the output of `python -m engines.build`" in refusal(export)
    assert "run that first" in refusal(tmp_path)


def test_a_changed_export(export: Path, tmp_path: Path):
    damaged = copy_tree(export, tmp_path / "onnx")
    with (damaged / "dense" / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"model.onnx.data is not the file that was written .*dsa_export.onnx"):
        open_export(damaged)


@pytest.mark.parametrize("hash_of", ["sha256", "weights_sha256"])
def test_an_export_whose_graph_or_weights_are_others_by_now(engine_folder: Path, hash_of: str):
    set_at(engine_folder, f"source.{hash_of}", "0" * 64)
    assert "was exported again since" in refusal(engine_folder)


def test_an_engine_outlives_its_export(engine_folder: Path, tmp_path: Path):
    export = tmp_path / "onnx"
    set_at(engine_folder, "source.path", str(export))
    export.mkdir()
    for damaged in (None, "{", "[]", "{}"):
        if damaged:
            (export / MANIFEST).write_text(damaged)
        assert open_engine(engine_folder).variant == "sparse"


def test_a_file_that_was_written_over_is_hashed_again(tmp_path: Path):
    path = tmp_path / "weights"
    hashes = []
    for number, content in enumerate((b"old", b"new")):
        path.write_bytes(content)
        os.utime(path, ns=(number, number))
        hashes.append(artifacts.content_hash(path))
    assert hashes[0] != hashes[1]


def test_hard_linked_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = toy.write_export(tmp_path / "onnx", seed=3)
    hashed: list[Path] = []
    monkeypatch.setattr(artifacts, "sha256", lambda path: (hashed.append(path), toy.sha256(path))[1])
    open_export(folder)
    assert [path.name for path in hashed].count("model.onnx.data") == 1


def test_bytes_are_counted_from_the_layout(runners):
    dense, sparse = runners["dense"].engine, runners["sparse"].engine
    row, index_row = toy.HKV * toy.D * 4, toy.DI * 4
    assert dense.cache_bytes_per_token() == toy.LAYERS * 2 * row
    assert sparse.cache_bytes_per_token() == toy.LAYERS * (2 * row + index_row)
    assert dense.cache_bytes_read(1000) == toy.LAYERS * 1000 * 2 * row
    assert sparse.cache_bytes_read(1000) == toy.LAYERS * (1000 * index_row + 16 * 2 * row)
    assert sparse.cache_bytes_read(17) == toy.LAYERS * (17 * index_row + 16 * 2 * row)
    assert sparse.cache_bytes_read(16) == toy.LAYERS * 16 * 2 * row
    assert sparse.cache_bytes_read(10) == toy.LAYERS * 10 * 2 * row, "up to k tokens nothing is scored"
    assert sparse.cache_bytes_read(1000, queries=4) == toy.LAYERS * (1000 * index_row + 64 * 2 * row)
    assert sparse.cache_bytes_read(1000, queries=128) == toy.LAYERS * 1000 * (index_row + 2 * row)
    weights = toy.E * (toy.V + toy.LAYERS * (toy.HQ * toy.D * 2 + 2 * toy.HKV * toy.D)) + toy.LAYERS * toy.E
    assert dense.manifest["step_weight_bytes"] == 4 * weights
    indexer = toy.LAYERS * (toy.E * (toy.HI * toy.DI + toy.DI + toy.HI) + toy.DI)
    assert sparse.manifest["step_weight_bytes"] == 4 * (weights + indexer)


def test_a_cache_of_some_layers_is_counted_there(runners):
    engine = runners["sparse"].engine
    key, value, index = engine.cache
    shared = replace(engine, cache=(key, value, replace(index, layers=(1,))))
    assert [name for name, _ in shared.cache_names()] == ["0.key", "0.value", "1.key", "1.value", "1.index"]
    assert shared.cache_bytes_per_token() == engine.cache_bytes_per_token() - index.bytes_per_token


def test_the_workspace_is_attention_s_or_the_feed_forward_s(export: Path):
    """The kernels work on candidates and indices alone, and have no scores."""
    graphs = open_export(export).graphs
    sparse, dense = graphs["sparse"], graphs["dense"]
    feed_forward = 6 * 6 * 4 * toy.E
    scores, rows = 200 * (2 * toy.HI + 3) * 4, 2 * 16 * toy.HKV * toy.D * 4 * 2
    assert sparse.workspace_bytes_per_query(200) == scores + rows > feed_forward
    many = replace(sparse, topk=(400, 400), for_kernels=True)
    assert many.workspace_bytes_per_query(500) == 400 * (8 + 4) > feed_forward
    assert replace(sparse, for_kernels=True).workspace_bytes_per_query(200) == feed_forward
    scores = 2 * 200 * toy.HQ * 4
    assert dense.workspace_bytes_per_query(200) == scores > feed_forward == dense.workspace_bytes_per_query(9)
    own = replace(dense, for_kernels=True)
    assert own.workspace_bytes_per_query(200) == feed_forward
    latent = replace(own, cache=(replace(own.cache[0], name="latent"),))
    assert latent.workspace_bytes_per_query(200) == scores, "ONNX Runtime attends to those"


def test_k_per_layer_decides_bytes_and_the_least_capacity(tmp_path: Path, runners):
    export = toy.write_export(tmp_path / "onnx", topk=[8, 300])
    build.build("ort", build.parse_arguments(["--onnx", str(export), "--out", str(tmp_path / "engines")]))
    engine = open_engine(tmp_path / "engines" / "ort" / "sparse")
    assert (engine.topk, engine.max_topk) == ((8, 300), 300)
    row, index_row = toy.HKV * toy.D * 4, toy.DI * 4
    assert engine.cache_bytes_read(1000) == 2 * 1000 * index_row + (8 + 300) * 2 * row
    assert engine.cache_bytes_read(100, queries=2) == 100 * index_row + (16 + 100) * 2 * row
    session = Session(open_runner(engine.folder))
    assert session.capacity == 512, "the bucket above the largest k"
    assert Session(open_runner(engine.folder), capacity=5).capacity == 300
    prompt = np.arange(8)
    np.testing.assert_allclose(session.prefill([prompt]), Session(runners["dense"]).prefill([prompt]), atol=1e-4)


def set_at(folder: Path, path: str, value: object) -> None:
    """Sets the entry of a manifest at a path such as "cache.0.shape"."""
    manifest = json.loads((folder / MANIFEST).read_text())
    *parents, name = (int(part) if part.isdecimal() else part for part in path.split("."))
    place = manifest
    for part in parents:
        place = place[part]
    place[name] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


WRONG_FACTS = [
    ("selection", None, "selection, None"),
    ("model.max_position_embeddings", "x", "max_position_embeddings, 'x'"),
    ("dtype", "fp12", "dtype, 'fp12'"),
]
WRONG_CACHES = [
    ("0.shape", "abc", "the shape of cache key, 'abc'"),
    ("0.shape", ["batch", 3], "the shape of cache key, ['batch', 3]"),
    ("1.dtype", "float99", "dtype, 'float99'"),
    ("2.layers", [7], "the layers of cache index, [7]"),
    ("2.recent", "all", "recent, 'all'"),
]
WRONG_ENGINES = [
    ("dense_slots", "abc", "dense_slots, 'abc'"),
    ("limits.max_batch", 0, "max_batch, 0"),
    ("step_weights", None, "step_weights, None"),
    ("limits.max_batch", True, "max_batch, True"),
    ("backend", "abacus", "backend, 'abacus'"),
    ("source", {"path": "onnx"}, "'sha256'"),
    ("files", {"model.onnx": {"sha256": ""}}, "'bytes'"),
    ("files", [], "'list' object has no attribute 'values'"),
]
WRONG_EXPORTS = [
    ("weights.bytes", "1", "bytes, '1'"),
    ("graphs", [], "'list' object has no attribute 'items'"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [*WRONG_FACTS, *((f"cache.{path}", value, said) for path, value, said in WRONG_CACHES), *WRONG_ENGINES],
)
def test_an_engine_whose_manifest_was_edited(engine_folder: Path, path: str, value: object, said: str):
    set_at(engine_folder, path, value)
    assert f"{MANIFEST} lacks or misstates {said}: run `python -m engines.build" in refusal(engine_folder)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        *WRONG_FACTS,
        *((f"graphs.sparse.cache.{path}", value, said) for path, value, said in WRONG_CACHES),
        *WRONG_EXPORTS,
    ],
)
def test_an_export_whose_manifest_was_edited(export: Path, tmp_path: Path, path: str, value: object, said: str):
    folder = copy_tree(export, tmp_path / "onnx")
    set_at(folder, path, value)
    with pytest.raises(UserError) as error:
        open_export(folder)
    assert f"{MANIFEST} lacks or misstates {said}: run `python -m dsa_export.onnx` again" in str(error.value)


def test_caches_that_the_graph_does_not_have(engine_folder: Path):
    set_at(engine_folder, "model.layers", 9)
    with pytest.raises(UserError, match=r"manifest.json describes other caches than the graph has: run `python"):
        open_runner(engine_folder)


@pytest.mark.parametrize("topk", [[8], [8, 0], [8, "16"], 0])
def test_a_manifest_whose_k_cannot_be(engine_folder: Path, topk: object):
    edit(engine_folder, topk=topk)
    assert "misstates index_topk" in refusal(engine_folder)


def test_half_precision_runs_on_the_cpu(tmp_path: Path, runners):
    export = toy.write_export(tmp_path / "onnx", dtype="fp16")
    build.build("ort", build.parse_arguments(["--onnx", str(export), "--out", str(tmp_path / "engines")]))
    prompt = np.arange(16)
    for variant in ("dense", "dense-gqa", "sparse"):
        runner = runners[variant]
        half = Session(open_runner(tmp_path / "engines" / "ort" / variant)).prefill([prompt])
        full = Session(runner).prefill([prompt])
        assert np.abs(half - full).max() < 0.1
