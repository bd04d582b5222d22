"""python -m engines.build: what it writes, and what it says when it cannot."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsa_export.cli import UserError
from dsa_export.files import MANIFEST, link_or_copy, write_manifest
from engines import build, nvidia, ort
from engines.artifacts import Limits, open_engine, open_export
from engines.build.folder import step_weights
from engines.build.ort import uses_kernels
from engines.ort import OrtRunner
from engines.text import TOKENIZER_FILES
from plugins import cpu
from tests.engines import toy
from tests.engines.commands import copy_tree, one_line, run_command

ROOT = Path(__file__).resolve().parents[2]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or ".partial" in path.name]


def test_ort_engines_are_self_contained_and_cost_no_space(export: Path, engines: Path):
    for variant in ("dense", "sparse"):
        engine = open_engine(engines / "ort" / variant)
        graph = open_export(export).graphs[variant]
        assert engine.manifest["source"]["sha256"] == graph.sha256
        assert (engine.folder / "model.onnx.data").samefile(export / variant / "model.onnx.data")
        assert engine.manifest["versions"]["runtime"].startswith("1.")
        assert engine.manifest["cpu"]
        assert engine.limits.max_context == toy.MAX_POSITIONS and not engine.manifest["beyond_positions"]
        assert set(TOKENIZER_FILES) < set(engine.manifest["files"])


def test_an_engine_says_what_its_export_says(export: Path, tmp_path: Path, capsys):
    folder = copy_tree(export, tmp_path / "onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": "int4", "random_indexer": True}))
    options = ["--onnx", str(folder), "--out", str(tmp_path), "--variant", "dense"]
    code, output, _ = run_command(build.main, options, capsys)
    engine = open_engine(tmp_path / "ort/dense")
    mib = sum(file["bytes"] for file in engine.manifest["files"].values()) / 2**20
    assert code == 0 and f"ort/dense: dense, int4, k = 16, {mib:.1f} MiB" in " ".join(output.split())
    assert (engine.dtype, engine.precision, engine.random_indexer) == ("fp32", "int4", True)


def test_weights_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "other file system")))
    (tmp_path / "a").write_bytes(b"weights")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"


def test_of_a_symbolic_link_the_file_is_linked(tmp_path: Path):
    """As in the hub's cache, whose snapshots are relative links."""
    blob, snapshot = tmp_path / "blobs/f00", tmp_path / "snapshots/1/model.safetensors"
    for path in (blob, snapshot):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"weights")
    snapshot.symlink_to("../../blobs/f00")
    link_or_copy(snapshot, tmp_path / "b")
    assert not (tmp_path / "b").is_symlink() and (tmp_path / "b").samefile(blob)


def test_an_engine_may_be_smaller_than_its_check(export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--variant", "dense", "--max-context", "2"]
    assert run_command(build.main, options, capsys)[0] == 0


def test_an_engine_may_have_no_more_slots_than_k(export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(export), "--out", str(tmp_path), "--variant", "sparse", "--max-context", "16"]
    assert run_command(build.main, options, capsys)[0] == 0
    assert open_engine(tmp_path / "ort/sparse").limits == Limits(8, 16, prefill_chunk=16)


def test_a_second_build_replaces_the_first(export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--variant", "sparse"]
    assert run_command(build.main, options, capsys)[0] == 0
    assert run_command(build.main, [*options, "--max-context", "100"], capsys)[0] == 0
    assert open_engine(tmp_path / "engines/ort/sparse").limits.max_context == 100
    assert sorted(path.name for path in (tmp_path / "engines/ort").iterdir()) == ["sparse"]
    options = options[:-1]
    kernels = {"dense-kernels"} if cpu.fast_here() else set()
    for more, dense in ([], {"dense", "dense-gqa"} | kernels), (["--standard-operators"], {"dense", "dense-gqa"}):
        assert run_command(build.main, [*options, "dense", *more], capsys)[0] == 0
        assert {path.name for path in (tmp_path / "engines/ort").iterdir()} == {"sparse", *dense}
    assert run_command(build.main, [*options, "sparse"], capsys)[0] == 0
    assert {path.name for path in (tmp_path / "engines/ort").iterdir()} == {"sparse", *dense}


def test_what_lies_where_an_engine_might_is_not_removed(export: Path, tmp_path: Path, capsys):
    thesis = tmp_path / "ort/dense-kernels/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    options = ["--onnx", str(export), "--out", str(tmp_path), "--variant", "dense", "--standard-operators"]
    assert run_command(build.main, options, capsys)[0] == 0
    assert thesis.is_file()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_both_graphs_build_in_tensorrt_rtx_without_a_gpu(tmp_path: Path, dtype: str, capsys):
    export = toy.write_export(tmp_path / "onnx", dtype=dtype)
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--backend", "tensorrt-rtx"]
    options += ["--max-context", "512", "--max-batch", "2", "--prefill-chunk", "32"]
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")
    for variant in ("dense", "sparse"):
        engine = open_engine(tmp_path / "engines" / "tensorrt-rtx" / variant)
        assert {path.name for path in engine.folder.iterdir()} == {"engine.plan", MANIFEST, *TOKENIZER_FILES}
        decode, prefill = engine.manifest["profiles"]
        assert decode["shapes"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
        assert prefill["shapes"]["input_ids"] == [[1, 1], [1, 32], [2, 32]]
        assert decode["shapes"]["past_key_values.1.key"] == [[1, 2, 512, 16], [1, 2, 512, 16], [2, 2, 512, 16]]
        assert ("past_key_values.0.index" in decode["shapes"]) == (variant == "sparse")


def test_attention_over_long_caches_builds_without_a_fused_kernel(tmp_path: Path, capsys):
    """TensorRT-RTX 1.7.1 has none for one token and so many slots, and refuses attention that it may not take apart."""
    export = toy.write_export(tmp_path / "onnx", dtype="bf16")
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--backend", "tensorrt-rtx"]
    options += ["--variant", "dense", "--max-context", "32768", "--beyond-positions", "--compute-capability", "8.9"]
    code, _, error = run_command(build.main, options, capsys)
    assert (code, error) == (0, "")


def test_a_graph_that_tensorrt_rtx_refuses_is_one_line(tmp_path: Path, capsys, monkeypatch):
    nvidia._import("tensorrt-rtx")  # before Polygraphy, which chooses its product when it is imported
    from polygraphy.logger import logger

    monkeypatch.setattr(logger, "COLORED_MODULE_PRESENT", None)  # as in a process that has printed nothing yet
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Nonsense", ["x"], ["y"], domain="foo")
    graph = onnx.helper.make_graph([node], "graph", [value], [onnx.ValueInfoProto(name="y", type=value.type)])
    versions = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("foo", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=11), tmp_path / "model.onnx")
    with pytest.raises(UserError, match=r"could not build .*operator: Nonsense .*Plugin not found") as refusal:
        nvidia.build_plan(tmp_path / "model.onnx", tmp_path / "plan", [], product="tensorrt-rtx", title="build")
    assert "\n" not in str(refusal.value) and capsys.readouterr().out == ""


def test_tensorrt_rtx_builds_for_named_gpus(export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(export), "--out", str(tmp_path), "--backend", "tensorrt-rtx", "--variant", "sparse"]
    options += ["--max-context", "64"]
    assert run_command(build.main, [*options, "--compute-capability", "8.9", "12.0"], capsys)[0] == 0
    assert open_engine(tmp_path / "tensorrt-rtx/sparse").manifest["compute_capability"] == ["8.9", "12.0"]
    code, _, error = run_command(build.main, [*options, "--compute-capability", "5.0"], capsys)
    assert code == 1
    assert "compute capability 5.0 is unknown" in one_line(error)


QUANTISED, ONE_KV_HEAD = "; quantised sparse graphs", "; models with a single KV head"


@pytest.mark.parametrize(
    ("variant", "precision", "kv_heads", "options", "known"),
    [
        ("dense", "int4", 2, [], ""),
        ("sparse", "int4", 2, [], QUANTISED),
        ("sparse", "fp32", 2, [], ""),
        ("dense", "fp32", 1, [], ONE_KV_HEAD),
        ("dense", "fp32", 1, ["--max-batch", "1"], ""),
        ("sparse", "int4", 1, [], QUANTISED),
    ],
)
def test_a_failed_build_names_what_is_known_to_fail(
    export: Path, tmp_path: Path, capsys, monkeypatch, variant, precision, kv_heads, options, known
):
    folder = copy_tree(export, tmp_path / "onnx")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"]["kv_heads"] = kv_heads
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": precision}))
    monkeypatch.setattr(nvidia, "build_plan", lambda *_, **__: raise_error(UserError("the compiler failed")))
    options = [*options, "--onnx", str(folder), "--out", str(tmp_path / "engines"), "--backend", "tensorrt-rtx"]
    code, _, error = run_command(build.main, [*options, "--variant", variant], capsys)
    assert code == 1 and one_line(error).startswith(f"error: the compiler failed{known}")
    assert known or one_line(error) == "error: the compiler failed"


def raise_error(error: Exception) -> None:
    raise error


def test_several_backends_in_one_command(export: Path, tmp_path: Path):
    command = [sys.executable, "-m", "engines.build", "--onnx", str(export), "--out", str(tmp_path / "engines")]
    command += ["--backend", "ort", "tensorrt-rtx", "--max-context", "64", "--variant", "dense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    for backend in ("ort", "tensorrt-rtx"):
        assert open_engine(tmp_path / "engines" / backend / "dense").backend == backend


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused() -> None:
    raise UserError("no memory")


@pytest.mark.parametrize(
    ("ends", "message"), [(killed, "the build of ort was ended by SIGKILL: a crash of its"), (refused, "no memory")]
)
def test_of_several_backends_none_is_built_after_one_that_failed(tmp_path: Path, capfd, monkeypatch, ends, message):
    def built(backend: str, _: object) -> None:
        (tmp_path / backend).touch()
        ends()

    monkeypatch.setattr(build, "build", built)
    code, _, error = run_command(build.main, ["--backend", "ort", "torch", "--out", str(tmp_path)], capfd)
    assert code == 1 and message in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["ort"]


def test_contexts_beyond_the_models_positions_are_for_timings(export: Path, tmp_path: Path, capsys):
    options = ["--onnx", str(export), "--out", str(tmp_path), "--variant", "dense", "--max-context", "5000"]
    assert run_command(build.main, [*options, "--beyond-positions"], capsys)[0] == 0
    engine = open_engine(tmp_path / "ort/dense")
    assert engine.limits.max_context == 5000 and engine.manifest["beyond_positions"] is True


def test_a_build_without_enough_memory_is_refused(export: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("engines.memory.available_memory", lambda: 1000)
    code, _, error = run_command(build.main, ["--onnx", str(export), "--out", str(tmp_path / "engines")], capsys)
    assert code == 1
    assert "this machine has 0 MiB: export with --weights int4" in one_line(error)  # fewer rows need no less weights
    assert not leftovers(tmp_path / "engines")


def test_more_rows_than_fit_at_a_time_are_said(export: Path, tmp_path: Path, capsys):
    """Caches in ONNX Runtime grow with use: the limit may be more than this machine has, but not in silence."""
    options = ["--onnx", str(export), "--out", str(tmp_path), "--variant", "dense", "--max-batch", "100000000"]
    code, output, _ = run_command(build.main, options, capsys)
    assert code == 0 and "not enough for so many tokens of all rows at a time" in output


def damage_nothing(folder: Path) -> None:
    pass


def damage_graph(folder: Path) -> None:
    model = onnx.load(folder / "sparse" / "model.onnx", load_external_data=False)
    model.producer_name = "an editor"
    onnx.save(model, folder / "sparse" / "model.onnx")


def damage_weights(folder: Path) -> None:
    os.truncate(folder / "dense" / "model.onnx.data", 1000)


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def remove_dense_graph(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["graphs"]["dense"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (damage_graph, [], "sparse/model.onnx is not the file that was written"),
        (damage_weights, [], "model.onnx.data has 1000 bytes instead of"),
        (remove_manifest, [], "run that first"),
        (break_manifest, [], "is not valid JSON"),
        (damage_nothing, ["--max-context", "8"], "k = 16 exceeds the capacity of 8 tokens"),
        (damage_nothing, ["--max-context", "1", "--variant", "dense"], "--max-context 1 leaves nothing to generate"),
        (damage_nothing, ["--max-context", "4097"], "--max-context 4097 exceeds the model's 4096 positions"),
        (remove_dense_graph, [], "holds no dense graph: choose another --variant"),
        (damage_nothing, ["--dense-slots", "4096"], "--dense-slots 4096 an engine of 4096 tokens would never select"),
        (damage_nothing, ["--dense-slots", "15"], "--dense-slots 15: up to k = 16 all is attended to anyway"),
        (damage_nothing, ["--backend", "tensorrt"], "backend tensorrt needs an NVIDIA GPU and trtexec on the PATH"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(export: Path, tmp_path: Path, capsys, damage, options, message):
    damaged = copy_tree(export, tmp_path / "onnx")
    damage(damaged)
    out = tmp_path / "engines"
    code, _, error = run_command(build.main, ["--onnx", str(damaged), "--out", str(out), *options], capsys)
    assert code == 1
    assert message in one_line(error)
    assert not leftovers(out)


@pytest.mark.parametrize("option", ["--out", "--triton-repository"])
def test_engines_inside_of_what_another_command_replaces_are_refused(
    export: Path, tmp_path: Path, capsys, monkeypatch, option: str
):
    (tmp_path / "ckpt").mkdir()
    write_manifest(tmp_path / "ckpt", "checkpoint", {})
    monkeypatch.chdir(tmp_path)
    for folder in (export, export / "engines", tmp_path / "ckpt"):
        code, _, error = run_command(build.main, ["--onnx", str(export), option, str(folder)], capsys)
        assert code == 1 and "is replaced as a whole: choose another --out" in one_line(error)
        assert not leftovers(folder / "ort")
    for folder in ("", "/"):
        code, _, error = run_command(build.main, ["--onnx", str(export), option, folder], capsys)
        assert code == 2 and "is no place for engines: name a new folder" in error
    assert not leftovers(tmp_path / "ort") and not Path("/ort").exists()
    beside = "ckpt/../engines"
    assert run_command(build.main, ["--onnx", str(export), "--variant", "dense", "--out", beside], capsys)[0] == 0


def test_no_variant_is_built_if_one_is_refused(export: Path, tmp_path: Path, capsys):
    """A cache of fp8 index keys, which ONNX Runtime's CPU cannot update."""
    damaged = copy_tree(export, tmp_path / "onnx")
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["graphs"]["sparse"]["cache"][2]["dtype"] = "float8_e4m3fn"
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    out = tmp_path / "engines"
    code, _, error = run_command(build.main, ["--onnx", str(damaged), "--out", str(out)], capsys)
    assert code == 1 and "cannot update fp8 caches" in one_line(error)
    assert not leftovers(out)


def test_bf16_is_refused_on_the_cpu(tmp_path: Path, capsys):
    export = toy.write_export(tmp_path / "onnx", dtype="bf16")
    code, _, error = run_command(build.main, ["--onnx", str(export), "--out", str(tmp_path / "engines")], capsys)
    assert code == 1
    assert "do not compute in bf16: export with --dtype fp32 or fp16" in one_line(error)


def test_an_output_that_is_not_ours_is_kept(export: Path, tmp_path: Path, capsys):
    foreign = tmp_path / "ort" / "sparse" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    code, _, error = run_command(build.main, ["--onnx", str(export), "--out", str(tmp_path)], capsys)
    assert code == 1
    assert "was not written by this toolchain" in one_line(error)
    assert leftovers(tmp_path) == [foreign], "nothing was built before"
    assert foreign.read_text() == "years of work"
    code, _, error = run_command(build.main, ["--onnx", str(export), "--out", str(foreign)], capsys)
    assert code == 1
    assert "is a file" in one_line(error)


WITHOUT_EFFECT = {
    "--dense-slots 64 --backend tensorrt-rtx": "--dense-slots is for --backend ort or --backend torch",
    "--dense-slots 64 --variant dense": "--dense-slots is for the sparse engine",
    "--triton-repository models --backend torch": "--triton-repository is for --backend ort or --backend tensorrt",
    "--compile": "--compile is for --backend torch",
    "--kv-cache fp16 --backend torch": "--kv-cache is for --backend ort",
    "--standard-operators --backend torch": "--standard-operators is for --backend ort",
    "--plugin-library x.so": "--plugin-library is for --backend tensorrt or --print-trtexec",
    "--compute-capability 8.9 --backend ort tensorrt": "--compute-capability is for --backend tensorrt-rtx",
    "--plans two --backend ort torch": "--plans is for --backend tensorrt-rtx or --backend tensorrt or --print-trtexec",
    "--serialize-plugins": "--serialize-plugins is for --backend tensorrt or --print-trtexec",
    "--timing-cache times --print-trtexec": "--timing-cache is for --backend tensorrt, not for --print-trtexec",
}
WRONG = [["--backend", "abacus"], ["--max-batch", "0"], ["--compute-capability", "8"], ["--dense-slots", "0"]]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments_exit_with_2(options: list[str], capsys):
    assert run_command(build.main, options, capsys)[0] == 2


@pytest.mark.parametrize(("options", "message"), WITHOUT_EFFECT.items())
def test_options_without_effect_are_refused(options: str, message: str, capsys):
    code, _, error = run_command(build.main, options.split(), capsys)
    assert code == 2 and error.strip().endswith(message)


def test_dense_slots_may_be_up_to_k(export: Path):
    given = build.parse_arguments(["--onnx", str(export), "--dense-slots", "16"])
    assert build.limits_of(open_export(export), given).max_context == toy.MAX_POSITIONS


def test_a_timing_cache_lies_beside_the_engines():
    assert build.parse_arguments(["--out", "x"]).timing_cache == Path("x/tensorrt/timing.cache")


@pytest.mark.parametrize("option", ["--dense-slots 64", "--standard-operators", "--kv-cache fp16"])
def test_options_for_cpus_are_refused_where_a_gpu_would_be_used(
    export: Path, tmp_path: Path, capsys, monkeypatch, option: str
):
    monkeypatch.setattr("engines.ort.runs_on_gpu", lambda: True)
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), *option.split()]
    code, _, error = run_command(build.main, options, capsys)
    assert (code, leftovers(tmp_path / "engines")) == (1, [])
    assert f"{option.split()[0]} is for CPUs" in one_line(error)


@pytest.mark.skipif(not cpu.fast_here(), reason="this processor has no AVX2")
def test_kernels_for_cpus_are_not_used_where_a_gpu_would_be(export: Path, monkeypatch):
    graph, args = open_export(export).graphs["sparse"], build.parse_arguments([])
    for gpu in (False, True):
        monkeypatch.setattr("engines.ort.runs_on_gpu", lambda gpu=gpu: gpu)
        assert uses_kernels("ort", graph, args) != gpu


def test_a_full_disk_is_one_line_and_leaves_nothing(export: Path, tmp_path: Path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "engines"))

    monkeypatch.setattr("engines.build.ort.link_or_copy", full)
    code, _, error = run_command(build.main, ["--onnx", str(export), "--out", str(tmp_path / "engines")], capsys)
    assert code == 1
    assert "disk full" in one_line(error)
    assert not leftovers(tmp_path / "engines")


def test_a_graph_that_the_runtime_refuses_is_one_line(tmp_path: Path, capsys):
    """The hashes are right, but the graph is not: an unknown operator."""
    export = toy.write_export(tmp_path / "onnx")
    path = export / "sparse" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "IndexTopK").op_type = "IndexTopQ"
    onnx.save(model, path)
    manifest = json.loads((export / MANIFEST).read_text())
    manifest["graphs"]["sparse"]["sha256"] = toy.sha256(path)
    (export / MANIFEST).write_text(json.dumps(manifest))
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--variant", "sparse"]
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1
    assert "ONNX Runtime cannot load" in one_line(error)
    assert not leftovers(tmp_path / "engines")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_engine_whose_logits_are_not_finite_is_refused(
    export: Path, tmp_path: Path, capsys, monkeypatch, bad: float, call: int
):
    """One logit of one call: of the check's first and last, with the least capacity and with one that selects."""
    run, calls = OrtRunner.run, []

    def spoiled(*arguments) -> np.ndarray:
        calls.append(arguments)
        logits = run(*arguments).copy()
        if len(calls) == call:
            logits[0, 7] = bad
        return logits

    monkeypatch.setattr(OrtRunner, "run", spoiled)
    options = ["--onnx", str(export), "--out", str(tmp_path), "--variant", "sparse"]
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "the engine's logits are not finite; check the checkpoint" in one_line(error)
    assert not leftovers(tmp_path)


def test_interrupting_a_build_is_one_line_and_leaves_nothing(export: Path, tmp_path: Path):
    """SIGINT while TensorRT-RTX builds: the monitor stops it."""
    script = (
        "import os, signal, sys, threading\n"
        "from engines import build, nvidia_graph\n"
        "from dsa_export.cli import run\n"
        "write = nvidia_graph.write\n"
        "def interrupted(*arguments):\n"
        "    write(*arguments)\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "nvidia_graph.write = interrupted\n"
        "run(build.main)\n"
    )
    out = tmp_path / "engines"
    options = ["--onnx", str(export), "--out", str(out), "--backend", "tensorrt-rtx", "--variant", "sparse"]
    done = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert one_line(done.stderr) == "error: interrupted; nothing half-written was kept"
    assert not leftovers(out)


def test_a_terminated_build_of_several_backends_ends(tmp_path: Path):
    """SIGTERM reaches the command alone, not the process that builds."""
    script = """if True:
        import sys, time
        from pathlib import Path
        from dsa_export.cli import run
        from engines import build
        def slowly(backend, args):
            (args.out / backend).touch()
            time.sleep(60)
        build.build = slowly
        run(build.main)
    """
    options = ["--onnx", "onnx", "--out", str(tmp_path), "--backend", "ort", "torch"]
    command = [sys.executable, "-c", script, *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ort").exists():
            time.sleep(0.05)
        process.terminate()
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted" in one_line(error)
    assert not (tmp_path / "torch").exists()


def test_a_refused_load_names_the_file(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ort.UserError, match=r"ONNX Runtime cannot load .*model\.onnx"):
        ort.load(tmp_path / "model.onnx")


def test_weights_of_a_call_are_counted_as_they_are_stored(tmp_path: Path):
    """Wherever they lie: outside the graph, as raw bytes or as numbers; of int4 two share a byte."""
    rows = np.ones((3, 5), np.float32)
    tensors = [
        helper.make_tensor("packed", TensorProto.INT4, [3, 5], [1] * 15),
        helper.make_tensor("scale", TensorProto.FLOAT16, [], [1.0]),
        numpy_helper.from_array(rows, "raw"),
        helper.make_tensor("table", TensorProto.FLOAT, [100, 5], [0.0] * 500),
        helper.make_tensor("unread", TensorProto.FLOAT, [7], [0.0] * 7),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["packed", "scale"], ["wide"]),
        helper.make_node("Gather", ["table", "input_ids"], ["row"]),
        helper.make_node("Add", ["raw", "row"], ["sum"]),
        helper.make_node("Clip", ["sum", "", "scale"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "step", [], [], tensors)
    for name, outside in (("inside", {}), ("outside", {"save_as_external_data": True, "size_threshold": 0})):
        onnx.save(helper.make_model(graph), tmp_path / name, **outside)
        counted = step_weights(tmp_path / name)
        assert (counted.step_weight_bytes, counted.step_weights) == (8 + 2 + 4 * 15, 15 + 1 + 15)
