"""The sparse graph with dense attention while caches are short: the exported graph's answers, or the dense engine's."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from dsa_export.cli import UserError
from dsa_export.selection import INDEX_CACHES, describe_selection
from engines import build
from engines.artifacts import Engine, Graph, open_engine, open_export, rebuild_command
from engines.ort_graph import dense_while_short, group_query, with_cpu_kernels
from engines.session import Session, open_runner
from plugins import cpu
from tests.dsa_export.conftest import CAPACITY
from tests.dsa_export.conftest import Graph as Exported
from tests.engines import toy
from tests.engines.commands import one_line, run_command
from tests.engines.test_session import TOLERANCE, tokens

K = 16


def branches(graph: Graph, slots: int = 1) -> list[tuple[list[str], list[str], list[str]]]:
    """Per layer: operators of the short and the long branch, and the weights of the latter."""
    model = dense_while_short(graph, slots)
    found = []
    for node in model.graph.node:
        if node.op_type == "If":
            parts = {attribute.name: attribute.g for attribute in node.attribute}
            short, long = parts["then_branch"], parts["else_branch"]
            operators = [[inner.op_type for inner in part.node] for part in (short, long)]
            found.append((*operators, [tensor.name for tensor in long.initializer]))
    return found


def test_index_queries_are_computed_where_they_are_read(export: Path) -> None:
    graph = open_export(export).graphs["sparse"]
    for layer, (short, long, weights) in enumerate(branches(graph)):
        assert short == ["Attention", "Constant"]
        assert long[-2:] == ["IndexTopK", "SparseAttention"] and long.count("MatMul") == 2
        assert weights == [f"{layer}.iq", f"{layer}.iw"], "the key's projection stays outside"
    model = dense_while_short(graph, 1)
    assert not {"0.iq", "1.iw"} & {tensor.name for tensor in model.graph.initializer}


def test_a_layer_attends_to_everything_up_to_its_own_k(tmp_path: Path) -> None:
    graph = open_export(toy.write_export(tmp_path / "onnx", topk=[8, 24])).graphs["sparse"]
    for slots, limits in ((8, [8, 24]), (64, [64, 64])):
        initializers = dense_while_short(graph, slots).graph.initializer
        found = [numpy_helper.to_array(tensor).item() for tensor in initializers if tensor.name.endswith("/limit")]
        assert found == limits


PLAIN = {"inputs": ["q", "keys", "values", "", "", "", "lengths"], "outputs": ["out"], "is_causal": 1, "scale": 1.0}


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": ["q", "keys", "values", "mask", "", "", "lengths"]},
        {"inputs": ["q", "rows", "rows", "", "", "", "lengths"]},
        {"is_causal": 0},
        {"softcap": 30.0},
        {"outputs": ["out", "", "", "scores"]},
    ],
    ids=["under a mask", "over latent rows", "of later tokens", "with a cap", "that gives its scores"],
)
def test_attention_that_our_kernel_does_not_do_is_left_to_onnx_runtime(other: dict[str, Any]) -> None:
    def taken(**options: Any) -> bool:
        attention = helper.make_node("Attention", **options)
        return with_cpu_kernels(helper.make_model(helper.make_graph([attention], "attention", [], [])))

    assert taken(**PLAIN) and not taken(**PLAIN | other)


def test_heads_that_group_query_attention_refuses_are_left_to_attention(export: Path) -> None:
    graph = open_export(export).graphs["dense"]
    assert group_query(graph) is not None
    assert group_query(replace(graph, model=replace(graph.model, head_dim=20))) is None


def test_weights_that_fill_a_model_file_stay_outside(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = open_export(export).graphs["sparse"]
    monkeypatch.setattr("engines.ort_graph.EMBEDDED_BYTES", 4 * toy.E * (toy.HI * toy.DI + toy.HI))
    (_, first, weights), (_, second, none) = branches(graph)
    assert first.count("MatMul") == 2 and len(weights) == 2
    assert second == ["IndexTopK", "SparseAttention"] and not none


@pytest.mark.parametrize("topk", [K, [8, 24]])
@pytest.mark.parametrize("slots", [None, 64])
def test_every_capacity_gives_the_exported_or_the_dense_answers(
    tmp_path: Path, topk: int | list[int], slots: int | None
):
    export = toy.write_export(tmp_path / "onnx", topk=topk)
    arguments = ["--onnx", str(export), "--out", str(tmp_path / "engines")]
    arguments += ["--dense-slots", str(slots)] if slots else []
    build.build("ort", build.parse_arguments(arguments))
    runner, dense = (open_runner(tmp_path / "engines" / "ort" / name, threads=1) for name in ("sparse", "dense"))
    engine = runner.engine
    uniform = isinstance(topk, int)
    assert engine.dense_slots == (64 if slots == 64 else K if uniform else 0)
    assert engine.selecting_slots == (65 if slots == 64 else K + 1 if uniform else 25)
    assert ("dense slots 64" in describe_selection(topk, engine.selection)) == (slots == 64)
    assert ("dense_slots" in engine.selection) == (slots == 64)
    if slots == 64:  # what is read and held is the dense engine's, with our kernels where they are
        twin = open_engine(tmp_path / "engines/ort/dense-kernels") if engine.has_kernels else dense.engine
        assert engine.workspace_bytes_per_query(64) == twin.workspace_bytes_per_query(64)
        assert engine.cache_bytes_read(64, capacity=64) == dense.engine.cache_bytes_read(64)
        assert engine.cache_bytes_read(64, capacity=65) < dense.engine.cache_bytes_read(64)
    prompts = [tokens(20), tokens(11, seed=1)]
    expected = [Exported(export / name / "model.onnx", 2) for name in ("sparse", "dense")]
    sparse_logits, dense_logits = (graph.step([p.tolist() for p in prompts]) for graph in expected)
    assert np.abs(sparse_logits - dense_logits).max() > 1e-2

    short = Session(runner, 2, capacity=24, prefill_chunk=32).prefill(prompts)  # 24 slots: few, if 64 are
    np.testing.assert_allclose(short, dense_logits if slots == 64 else sparse_logits, atol=TOLERANCE)
    long = Session(runner, 2, capacity=CAPACITY, prefill_chunk=32).prefill(prompts)
    np.testing.assert_allclose(long, sparse_logits, atol=TOLERANCE)

    # Caches that were filled while they were short hold what the selection needs later.
    session = Session(runner, capacity=24, prefill_chunk=8)
    session.prefill([prompts[0]])
    session.reserve(100, exact=True)
    again = Session(dense if slots == 64 else runner, capacity=24 if slots else 100, prefill_chunk=8)
    again.prefill([prompts[0]])
    for name, array in session.caches.arrays.items():
        if name in again.caches.arrays:
            np.testing.assert_allclose(array[:, :, :20], again.caches.arrays[name][:, :, :20], atol=TOLERANCE)
    reference = Exported(export / "sparse" / "model.onnx", 1)
    reference.cache = {f"past_key_values.{name}": array.copy() for name, array in session.caches.arrays.items()}
    reference.lengths = session.lengths.copy()
    np.testing.assert_allclose(session.decode([5]), reference.step([[5]]), atol=TOLERANCE)


@pytest.mark.parametrize("slots", [None, 64])
def test_caches_in_fp16_give_nearly_the_same_answers(tmp_path: Path, slots: int | None, capsys) -> None:
    """In calls of many tokens and of one, while caches are short and when they are long, of one row and of two."""
    export = toy.write_export(tmp_path / "onnx", topk=K)
    more = ["--dense-slots", str(slots)] if slots else []
    for name, options in (("fp32", []), ("fp16", ["--kv-cache", "fp16"])):
        arguments = ["--onnx", str(export), "--out", str(tmp_path / name), *more, *options]
        build.build("ort", build.parse_arguments(arguments))
    wide, half = (build_needs(options, tmp_path, capsys) for options in ([], ["--kv-cache", "fp16"]))
    assert wide["dense"] == half["dense"] and wide["sparse"] != half["sparse"], "what the sparse engine needs is less"
    rows = [tokens(40), tokens(23, seed=1)]
    for side in ("sparse", "dense-kernels"):
        wide, half = (open_runner(tmp_path / name / "ort" / side, threads=1) for name in ("fp32", "fp16"))
        kept = {tensor.name: tensor.dtype for tensor in half.engine.cache}
        assert kept["key"] == kept["value"] == "float16" and kept.get("index", "float32") == "float32"
        assert half.engine.cache_bytes_per_token() < wide.engine.cache_bytes_per_token()
        assert half.engine.cache_bytes_read(60) < wide.engine.cache_bytes_read(60)
        for capacity in (K, 50, CAPACITY):
            sessions = [Session(runner, 2, capacity=capacity, prefill_chunk=16) for runner in (wide, half)]
            expected, found = (session.prefill(rows) for session in sessions)
            assert 0 < np.abs(expected - found).max() < 2e-2
            expected, found = (session.decode([5, 6]) for session in sessions)
            assert 0 < np.abs(expected - found).max() < 2e-2
    assert "--kv-cache fp16" in rebuild_command(half.engine.folder, half.engine.manifest)
    theirs = open_runner(tmp_path / "fp16" / "ort" / "dense", threads=1)
    assert {tensor.dtype for tensor in theirs.engine.cache} == {"float32"}, "ONNX Runtime's operators are as exported"


def build_needs(options: list[str], tmp_path: Path, capsys) -> dict[str, str]:
    """What the build says that its engines will need, by variant."""
    folder = ["--onnx", str(tmp_path / "onnx"), "--out", str(tmp_path / "engines")]
    code, shown, _ = run_command(build.main, [*folder, "--max-context", "4096", "--max-batch", "64", *options], capsys)
    assert code == 0
    return dict(re.findall(r"ort (\w+) will need (.*) at ", shown))


def test_caches_in_fp16_need_the_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = toy.write_export(tmp_path / "onnx")
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines"), "--kv-cache", "fp16", "--standard-operators"]
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "read by this project's kernels alone" in one_line(error)
    assert not (tmp_path / "engines").exists()


def test_who_may_attend_densely_at_first(export: Path) -> None:
    graphs = open_export(export).graphs
    sparse = graphs["sparse"]
    assert sparse.can_attend_densely and not graphs["dense"].can_attend_densely
    latent = tuple(replace(tensor, name="latent") if tensor.name == "key" else tensor for tensor in sparse.cache)
    assert not replace(sparse, cache=latent).can_attend_densely
    without = tuple(tensor for tensor in sparse.cache if tensor.name not in INDEX_CACHES)
    assert not replace(sparse, cache=without).can_attend_densely


def operators(graph: onnx.GraphProto) -> list[tuple[str, str]]:
    """(domain, operator) of every node, those of branches too."""
    found = []
    for node in graph.node:
        found.append((node.domain, node.op_type))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += operators(attribute.g)
    return found


def build_sparse(export: Path, out: Path, *options: str) -> Engine:
    arguments = ["--onnx", str(export), "--out", str(out), "--variant", "sparse", *options]
    build.build("ort", build.parse_arguments(arguments))
    return open_engine(out / "ort" / "sparse")


@pytest.mark.skipif(not cpu.fast_here(), reason="this processor has no AVX2")
def test_the_kernels_take_the_place_of_the_bodies_and_standard_operators_do_without(export: Path, tmp_path: Path):
    kernels = build_sparse(export, tmp_path / "kernels")
    standard = build_sparse(export, tmp_path / "standard", "--standard-operators")
    assert kernels.cpu_library == kernels.folder / "libdsa_cpu.so" and kernels.cpu_library.is_file()
    assert standard.cpu_library is None and not list(standard.folder.glob("*.so"))
    assert standard.dense_slots == kernels.dense_slots == K
    models = [onnx.load(engine.folder / "model.onnx", load_external_data=False) for engine in (kernels, standard)]
    ours, bodies_of_ours = ([node for node in operators(m.graph) if node[0].startswith("dsa")] for m in models)
    selecting = [("IndexTopK",), ("SparseAttention",)]
    assert bodies_of_ours == [("dsa", *name) for name in selecting] * toy.LAYERS
    assert ours == [("dsa.cpu", *name) for name in [*selecting, ("DenseAttention",)]] * toy.LAYERS
    bodies = [{function.name for function in model.functions} for model in models]
    assert bodies[1] - bodies[0] == set(cpu.OPERATORS) - {"DenseAttention"}
    assert "--standard-operators" in rebuild_command(standard.folder, standard.manifest)
    assert "--standard-operators" not in rebuild_command(kernels.folder, kernels.manifest)
    prompts = [tokens(150), tokens(90, seed=1)]
    for length in (150, 9):  # selecting, and attending to all
        shorter = [prompt[:length] for prompt in prompts]
        first, second = (
            Session(open_runner(engine.folder, threads=2), 2, capacity=length + 6) for engine in (kernels, standard)
        )
        np.testing.assert_allclose(first.prefill(shorter), second.prefill(shorter), atol=TOLERANCE)
        np.testing.assert_allclose(first.decode([5, 6]), second.decode([5, 6]), atol=TOLERANCE)


def test_graphs_in_16_bits_and_old_processors_keep_the_bodies(export: Path, tmp_path: Path, monkeypatch) -> None:
    engine = build_sparse(toy.write_export(tmp_path / "onnx", dtype="fp16"), tmp_path / "engines")
    assert engine.cpu_library is None
    monkeypatch.setattr("plugins.cpu.fast_here", lambda: False)
    assert build_sparse(export, tmp_path / "old").cpu_library is None


@pytest.mark.skipif(not cpu.fast_here(), reason="this processor has no AVX2")
def test_without_a_compiler_the_build_says_what_to_do(export: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("plugins.cpu.build", partial(cpu.build, tmp_path / "build"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    options = ["--onnx", str(export), "--out", str(tmp_path / "engines")]
    assert run_command(build.main, [*options, "--variant", "dense"], capsys)[0] == 1
    assert not (tmp_path / "engines").exists()
    code, _, error = run_command(build.main, options, capsys)
    assert code == 1 and "no-such-compiler not found" in one_line(error) and "--standard-operators" in error
    assert not (tmp_path / "engines").exists()
    assert run_command(build.main, [*options, "--standard-operators"], capsys)[0] == 0


@pytest.mark.skipif(not cpu.fast_here(), reason="this processor has no AVX2")
def test_a_library_that_is_damaged_is_refused(export: Path, tmp_path: Path) -> None:
    engine = build_sparse(export, tmp_path)
    assert engine.cpu_library is not None
    whole = engine.cpu_library.read_bytes()
    engine.cpu_library.unlink()  # this process has it loaded
    engine.cpu_library.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"libdsa_cpu.so has \d+ bytes instead of \d+ .*: run `python -m engines.build"):
        open_runner(engine.folder, verify=False)
