"""The exported graphs, run as a user runs them: the contract, causality, chunks, batches, precision, refusals."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.config import DSAConfig
from dsa_export.files import checkpoint_hash, read_manifest
from dsa_export.model import DSAForCausalLM, dense_twin, load_model, load_tokenizer
from dsa_export.onnx import __main__ as export_main
from dsa_export.onnx import parity, passes
from dsa_export.onnx.export import MODEL_FILE, WEIGHTS_FILE, dense_from_sparse, export_graph, save_graphs
from dsa_export.onnx.identical import SharedWeights, compare_folder, compare_graphs, compare_weights
from dsa_export.onnx.parity import _apart, check_parity
from dsa_export.onnx.quantise import Scheme, _quantise, quantise, untie
from dsa_export.onnx.stored import StoredModel
from tests.conftest import VOCABULARY, build_qwen
from tests.dsa_export.conftest import Graph, export_command

LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
EXACT = {"atol": 2e-5, "rtol": 0}
TOKENS = torch.randint(3, 500, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def test_files_and_manifest(export, dsa_folder):
    manifest = read_manifest(export, "onnx", "test")
    assert (manifest["topk"], manifest["dtype"], manifest["random_indexer"]) == (16, "fp32", False)
    dense, sparse = (export / variant / "model.onnx.data" for variant in ("dense", "sparse"))
    assert dense.stat().st_ino == sparse.stat().st_ino, "one weight file"
    assert manifest["weights"]["bytes"] == dense.stat().st_size
    assert [entry["name"] for entry in manifest["graphs"]["sparse"]["cache"]] == ["key", "value", "index"]
    assert manifest["graphs"]["sparse"]["cache"][2]["shape"] == ["batch", 1, "capacity", 32]
    sets = manifest["parity"]["sparse"]["selected_sets"]
    assert (sets["different"], sets["covered_layers"], sets["apart"]) == (0, 0, 0)
    assert manifest["source"] == {"path": str(dsa_folder), "sha256": checkpoint_hash(dsa_folder)}
    load_tokenizer(export)


def test_all_tokens_that_end_an_answer_are_told(dsa_model, dsa_folder, tmp_path):
    """Qwen2.5's generation_config.json names two, its config.json one."""
    models = dict.fromkeys(("dense", "sparse"), StoredModel(dsa_model, torch.float32))
    for variant in models:
        (tmp_path / variant).mkdir()
        for name in (MODEL_FILE, WEIGHTS_FILE):
            (tmp_path / variant / name).touch()
    arguments = argparse.Namespace(model=str(dsa_folder), dtype="fp32", weights=None)
    for ends, told in (([2, 1], [2, 1]), (2, [2])):
        dsa_model.generation_config.eos_token_id = ends
        export_main.write_export_manifest(
            tmp_path, arguments, models, {}, SharedWeights(1, 1), None, random_indexer=False
        )
        assert read_manifest(tmp_path, "onnx", "test")["model"]["eos_token_id"] == told


def test_where_the_file_system_has_no_links_the_weights_are_copied(dsa_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"))
    assert result.returncode == 0, result.stderr
    compare_folder(tmp_path / "onnx")


def test_names_types_and_dynamic_dimensions(export):
    model = onnx.load(export / "sparse" / "model.onnx", load_external_data=False)
    shape = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shape["input_ids"] == ["batch", "sequence"]
    assert shape["past_lengths"] == shape["input_lengths"] == ["batch"]
    assert shape["past_key_values.1.key"] == shape["present.1.value"] == ["batch", 1, "capacity", 64]
    assert shape["present.0.index"] == ["batch", 1, "capacity", 32]
    assert shape["logits"] == ["batch", 1, 512]
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 24), ("dsa", 1)}


def test_operators_name_their_plugin_and_bring_their_body(export):
    model = onnx.load(export / "sparse" / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == "dsa"]
    assert sorted(node.op_type for node in nodes) == ["IndexTopK"] * 2 + ["SparseAttention"] * 2
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_version"] == b"1" and attributes["plugin_namespace"] == b"dsa"
    assert sorted(function.name for function in model.functions) == ["IndexTopK", "SparseAttention"]
    dense = onnx.load(export / "dense" / "model.onnx", load_external_data=False)
    assert not dense.functions and sum(node.op_type == "Attention" for node in dense.graph.node) == 2


def test_weights_keep_the_checkpoints_names(export, dsa_folder):
    names = {t.name for t in onnx.load(export / "sparse" / "model.onnx", load_external_data=False).graph.initializer}
    assert set(load_model(dsa_folder).state_dict()) <= names


@pytest.mark.parametrize("length", [10, 30])  # fewer than k, which leaves places that later tokens could take; more
def test_no_later_token_leaks_into_earlier_outputs(graph, length):
    """Logits after a prefix do not depend on what a longer chunk holds behind it, padding included."""
    expected = graph().step([TOKENS[:length]])
    # The prefix as a short row beside a longer one: its padding stands where later tokens would.
    beside = graph(2).step([TOKENS[:length], TOKENS[:60]])[:1]
    np.testing.assert_allclose(beside, expected, **EXACT)
    other_row = graph(2).step([TOKENS[:length], TOKENS[::-1]])[:1]
    np.testing.assert_allclose(other_row, expected, **EXACT)
    changed = graph().step([[*TOKENS[: length - 1], 5]])
    assert np.abs(changed - expected).max() > 1e-3


@pytest.mark.parametrize("cuts", [[1] * 60, [1, 59], [37, 1, 22], [20, 20, 20]])
def test_any_cut_into_chunks_equals_one_call(graph, cuts):
    expected = graph().step([TOKENS])
    chunked, start = graph(), 0
    for length in cuts:
        logits = chunked.step([TOKENS[start : start + length]])
        start += length
    np.testing.assert_allclose(logits, expected, **EXACT)


def test_rows_of_two_lengths_equal_each_alone(graph):
    together, first, second = graph(2), graph(), graph()
    for a, b in (([30, 40], [0, 11]), ([40, 41], [11, 12]), ([41, 44], [12, 30])):
        rows = [TOKENS[a[0] - 30 : a[1] - 30], TOKENS[b[0] : b[1]]]
        expected = np.concatenate([first.step(rows[:1]), second.step(rows[1:])])
        np.testing.assert_allclose(together.step(rows), expected, **EXACT)


def test_equals_torch_step_by_step(graph, dsa_model, export):
    fresh = graph()
    model = dense_twin(dsa_model) if "index" not in str(fresh.cache.keys()) else dsa_model
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    for position, token in enumerate(TOKENS):
        np.testing.assert_allclose(fresh.step([[token]])[0], expected[position], atol=1e-4, rtol=0)


def test_k_per_layer_is_an_attribute_of_each_node(dsa_folder, tmp_path):
    """Different k by layer: torch's sets and logits in ONNX Runtime, and dense's while no layer leaves anything out."""
    folder, out = tmp_path / "by-layer", tmp_path / "onnx"
    shutil.copytree(dsa_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "index_topk": [8, 24]}))
    result = export_command("--model", str(folder), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "k = 8–24 by layer, mean 16" in result.stdout
    manifest = read_manifest(out, "onnx", "test")
    assert manifest["topk"] == [8, 24]
    assert manifest["parity"]["sparse"]["selected_sets"]["different"] == 0
    model = onnx.load(out / "sparse" / "model.onnx", load_external_data=False)
    selections = [node for node in model.graph.node if node.op_type == "IndexTopK"]
    ks = [next(a.i for a in node.attribute if a.name == "k") for node in selections]
    assert ks == [8, 24]
    dense, sparse = (Graph(out / variant / "model.onnx", 1) for variant in ("dense", "sparse"))
    np.testing.assert_allclose(sparse.step([TOKENS[:8]]), dense.step([TOKENS[:8]]), **EXACT)
    assert np.abs(sparse.step([TOKENS[8:20]]) - dense.step([TOKENS[8:20]])).max() > 1e-3, "layer 0 leaves keys out"


def test_sparse_equals_dense_while_k_covers_the_text(export):
    dense, sparse = (Graph(export / variant / "model.onnx", 1) for variant in ("dense", "sparse"))
    np.testing.assert_allclose(sparse.step([TOKENS[:10]]), dense.step([TOKENS[:10]]), **EXACT)
    for token in TOKENS[10:16]:
        np.testing.assert_allclose(sparse.step([[token]]), dense.step([[token]]), **EXACT)
    assert np.abs(sparse.step([TOKENS[16:]]) - dense.step([TOKENS[16:]])).max() > 1e-3


def test_cached_index_keys_are_written_once(export):
    graph = Graph(export / "sparse" / "model.onnx", 1)
    graph.step([TOKENS[:20]])
    before = graph.cache["past_key_values.1.index"][0, 0, :20].copy()
    for token in TOKENS[20:30]:
        graph.step([[token]])
    assert np.array_equal(graph.cache["past_key_values.1.index"][0, 0, :20], before)
    whole = Graph(export / "sparse" / "model.onnx", 1)
    whole.step([TOKENS[:30]])
    for name in graph.cache:
        np.testing.assert_allclose(graph.cache[name][..., :30, :], whole.cache[name][..., :30, :], **EXACT)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_lower_precisions_pass_their_parity(dsa_folder, tmp_path, dtype):
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), "--dtype", dtype)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "onnx", "onnx", "test")
    assert manifest["dtype"] == dtype
    assert manifest["graphs"]["sparse"]["cache"][0]["dtype"] == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    compare_folder(tmp_path / "onnx")


@pytest.mark.parametrize(
    ("weights", "block", "indexer", "dtype"),
    [("int4", "32", True, "fp32"), ("int8", "128", False, "fp32"), ("int4", "32", False, "bf16")],
)
def test_quantised_weights(dsa_folder, tmp_path, weights, block, indexer, dtype):
    """One standard form; the graph computes what its integers stand for; the embedding has 16 bits; the indexer stays
    if wished."""
    out = tmp_path / "onnx"
    result = export_command(
        "--model", str(dsa_folder), "--out", str(out), "--weights", weights, "--block-size", block,
        "--dtype", dtype, *(["--int8-indexer"] if indexer else []),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    manifest = read_manifest(out, "onnx", "test")
    assert (manifest["precision"], manifest["dtype"]) == (weights, dtype)
    assert manifest["quantisation"] == {
        "weights": weights, "block_size": int(block), "lm_head": True, "indexer": indexer, "calibration": None,
    }  # fmt: skip
    for variant in ("dense", "sparse"):
        parity = manifest["parity"][variant]
        assert parity["passed"] and parity["max_abs_error"] < 1e-4 < parity["quality"]["max_abs_error"]
        model = onnx.load(out / variant / "model.onnx", load_external_data=False)
        kind = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
        quantised = {name for name in kind if kind[name] == weights.upper()}
        assert quantised == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in LINEAR} | {
            "lm_head.weight"
        }
        assert kind["model.embed_tokens.weight"] == ("FLOAT16" if dtype == "fp32" else "BFLOAT16")
        assert {node.domain for node in model.graph.node} <= {"", "dsa"}
    loss = manifest["parity"]["dense"]["quality"]
    for over in ("", "text_"):
        assert 0 < abs(loss[f"{over}loss"] - loss[f"{over}reference_loss"]) < (0.1 if weights == "int4" else 0.02)
    compare_folder(out)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"dense", "sparse"}  # nothing of the check


def tied() -> DSAForCausalLM:
    config = DSAConfig(
        vocab_size=64, hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, index_heads=2, index_dim=16, index_topk=4, tie_word_embeddings=True,
    )  # fmt: skip
    return DSAForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize(("largest", "stored"), [(0.125, ir.DataType.FLOAT16), (1e5, ir.DataType.FLOAT)])
def test_a_quantised_tied_embedding_keeps_its_values(largest: float, stored: ir.DataType):
    """Those of a bf16 checkpoint, in 16 bits where they fit; what the output projection multiplies is a copy."""
    model = tied()
    embedding = model.model.embed_tokens.weight.bfloat16().float()
    embedding[embedding.abs() < 2**-17] = 0
    embedding[3, 5] = largest
    model.model.embed_tokens.weight.copy_(embedding)
    untie(model)
    whole = StoredModel(model, torch.float32)
    graph = export_graph(whole)
    names = quantise([graph], whole, Scheme("int4", 32, lm_head=True, indexer=False), {})
    assert len(names) == 8
    assert torch.equal(whole.value("model.embed_tokens.weight"), embedding)
    projection = whole.value("lm_head.weight").numpy()
    head = graph.graph.initializers
    table = head["model.embed_tokens.weight"]
    assert table.dtype == table.const_value.dtype == stored
    np.testing.assert_array_equal(table.const_value.numpy().astype(np.float32), embedding)
    scales = head["lm_head.weight.scales"].const_value.numpy()
    values = head["lm_head.weight"].const_value.numpy().astype(np.float32) * scales.repeat(32, 0)
    np.testing.assert_array_equal(projection, values.T)
    step = np.abs(scales).repeat(32, 0).T
    assert (np.abs(projection - embedding.numpy()) <= step * 1.01).all()
    assert not np.array_equal(projection, embedding.numpy())


def test_an_embedding_that_is_multiplied_too_keeps_its_type():
    whole = StoredModel(tied(), torch.float32)
    embedding = whole.model.model.embed_tokens.weight
    graph = export_graph(whole)
    quantise([graph], whole, Scheme("int4", 32, lm_head=False, indexer=False), {})
    (table,) = [node.inputs[0] for node in graph.graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]
    assert table.dtype == ir.DataType.FLOAT and torch.equal(whole.value("model.embed_tokens.weight"), embedding)


def test_weights_that_were_merged_are_dequantised_once():
    """Small and equal ones, as the zeros that NSA's compressors start from."""
    config = DSAConfig(
        vocab_size=64, hidden_size=32, head_dim=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention="nsa",
    )  # fmt: skip
    whole = StoredModel(DSAForCausalLM(config).requires_grad_(False).eval(), torch.float32)
    graph = export_graph(whole)
    names = quantise([graph], whole, Scheme("int4", 32, lm_head=True, indexer=False), {})
    zeros = [name for name in names if "compression.key.down_proj" in name or "compression.value.down_proj" in name]
    assert len(zeros) == 1
    nodes = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    assert sorted(node.inputs[0].name for node in nodes) == sorted(names)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_rounded_to_their_scale(bits):
    weight = torch.randn(80, 24, generator=torch.Generator().manual_seed(0)).numpy()
    integers, scales = _quantise(ir.tensor(weight, name="w"), bits, 32)
    values = integers.numpy().astype(np.float32) * scales.numpy().repeat(32, 0)[:80]
    step = np.abs(scales.numpy()).repeat(32, 0)[:80]
    # Half a step, and one where the largest value of the other sign is clipped: the range is -8..7, -128..127.
    assert (np.abs(values - weight) <= 1.001 * step).all()
    assert np.abs(values - weight).mean() < 0.3 * step.mean()
    assert bits == 4 or (scales.numpy() > 0).all(), "NVIDIA's parsers want it"


# The proof of identical operators, and that it can fail.


def both_graphs(model):
    whole = StoredModel(model, torch.float32)
    return {"dense": export_graph(whole.dense()), "sparse": export_graph(whole)}


@pytest.fixture
def graphs(dsa_model):
    """Both by torch's exporter, where the command derives one from the other: so the proof has something to prove."""
    return both_graphs(dsa_model)


def test_the_derived_dense_graph_is_the_exported_one(graphs):
    derived = dense_from_sparse(graphs["sparse"])
    nodes = [sorted((node.name, node.op_type) for node in graph.graph) for graph in (derived, graphs["dense"])]
    assert nodes[0] == nodes[1]
    assert [value.name for value in derived.graph.inputs] == [value.name for value in graphs["dense"].graph.inputs]
    assert derived.opset_imports == graphs["dense"].opset_imports and not derived.functions
    compare_graphs(derived, graphs["sparse"])


def test_graphs_differ_in_the_core_only(export):
    comparison = compare_folder(export)
    assert (comparison.dense_core, comparison.sparse_core) == (2, 2)
    assert comparison.shared > 60 and comparison.indexer > 20


def test_the_proof_finds_every_other_difference(graphs):
    def node(variant, op_type):
        return next(n for n in graphs[variant].graph if n.op_type == op_type)

    compare_graphs(**graphs)
    norm = node("sparse", "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)
    with pytest.raises(UserError, match="RMSNormalization differs"):
        compare_graphs(**graphs)
    norm.attributes["epsilon"] = node("dense", "RMSNormalization").attributes["epsilon"]
    compare_graphs(**graphs)

    gate = node("sparse", "Sigmoid")
    gate.op_type = "Tanh"
    with pytest.raises(UserError, match=r"Sigmoid.*Tanh"):
        compare_graphs(**graphs)
    gate.op_type = "Sigmoid"

    weight = graphs["sparse"].graph.initializers["model.layers.1.mlp.up_proj.weight"]
    original = weight.const_value
    weight.const_value = ir.tensor(original.numpy() + 1, name=weight.name)
    with pytest.raises(UserError, match="up_proj"):
        compare_graphs(**graphs)
    weight.const_value = original

    core = node("dense", "Attention")
    core.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    with pytest.raises(UserError, match="is not causal"):
        compare_graphs(**graphs)
    core.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)

    core.attributes["softcap"] = ir.AttrFloat32("softcap", 1.0)
    with pytest.raises(UserError, match=r"does more than attend to the tokens of a row \(softcap\)"):
        compare_graphs(**graphs)
    del core.attributes["softcap"]
    visible = core.inputs[6]
    core.replace_input_with(3, visible)
    with pytest.raises(UserError, match=r"does more than attend to the tokens of a row \(inputs\)"):
        compare_graphs(**graphs)
    core.replace_input_with(3, None)
    for reader, position in ((core, 6), (node("sparse", "IndexTopK"), 3)):  # one layer that sees one token less
        visible = reader.inputs[position]
        graph = graphs["dense" if reader is core else "sparse"].graph
        reader.replace_input_with(position, next(value for value in graph.inputs if value.name == "past_lengths"))
        with pytest.raises(UserError):
            compare_graphs(**graphs)
        reader.replace_input_with(position, visible)
    compare_graphs(**graphs)

    for variant, op_type in (("dense", "Attention"), ("sparse", "SparseAttention")):
        core = node(variant, op_type)
        scale = core.attributes["scale"]
        core.attributes["scale"] = ir.AttrFloat32("scale", 2 * scale.as_float())
        with pytest.raises(UserError, match="the cores scale differently"):
            compare_graphs(**graphs)
        core.attributes["scale"] = scale
    compare_graphs(**graphs)

    graphs["sparse"].graph.outputs.append(node("sparse", "Sigmoid").outputs[0])
    with pytest.raises(UserError, match="outputs differ by more than the index caches"):
        compare_graphs(**graphs)
    del graphs["sparse"].graph.outputs[-1]

    stray = ir.node("Neg", [node("sparse", "Sigmoid").outputs[0]])
    graphs["sparse"].graph.append(stray)
    with pytest.raises(UserError, match="neither to both nor"):
        compare_graphs(**graphs)


def test_the_proof_reads_files_with_any_number_of_links_and_refuses_damaged_ones(export, tmp_path):
    """A copied export has two weight files, and engines made of it link each."""
    folder = tmp_path / "copy"
    for variant in ("dense", "sparse"):
        (folder / variant).mkdir(parents=True)
        for file in (export / variant).iterdir():
            shutil.copyfile(file, folder / variant / file.name)
        os.link(folder / variant / WEIGHTS_FILE, tmp_path / variant)
    shutil.copyfile(export / "manifest.json", folder / "manifest.json")
    assert compare_folder(folder).weights == compare_folder(export).weights
    os.truncate(folder / "dense" / WEIGHTS_FILE, 100)
    with pytest.raises(UserError, match=r"is not as `python -m dsa_export\.onnx` wrote it"):
        compare_folder(folder)


def test_small_weights_are_compared_too(graphs):
    """Qwen2.5-0.5B's k and v biases are less than what goes into the weight file."""
    names = [name for name in graphs["dense"].graph.initializers if name.endswith((".weight", ".bias", ".inv_freq"))]
    assert compare_weights(**graphs).shared == len(names)
    bias = graphs["sparse"].graph.initializers["model.layers.1.self_attn.k_proj.bias"]
    bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name=bias.name)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        compare_weights(**graphs)


def test_tied_embeddings_stay_one_weight(tmp_path):
    model = load_model(build_qwen(tmp_path / "tied", tied=True), index_heads=2, index_dim=32, index_topk=8)
    graphs = both_graphs(model)
    compare_graphs(**graphs)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    names = [[name for name in graph.graph.initializers if name in tied] for graph in graphs.values()]
    assert names[0] == names[1] and len(names[0]) == 1


# Parity, and that it can fail.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity_fails_on_wrong_weights_and_on_another_selection(dsa_folder, tmp_path, dtype):
    folder, prompt = tmp_path / "onnx", TOKENS * 2
    save_graphs({"sparse": export_graph(StoredModel(load_model(dsa_folder, dtype=dtype), dtype))}, folder)

    def check(change=lambda model: None):
        model = load_model(dsa_folder, dtype=dtype)
        with torch.no_grad():
            change(model.model.layers)
        return check_parity(StoredModel(model, dtype), folder / "sparse", prompt, tmp_path / "scratch")

    assert check()["passed"]
    assert not check(lambda layers: layers[0].mlp.up_proj.weight[0].add_(0.5))["passed"]
    result = check(lambda layers: layers[1].self_attn.indexer.q_proj.weight.neg_())
    assert result["selected_sets"]["different"] > 0 and not result["passed"]


@pytest.mark.parametrize(
    ("theirs", "counts"),
    [
        ([[0, -1, -1], [0, 1, -1], [2, 0, 1], [1, 2, 3]], (4, 0, 0, 0)),
        ([[0, -1, -1], [0, 1, -1], [2, 0, 1], [0, 2, 3]], (3, 1, 0, 0)),  # 0 and 1 score alike
        ([[0, -1, -1], [0, 1, -1], [2, 0, 1], [0, 1, 2]], (3, 0, 1, 0)),
        ([[0, -1, -1], [0, -1, -1], [2, 0, 1], [1, 2, 3]], (3, 0, 1, 1)),  # lacks one
        ([[0, -1, -1], [0, 1, -1], [2, 0, 0], [1, 2, 3]], (3, 0, 1, 1)),  # has one twice
        ([[0, 1, -1], [0, 1, -1], [2, 0, 1], [1, 2, 3]], (3, 0, 1, 1)),  # sees the future
        ([[0, -1, -1], [0, 1, -1], [2, 0, 1], [1, 2, 9]], (3, 0, 1, 1)),  # beyond the text
    ],
)
def test_what_is_no_selection_is_no_tie(theirs, counts):
    ours = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 1, 2], [1, 2, 3]])
    scores = torch.tensor([1.0, 1.0, 5.0, 7.0]).expand(1, 4, 4)
    attention = SimpleNamespace(reselect=lambda _: (ours[None], scores), key_type="model")
    found = parity._compare_sets(attention, None, torch.tensor(theirs))
    assert tuple(found[name] for name in ("identical", "ties", "different", "unlawful")) == counts


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_is_computed_in_fp32_without_a_second_model(tmp_path, tokens, tied):
    """The weights of one layer at a time are raised, then the model is what it was."""
    model = load_model(build_qwen(tmp_path / "qwen", tied=tied), dtype=torch.bfloat16, index_topk=16)
    own = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    text = tokens[0].tolist()
    raised = []
    model.model.layers[1].mlp.register_forward_hook(
        lambda *_: raised.extend(name for name, p in model.named_parameters() if p.dtype == torch.float32)
    )
    found = parity.reference(StoredModel(model, torch.bfloat16), text)
    assert raised and all(name.startswith("model.layers.1.") for name in raised)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == own[name][0] and torch.equal(parameter, own[name][1]), name
    expected = parity.reference(StoredModel(copy.deepcopy(model).float(), torch.float32), text)
    assert torch.equal(found.logits, expected.logits) and found.text_loss == expected.text_loss


def test_logits_that_overflow_prove_nothing(dsa_model, tmp_path, monkeypatch):
    """The tolerance in fp16 is twice torch's own error, which is infinite then."""
    exact = torch.randn(parity.DECODED_TOKENS, 4)
    monkeypatch.setattr(parity, "_session", lambda *_, fuse: None)
    monkeypatch.setattr(parity, "_run_onnx", lambda *_: (exact + 5, []))
    runs = iter([exact, exact + torch.inf])
    monkeypatch.setattr(parity, "_run_torch", lambda *_: (parity.Reference(next(runs), 1.0), {}))
    half, text = StoredModel(dsa_model, torch.float16), [0] * (parity.DECODED_TOKENS + 1)
    assert not check_parity(half, tmp_path, text, tmp_path)["passed"]


def test_the_parity_check_sees_short_and_long_pasts(export, dsa_model, monkeypatch):
    """The first call holds k tokens at most: there everything is selected, in another branch of the body."""
    calls = []
    whole = StoredModel(dsa_model, torch.float32)
    session = parity._session(whole, export / "sparse", export / "scratch", fuse=False)
    binding = type(session.io_binding())
    bind = binding.bind_cpu_input

    def noted(self, name, array):
        calls.append((name, array.shape))
        bind(self, name, array)

    monkeypatch.setattr(binding, "bind_cpu_input", noted)
    parity._run_onnx(whole, session, list(range(3, 203)))
    lengths = [shape[1] for name, shape in calls if name == "input_ids"]
    k = min(dsa_model.config.topk_per_layer)
    assert lengths[:2] == [k, min(parity.CHUNK, 200 - parity.DECODED_TOKENS - k)] and sum(lengths) == 199


def test_quality_is_that_of_the_kernels_that_run_later(dsa_model, tmp_path, monkeypatch):
    exact = torch.randn(parity.DECODED_TOKENS, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(parity, "_session", lambda *_, fuse: fuse)
    monkeypatch.setattr(parity, "_run_onnx", lambda _, fused, __: (exact + fused, []))
    monkeypatch.setattr(parity, "_run_torch", lambda *_: (parity.Reference(exact, 1.0), {}))
    text = [0] * (parity.DECODED_TOKENS + 1)
    result = check_parity(StoredModel(dsa_model, torch.float32), tmp_path, text, tmp_path, parity.Reference(exact, 1.0))
    assert result["max_abs_error"] == 0 and result["quality"]["max_abs_error"] == pytest.approx(1)


def test_what_is_quantised_is_what_the_flags_say(dsa_folder, tmp_path, monkeypatch):
    made: list[tuple] = []
    monkeypatch.setattr(export_main, "Scheme", lambda *scheme: made.append(scheme))
    monkeypatch.setattr(export_main, "output_folder", None)
    flags = ["--weights", "int8", "--block-size", "64", "--keep-lm-head", "--int8-indexer"]
    with pytest.raises(TypeError, match="not callable"):
        export_main.main(["--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), *flags])
    assert made == [("int8", 64, False, True)]


@pytest.mark.parametrize("k", [4, 24, 40])
def test_how_far_selections_are_apart(k):
    """Counted row by row: nothing, something, all that can be."""
    g = torch.Generator().manual_seed(k)
    scores = torch.randn(2, 30, 30, generator=g).masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf)
    scores[1, :, :20] = scores[0, :, :20]

    def select(scores):
        best = scores.topk(min(k, 30), dim=-1)
        return torch.where(best.values > -torch.inf, best.indices, -1).int()

    ours, theirs, opposite = select(scores[0]), select(scores[1]), select(-scores[0].masked_fill(scores[0] < -9, 99))
    assert _apart(ours, ours) == 0
    sets = [({*a.tolist()} - {-1}, {*b.tolist()} - {-1}) for a, b in zip(ours, theirs, strict=True)]
    most = sum(min(len(a), t + 1 - len(a)) for t, (a, _) in enumerate(sets))
    assert _apart(ours, theirs) == pytest.approx(sum(len(a - b) for a, b in sets) / max(most, 1))
    assert _apart(ours, opposite) == (1 if k < 30 else 0)


def test_a_k_that_covers_the_text_is_said_to_check_no_selection(dsa_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export_main, "MAX_PARITY_PROMPT", 40)
    result = export_command("--model", str(dsa_folder), "--topk", "200", "--out", str(tmp_path / "onnx"))
    assert result.returncode == 0, result.stderr
    assert "k covers the text in 2 layers: their selection itself was not checked" in result.stdout.replace("\n", " ")
    parity = read_manifest(tmp_path / "onnx", "onnx", "test")["parity"]["sparse"]
    assert parity["selected_sets"]["covered_layers"] == 2


@pytest.mark.parametrize(
    ("flags", "bytes_each"),
    [([], 4), (["--dtype", "fp16"], 2), (["--dtype", "bf16"], 4), (["--dtype", "fp16", "--weights", "int4"], 4)],
)
def test_a_disk_that_is_too_small_is_refused_at_once(dsa_folder, tmp_path, monkeypatch, flags, bytes_each):
    needed = load_model(dsa_folder).num_parameters() * bytes_each
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    monkeypatch.setattr(export_main, "export_graph", lambda _: pytest.fail("enough"))
    arguments = ["--model", str(dsa_folder), "--out", str(tmp_path / "a" / "onnx"), *flags]
    with pytest.raises(UserError, match=rf"needs 0\.0 GiB of disk.*, and {tmp_path} has 0\.0 free: free some space"):
        export_main.main(arguments)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with pytest.raises(pytest.fail.Exception, match="enough"):
        export_main.main(arguments)


def test_upcast_leaves_no_bf16(dsa_folder):
    graph = export_graph(StoredModel(load_model(dsa_folder), torch.bfloat16))
    passes.upcast_bf16(graph)
    types = [value.dtype for value in [*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()]]
    assert ir.DataType.BFLOAT16 not in types


# Wrong input: one line, exit code 1 or 2, nothing half-written.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no folder"),
        (["--model", "QWEN"], "plain checkpoint without an indexer"),
        (["--model", "DSA", "--topk", "0"], "--topk must be between 1 and 4096"),
        (["--model", "DSA", "--topk", "5000"], "--topk must be between 1 and 4096"),
        (["--model", "DSA", "--out", "FOREIGN"], "was not written by this toolchain"),
        (["--model", "DSA", "--dtype", "int3"], "invalid choice"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message, qwen_folder, dsa_folder, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    places = {"QWEN": str(qwen_folder), "DSA": str(dsa_folder), "FOREIGN": str(foreign)}
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "onnx")]
    result = export_command(*(places.get(a, a) for a in arguments), *out)
    assert result.returncode in (1, 2)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.returncode == 2 or len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign"]
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_without_a_checkpoint_it_says_what_makes_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export_command()
    assert result.returncode == 1
    assert result.stderr == "error: there is no folder ckpt: `python -m train.joint` makes it, or name a --model\n"


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_exported(dsa_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(dsa_folder, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)
    result = export_command("--model", str(folder), "--out", str(tmp_path / "onnx"))
    assert result.returncode == 1 and "the tokenizer does not match the model" in result.stderr


def test_random_indexer_is_recorded(qwen_folder, tmp_path):
    out = tmp_path / "onnx"
    result = export_command("--model", str(qwen_folder), "--random-indexer", "--topk", "8", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert read_manifest(out, "onnx", "test")["random_indexer"] is True
    assert "time these graphs" in result.stdout


def test_failed_parity_keeps_nothing(dsa_folder, tmp_path):
    """A checkpoint whose products overflow: no graph of it can agree with anything."""
    folder = tmp_path / "broken"
    shutil.copytree(dsa_folder, folder)
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    model.save_pretrained(folder)
    result = export_command("--model", str(folder), "--out", str(tmp_path / "onnx"))
    assert result.returncode == 1 and "nothing was kept" in result.stderr
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "onnx.partial").exists()
    assert json.loads((folder / "config.json").read_text())["index_topk"] == 16


def test_full_disk_leaves_the_earlier_export(export, dsa_folder, tmp_path, monkeypatch):
    """numpy reports a short write as an OSError without a number; the folder that was there before stays."""
    out = tmp_path / "onnx"
    shutil.copytree(export, out)

    def full(*_):
        raise OSError("802816 requested and 604416 written")

    monkeypatch.setattr(ir.external_data, "convert_tensors_to_external", full)
    result = export_command("--model", str(dsa_folder), "--out", str(out))
    assert result.returncode == 1 and "disk full" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    compare_folder(export)
    assert (out / "manifest.json").read_text() == (export / "manifest.json").read_text()


def test_interrupt_leaves_nothing(dsa_folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsa_export.onnx.__main__.check_parity", interrupt)
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"))
    assert result.returncode == 1 and "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--keep-lm-head", "--int8-indexer", "--block-size=64"])
def test_flags_of_the_quantisation_need_it(flag: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        export_main.parse_arguments([flag])
    assert end.value.code == 2 and "need --weights" in capsys.readouterr().err
