"""trtexec: the command lines against a recording, and the build around a stand-in binary."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from dsa_export.cli import UserError
from engines import artifacts, build, nvidia
from engines.artifacts import CacheTensor, Limits, installed_gpu, open_engine, open_export
from engines.build.tensorrt import run_trtexec
from engines.profiles import profiles
from engines.text import TOKENIZER_FILES
from engines.trtexec import parse_version
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

RECORDED = Path(__file__).parent / "trtexec_commands.txt"


def printed_commands(export: Path, out: Path, capsys, *options: str) -> str:
    arguments = ["--onnx", str(export), "--out", str(out), "--print-trtexec", "--max-context", "1024", *options]
    code, output, error = run_command(build.main, arguments, capsys)
    assert (code, error) == (0, "")
    return output.replace(str(out), "OUT")


def test_commands_match_the_recording(tmp_path: Path, capsys, monkeypatch):
    """After a wanted change: look at the difference, then write the new text into the file."""
    monkeypatch.chdir(tmp_path)  # where the plugin library is not built, which the commands' last line says
    export = toy.write_export(tmp_path / "onnx", dtype="fp16")
    output = printed_commands(export, tmp_path / "engines", capsys, "--max-batch", "2", "--serialize-plugins")
    assert output == RECORDED.read_text()


def commands_of(output: str, version: str) -> list[list[str]]:
    block = output.split(f"# TensorRT {version}")[1].split("\n\n")[0]
    lines = block.split("\n", 1)[1].replace(" \\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line]


def test_the_versions_differ_where_they_must(export: Path, tmp_path: Path, capsys):
    output = printed_commands(export, tmp_path / "engines", capsys, "--variant", "sparse")
    old, new = commands_of(output, "10.16"), commands_of(output, "11.x")
    assert set(old[0]) - set(new[0]) == {"--stronglyTyped"}
    assert set(old[1]) - set(new[1]) == {"--useCudaGraph", "--useSpinWait", "--noDataTransfers"}
    for command in (*old, *new):
        assert not {"--fp16", "--bf16", "--best"} & set(command)
        assert "--dynamicPlugins=build/plugins/libdsa_plugins.so" in command
        assert ("--decomposableAttentions=*" in command) == (command in (old[0], new[0]))


def test_every_input_has_shapes_in_both_profiles(export: Path, tmp_path: Path, capsys):
    for variant in ("dense", "sparse"):
        output = printed_commands(export, tmp_path / "engines", capsys, "--variant", variant)
        folder = tmp_path / "engines" / "trtexec" / variant
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        inputs = {value.name for value in model.graph.input}
        assert (folder / "model.onnx.data").samefile(export / variant / "model.onnx.data")
        for command in (commands_of(output, "10.16")[0], commands_of(output, "11.x")[0]):
            ranges = [word for word in command if "Shapes=" in word]
            assert [word.split("=")[0] for word in ranges] == 2 * ["--minShapes", "--optShapes", "--maxShapes"]
            for shapes in ranges:
                assert {item.split(":")[0] for item in shapes.split("=")[1].split(",")} == inputs
        for value in (*model.graph.input, *model.graph.output):
            names = [size.dim_param for size in value.type.tensor_type.shape.dim]
            assert "capacity" not in names, f"{value.name}: NVIDIA's cache update needs a static capacity"


@pytest.mark.parametrize(
    ("shape", "dtype", "capacity", "fitting"),
    [
        (("batch", 1, "capacity", 1), "float32", 12000, 12032),  # scales of fp8 index keys
        (("batch", 1, "capacity_per_6", 64), "bfloat16", 32768, 32772),  # pooled index keys
        (("batch", 2, "capacity", 64), "float16", 999, 999),
    ],
)
def test_a_capacity_whose_rows_tensorrt_cannot_address_is_refused(export: Path, shape, dtype, capacity, fitting):
    cache = (CacheTensor("keys", shape, dtype),)
    graph = replace(open_export(export).graphs["sparse"], cache=cache)
    assert len(profiles(graph, Limits(1, capacity, 32))) == 2  # of a single row none is later
    if fitting == capacity:
        assert len(profiles(graph, Limits(4, capacity, 32))) == 2
        return
    with pytest.raises(UserError, match=f"choose --max-context {fitting}, or --max-batch 1"):
        profiles(graph, Limits(4, capacity, 32))
    assert len(profiles(graph, Limits(4, fitting, 32))) == 2


def test_a_capacity_that_fits_is_one_that_the_model_has(export: Path):
    """Keys of 8 bytes a token: the next multiple of 256 bytes is at 224 tokens, beyond 200 positions."""
    graph = open_export(export).graphs["sparse"]
    graph = replace(graph, cache=(CacheTensor("keys", ("batch", 1, "capacity", 4), "float16"),))
    graph = replace(graph, model=replace(graph.model, max_position_embeddings=200))
    for asked, fitting in ((200, 192), (150, 160), (201, 224)):
        with pytest.raises(UserError, match=f"choose --max-context {fitting}, or --max-batch 1"):
            profiles(graph, Limits(4, asked, 32))
    with pytest.raises(UserError, match="choose --max-batch 1"):  # the graph needs k slots
        profiles(replace(graph, topk=(193,)), Limits(4, 200, 32))


def test_the_written_inputs_fit_the_timed_shapes(export: Path, tmp_path: Path, capsys):
    output = printed_commands(export, tmp_path / "engines", capsys, "--variant", "sparse", "--prefill-chunk", "32")
    for command, tokens in zip(commands_of(output, "11.x")[1:], (1, 32), strict=True):
        spec = next(word for word in command if word.startswith("--loadInputs="))
        files = dict(item.split(":") for item in spec.split("=")[1].split(","))
        values = {
            name: np.fromfile(path.replace("OUT", str(tmp_path / "engines")), np.int64) for name, path in files.items()
        }
        assert values["input_ids"].size == tokens
        assert values["past_lengths"].tolist() == [1024 - tokens]
        assert values["input_lengths"].tolist() == [tokens]


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101601] # trtexec --help", "10.16.1"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b42]", "11.4.0"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8403] # trtexec", None),
        ("command not found", None),
    ],
)
def test_version_of_the_banner(banner: str, version: str | None):
    assert parse_version(banner) == version


def layer_information(*plugins: int) -> str:
    """What TensorRT's engine inspector says of a two-layer model with so many plugin layers by profile, shortened; the
    bodies' layers have the names too."""
    layers = []
    for profile, count in enumerate(plugins):
        of_profile = f" [profile {profile}]" if profile else ""
        layers.append({"Name": f"IndexTopK_body/TopK{of_profile}", "LayerType": "TopK"})
        layers.append({"Name": f"SparseAttention_body{of_profile}", "LayerType": "kgen"})
        for number in range(count):
            for plugin in ("IndexTopK", "SparseAttention"):
                name = f"{plugin}_{number}{of_profile}"
                layers.append({"Name": name, "LayerType": "PluginV3", "PluginType": plugin})
    return json.dumps({"Layers": layers, "Bindings": ["input_ids"]})


PLUGINS_TAKEN = layer_information(toy.LAYERS, toy.LAYERS)
"""Of a plan with both profiles."""


@pytest.mark.parametrize("plugins", [(2,), (2, 2)])
def test_every_profile_has_the_plugins(plugins: tuple[int, ...]):
    nvidia.check_plugin_layers(layer_information(*plugins), {"IndexTopK": 2, "SparseAttention": 2})


@pytest.mark.parametrize(("plugins", "profile", "found"), [((0,), 0, 0), ((1,), 0, 1), ((2, 0), 1, 0), ((4,), 0, 4)])
def test_function_bodies_are_not_taken_for_plugins(plugins: tuple[int, ...], profile: int, found: int):
    wanted = f"profile {profile} of the engine holds {found} IndexTopK, {found} SparseAttention plugin layers"
    with pytest.raises(UserError, match=wanted):
        nvidia.check_plugin_layers(layer_information(*plugins), {"IndexTopK": 2, "SparseAttention": 2})


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for trtexec that records its arguments, and one for nvidia-smi; returns how to configure it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def stand_in(*, version: str = "110400", layers: str = PLUGINS_TAKEN, code: int = 0, writes: bool = True) -> Path:
        (folder / "layers.json").write_text(layers)
        script = f"""#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # $0"
[ "$1" = --help ] && exit 0
printf '%s\\n' "$@" > {folder}/arguments
{"true" if writes else "exit 0"}
for word in "$@"; do case "$word" in
  --saveEngine=*) echo plan > "${{word#*=}}";;
  --timingCacheFile=*) echo times >> "${{word#*=}}";;
  --exportLayerInfo=*) cp {folder}/layers.json "${{word#*=}}";;
esac; done
[ {code} = 0 ] || echo "[11/22/2026-05:00:00] [E] Error[9]: Out of memory"
exit {code}
"""
        for name, text in (("trtexec", script), ("nvidia-smi", "#!/bin/sh\necho 9.0\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder / "arguments"

    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return stand_in


@pytest.fixture
def options(export: Path, tmp_path: Path) -> list[str]:
    library = tmp_path / "libdsa_plugins.so"
    library.write_bytes(b"plugins")
    arguments = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--backend", "tensorrt"]
    return [*arguments, "--plugin-library", str(library), "--max-context", "256"]


@pytest.mark.parametrize(("version", "flag"), [("101600", True), ("110400", False)])
def test_building_with_trtexec(trtexec, options, tmp_path: Path, capsys, monkeypatch, version: str, flag: bool):
    arguments = trtexec(version=version)
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")
    assert ("--stronglyTyped" in arguments.read_text().split()) == flag
    engine = json.loads((tmp_path / "engines/tensorrt/sparse/manifest.json").read_text())
    assert engine["plugin"]["sha256"] == toy.sha256(tmp_path / "libdsa_plugins.so")
    assert engine["compute_capability"] == ["9.0"]
    assert engine["versions"]["runtime"] == ("10.16.0" if flag else "11.4.0")
    assert json.loads((tmp_path / "engines/tensorrt/dense/manifest.json").read_text())["plugin"] is None
    monkeypatch.setattr(
        artifacts, "runtime_version", lambda _: engine["versions"]["runtime"] + ".11"
    )  # as the package says
    open_engine(tmp_path / "engines/tensorrt/sparse")
    monkeypatch.setattr(artifacts, "runtime_version", lambda _: "11.4.1.11")
    with pytest.raises(UserError, match=r"installed is 11\.4\.1\.11"):
        open_engine(tmp_path / "engines/tensorrt/sparse")


def test_manifests_name_whole_paths(trtexec, options, export: Path, tmp_path: Path, capsys, monkeypatch):
    """What is relative would be another file in another working directory."""
    trtexec()
    monkeypatch.chdir(tmp_path)
    options += ["--onnx", os.path.relpath(export), "--plugin-library", "libdsa_plugins.so"]
    options += ["--triton-repository", "models", "--out", "engines"]
    assert run_command(build.main, options, capsys)[0] == 0
    engine, model = (
        json.loads((tmp_path / folder / "manifest.json").read_text())
        for folder in ("engines/tensorrt/sparse", "models/sparse_tensorrt")
    )
    assert engine["source"]["path"] == str(export.resolve())
    assert engine["plugin"]["path"] == str((tmp_path / "libdsa_plugins.so").resolve())
    assert model["source"]["path"] == str((tmp_path / "engines/tensorrt/sparse").resolve())


def without_gpu(export: Path, folder: Path) -> None:
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")


def without_tokenizer(export: Path, folder: Path) -> None:
    (export / "tokenizer.json").unlink()


def with_a_model_that_is_not_ours(export: Path, folder: Path) -> None:
    (folder / "models" / "sparse_tensorrt").mkdir(parents=True)
    (folder / "models" / "sparse_tensorrt" / "thesis.txt").touch()


def with_index_keys(export: Path, dtype: str) -> None:
    manifest = json.loads((export / "manifest.json").read_text())
    manifest["graphs"]["sparse"]["cache"][2]["dtype"] = dtype
    (export / "manifest.json").write_text(json.dumps(manifest))


def with_fp8(export: Path, folder: Path) -> None:
    with_index_keys(export, "float8_e4m3fn")


def with_int8(export: Path, folder: Path) -> None:
    with_index_keys(export, "uint8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_gpu, "nvidia-smi names no GPU"),
        (without_tokenizer, "tokenizer.json is missing: run `python -m dsa_export.onnx` again"),
        (with_a_model_that_is_not_ours, "sparse_tensorrt exists and was not written by this toolchain"),
        (with_fp8, "Triton Inference Server has no fp8: export without --index-keys fp8"),
        (with_int8, "update caches in fp32, fp16 and bf16 only: export without --index-keys int8"),
    ],
)
def test_what_cannot_succeed_is_refused_before_the_build(
    trtexec, options, export: Path, tmp_path: Path, capsys, change, message: str
):
    arguments = trtexec()
    change(copy_tree(export, tmp_path / "onnx"), tmp_path)
    options += ["--onnx", str(tmp_path / "onnx"), "--triton-repository", str(tmp_path / "models")]
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and message in one_line(error)
    assert not arguments.exists()


def test_a_library_that_registers_nothing_is_said(tmp_path: Path):
    library = tmp_path / "libdsa_plugins.so"
    library.write_bytes(b"plugins of another TensorRT")
    registry = SimpleNamespace(all_creators=[], load_library=lambda path: None)
    with pytest.raises(UserError, match="did not register IndexTopK, SparseAttention: run `make plugins`"):
        nvidia.load_plugins(registry, library)


def test_the_timing_cache_is_read_and_replaced_by_a_build_that_succeeds(trtexec, options, tmp_path: Path, capsys):
    arguments = trtexec()
    cache = tmp_path / "times" / "timing.cache"
    options = [*options, "--timing-cache", str(cache), "--variant", "dense"]
    assert run_command(build.main, options, capsys)[0] == 0
    assert "--timingCacheFile=" in arguments.read_text()
    assert cache.read_text() == "times\n"
    assert run_command(build.main, options, capsys)[0] == 0
    assert cache.read_text() == "times\ntimes\n", "the second build started from the first one's times"
    trtexec(code=3)
    assert run_command(build.main, options, capsys)[0] == 1
    assert cache.read_text() == "times\ntimes\n"
    assert [path.name for path in cache.parent.iterdir()] == ["timing.cache"]
    assert not (tmp_path / "engines/tensorrt/dense/timing.cache").exists()
    assert {path.name for path in (tmp_path / "engines/tensorrt/dense").iterdir()} >= {"engine.plan", "manifest.json"}


def test_two_plans_hold_one_profile_each(trtexec, options, tmp_path: Path, capsys):
    trtexec()
    options = [*options, "--plans", "two", "--variant", "sparse", "--serialize-plugins"]
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")
    folder = tmp_path / "engines/tensorrt/sparse"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"--plans", "two", "--serialize-plugins"} <= set(artifacts.rebuild_command(folder, manifest).split())
    assert set(manifest["files"]) - set(TOKENIZER_FILES) == {"decode.plan", "prefill.plan"}
    table = [(entry["name"], entry["plan"], entry["number"]) for entry in manifest["profiles"]]
    assert table == [("decode", "decode.plan", 0), ("prefill", "prefill.plan", 0)]


@pytest.fixture
def opened(trtexec, options, tmp_path: Path, capsys, monkeypatch):
    """The folder of a sparse engine that opens here."""
    trtexec()
    assert run_command(build.main, options, capsys)[0] == 0
    monkeypatch.setattr("engines.artifacts.runtime_version", lambda backend: "11.4.0.27")
    folder = tmp_path / "engines" / "tensorrt" / "sparse"
    open_engine(folder)
    return folder


@pytest.mark.parametrize("gpu", ["8.9", "9.5", "12.0"])
def test_an_engine_for_another_gpu_is_refused(opened: Path, monkeypatch, gpu: str):
    monkeypatch.setattr("engines.artifacts.installed_gpu", lambda: gpu)
    with pytest.raises(UserError, match=rf"for compute capability 9\.0, this GPU has {gpu}: run `python -m engines"):
        open_engine(opened)


def test_an_engine_for_several_gpus_opens_on_each(opened: Path, monkeypatch):
    manifest = json.loads((opened / "manifest.json").read_text()) | {"compute_capability": ["8.9", "9.0"]}
    (opened / "manifest.json").write_text(json.dumps(manifest))
    for gpu in ("8.9", "9.0"):
        monkeypatch.setattr("engines.artifacts.installed_gpu", lambda gpu=gpu: gpu)
        open_engine(opened)


def test_the_gpu_is_the_first_that_is_visible(tmp_path: Path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in *"-i 1") echo 9.0;; *"-i"*) exit 6;; *) printf "8.6\\n9.0\\n";; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for visible, capability in ((None, "8.6"), ("1,0", "9.0"), ("", None)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert installed_gpu() == capability
    smi.write_text("#!/bin/sh\n")
    assert installed_gpu() is None
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed_gpu() is None


def test_a_plugin_library_that_is_gone_or_another_is_refused(opened: Path, tmp_path: Path):
    library = tmp_path / "libdsa_plugins.so"
    library.write_bytes(b"plugins, compiled again")
    with pytest.raises(UserError, match=r"built with another .*libdsa_plugins.so than the present one"):
        open_engine(opened)
    library.unlink()
    with pytest.raises(UserError, match=r"libdsa_plugins.so of .* is missing: run `python .*` after `make plugins`"):
        open_engine(opened)
    manifest = json.loads((opened / "manifest.json").read_text()) | {"plugins_serialized": True}
    (opened / "manifest.json").write_text(json.dumps(manifest))
    open_engine(opened)  # the plan carries it


@pytest.mark.parametrize("option", ["fp8", "int8"])
@pytest.mark.parametrize("backend", ["tensorrt-rtx", None])
def test_index_keys_in_8_bits_are_refused(export: Path, tmp_path: Path, capsys, option: str, backend: str | None):
    """TensorRT-RTX 1.7.1: "cache has type FP8 but must have type Float, Half, or BFloat16"."""
    folder = copy_tree(export, tmp_path / "onnx")
    with_index_keys(folder, {"fp8": "float8_e4m3fn", "int8": "uint8"}[option])
    how = ["--backend", backend] if backend else ["--print-trtexec"]
    code, _, error = run_command(
        build.main, ["--onnx", str(folder), "--out", str(tmp_path / "out"), "--max-context", "256", *how], capsys
    )
    assert code == 1 and f"export without --index-keys {option}" in one_line(error)
    assert not any((tmp_path / "out").rglob("*.plan"))


def test_an_engine_of_an_older_export_is_refused(opened: Path, tmp_path: Path):
    manifest = json.loads((opened / "manifest.json").read_text())
    export = tmp_path / "onnx"
    export.mkdir()
    manifest["source"]["path"] = str(export)
    (opened / "manifest.json").write_text(json.dumps(manifest))
    open_engine(opened)  # the export is not there any more, which is none of the engine's business
    weights = {"sha256": manifest["source"]["weights_sha256"]}
    (export / "manifest.json").write_text(json.dumps({"graphs": {"sparse": {"sha256": "other"}}, "weights": weights}))
    with pytest.raises(UserError, match="was exported again since"):
        open_engine(opened)


def test_an_engine_that_cannot_fit_is_refused_before_the_build(trtexec, options, tmp_path, capsys, monkeypatch):
    arguments = trtexec()
    monkeypatch.setattr("engines.memory.gpu_memory", lambda: 2**20)
    code, output, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "tensorrt dense will need" in output
    assert "the GPU has 1 MiB: choose a smaller --max-batch or --max-context" in one_line(error)
    assert not arguments.exists()


def test_triton_serves_the_plan_with_the_caches_as_state(trtexec, options, tmp_path: Path, capsys):
    trtexec()
    repository = tmp_path / "models"
    code, _, error = run_command(build.main, [*options, "--triton-repository", str(repository)], capsys)
    assert (code, error) == (0, "")
    assert (repository / "sparse_tensorrt" / "1" / "model.plan").read_text() == "plan\n"
    text = (repository / "sparse_tensorrt" / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"' in text and 'profile: [ "0", "1" ]' in text and "kind: KIND_GPU" in text
    assert f'plugins="{tmp_path / "libdsa_plugins.so"}"' in text
    assert "plugins=" not in (repository / "dense_tensorrt" / "config.pbtxt").read_text()


def test_an_engine_without_the_plugins_is_refused(trtexec, options, tmp_path: Path, capsys):
    trtexec(layers=layer_information(0))
    code, _, error = run_command(build.main, [*options, "--variant", "sparse"], capsys)
    assert code == 1
    assert "TensorRT took the function bodies" in one_line(error)
    assert not (tmp_path / "engines/tensorrt/sparse").exists()


def test_a_failing_trtexec_is_one_line(trtexec, options, tmp_path: Path, capsys):
    trtexec(code=3)
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "trtexec failed (exit code 3): [11/22/2026-05:00:00] [E] Error[9]: Out of memory" in one_line(error)
    trtexec(writes=False)
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "trtexec failed (exit code 0): &&&& RUNNING TensorRT.trtexec" in one_line(error)
    trtexec()
    (tmp_path / "bin/layers.json").unlink()
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "trtexec failed (exit code 0)" in one_line(error)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo '[E] first'; echo '[E] last'; echo end; exit 3", r"\(exit code 3\): \[E\] last$"),
        ("", r"no output$"),
    ],
)
def test_the_last_error_of_trtexec_is_told(tmp_path: Path, script: str, message: str):
    job: Any = SimpleNamespace(plan=tmp_path / "engine.plan", layers=tmp_path / "layers.json")
    with pytest.raises(UserError, match=message):
        run_trtexec("sh", ["trtexec", "-c", script], job)


def test_without_sparse_attention_no_plugin_library_is_needed(trtexec, options, tmp_path: Path, capsys):
    trtexec()
    (tmp_path / "libdsa_plugins.so").unlink()
    assert run_command(build.main, [*options, "--variant", "dense"], capsys)[0] == 0


@pytest.mark.parametrize("version", ["8403", "100300", "101599", "120000"])
def test_another_trtexec_is_refused(trtexec, options, capsys, version: str):
    trtexec(version=version)
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "is not a trtexec of TensorRT 10.16 or 11.x" in one_line(error)


@pytest.fixture
def python_package(trtexec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No trtexec, but TensorRT's Python package, whose building is stood in for; returns how to configure it."""
    trtexec()
    (tmp_path / "bin" / "trtexec").unlink()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorrt" or find_spec(name))

    def stand_in(version: str = "11.4.0.106", layers: str = PLUGINS_TAKEN) -> list[dict[str, Any]]:
        builds: list[dict[str, Any]] = []

        def build_plan(graph: Path, plan: Path, profiles: object, **options: object) -> None:
            assert graph.is_file()
            plan.write_bytes(b"plan")
            builds.append({**options, "profiles": profiles})

        monkeypatch.setattr("engines.build.tensorrt.runtime_version", lambda _: version)
        monkeypatch.setattr("engines.artifacts.runtime_version", lambda _: version)
        monkeypatch.setattr(nvidia, "build_plan", build_plan)
        monkeypatch.setattr(nvidia, "inspect", lambda plan: layers)
        return builds

    return stand_in


def test_building_with_the_python_package(python_package, options, tmp_path: Path, capsys):
    builds = python_package()
    code, _, error = run_command(build.main, [*options, "--serialize-plugins"], capsys)
    assert (code, error) == (0, "")
    assert [options["product"] for options in builds] == ["tensorrt"] * 2
    assert [options["plugin_library"] for options in builds] == [None, tmp_path / "libdsa_plugins.so"]
    assert all(options["serialize_plugins"] and options["timing_cache"] for options in builds)
    assert [[profile.name for profile in options["profiles"]] for options in builds] == 2 * [["decode", "prefill"]]
    assert open_engine(tmp_path / "engines/tensorrt/sparse").manifest["versions"]["runtime"] == "11.4.0.106"

    python_package(layers=layer_information(0))
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "TensorRT took the function bodies" in one_line(error)

    builds = python_package("10.9.0.34")
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "tensorrt 10.9.0.34 is not of 10.16 or 11.x: pip install" in one_line(error) and not builds


def test_a_missing_plugin_library_is_one_line(trtexec, options, tmp_path: Path, capsys):
    trtexec()
    (tmp_path / "libdsa_plugins.so").unlink()
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "is missing: run `make plugins`" in one_line(error)


def test_a_tensorrt_engine_is_only_opened_with_its_version(trtexec, options, tmp_path: Path, capsys):
    trtexec()
    assert run_command(build.main, options, capsys)[0] == 0
    with pytest.raises(UserError, match=r"tensorrt"):
        open_engine(tmp_path / "engines" / "tensorrt" / "dense")
