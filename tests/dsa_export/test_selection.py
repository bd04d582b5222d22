"""The options of the selection: the same model however it is cut into calls, causal, dense where k covers the text."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.config import DSAConfig
from dsa_export.model import AttentionTrace, dense_twin, load_model
from dsa_export.model.attention.dsa import pool_keys
from engines import nvidia_graph
from engines.artifacts import open_export
from engines.ort_graph import dense_while_short
from plugins.index_topk.op import index_scores
from plugins.index_topk.rounding import round_keys, round_queries
from tests.dsa_export.conftest import Graph, export_command

OPTIONS = {
    "forced": {"index_sinks": 2, "index_window": 5},
    "pooled": {"index_pool": 4},
    "shared": {"index_share": 2},
    "fp8": {"index_keys": "fp8"},
    "int8": {"index_keys": "int8"},
    "all": {"index_topk": 24, "index_pool": 3, "index_window": 4, "index_sinks": 1, "index_share": 2},
}
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_a_selection_with_options(dsa_folder, tokens, options):
    plain = load_model(dsa_folder)(tokens, use_cache=False).logits
    model = load_model(dsa_folder, **options)
    whole = model(tokens, use_cache=False).logits
    assert (whole - plain).abs().max() > 1e-3, "the option does nothing"
    torch.testing.assert_close(model.train()(tokens, use_cache=False).logits, whole, **CLOSE)
    model.eval()

    for cuts in ([1] * 60, [37, 1, 22]):  # a call ends within a group
        outputs, cache = [], None
        for part in tokens.split(cuts, dim=1):
            step = model(part, cache=cache, use_cache=True)
            cache = step.cache
            outputs.append(step.logits)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, **CLOSE)

    for position in (10, 41):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % 500 + 3
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :position], whole[:, :position], atol=1e-6, rtol=0)

    model.set_topk(60)
    dense = dense_twin(model)(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens, use_cache=False).logits, dense, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_attention_to_everything_caches_what_a_selection_needs_later(dsa_folder, tokens, options):
    model = load_model(dsa_folder, **options)
    dense = dense_twin(model)(tokens, use_cache=False).logits
    caches, logits = [], []
    for sparse in (True, False):
        model.sparse = sparse
        cache = None
        for part in tokens.split([37, 1, 22], dim=1):
            step = model(part, cache=cache, use_cache=True)
            cache = step.cache
        caches.append(cache.layers)
        logits.append(step.logits)
    torch.testing.assert_close(logits[1], dense[:, 38:], **CLOSE)
    (first, *_), (also_first, *_) = caches  # of later layers the input differs
    assert "index" in first and first.keys() == also_first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor.float(), also_first[name].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [2, 3])
@torch.no_grad()
def test_each_group_of_layers_follows_its_own_leader(four_layers, tokens, share):
    """Of four layers: two groups, of which the second may be incomplete."""
    model = load_model(four_layers, index_heads=2, index_dim=8, index_topk=5, index_share=share)
    traces: list[AttentionTrace] = []
    model(tokens, use_cache=False, observer=lambda trace: traces.append(trace) or {})
    for trace in traces:
        leader = traces[trace.layer - trace.layer % share]
        assert torch.equal(trace.indices, leader.indices) and trace.index_q is leader.index_q
    assert len(traces) == 4 and not torch.equal(traces[0].indices, traces[share].indices)


@torch.no_grad()
def test_rows_of_different_lengths_with_groups(dsa_folder, tokens):
    """Padding behind a row's end enters no group's mean."""
    model = load_model(dsa_folder, index_pool=4)
    mask = torch.ones_like(tokens)
    mask[0, :17] = 0
    together = model(tokens, attention_mask=mask, use_cache=False).logits[0, 17:]
    torch.testing.assert_close(together, model(tokens[:1, 17:], use_cache=False).logits[0], **CLOSE)


def test_means_of_groups():
    keys = torch.arange(12.0).view(1, 12, 1)
    past, lengths = torch.tensor([5]), torch.tensor([4])  # tokens 5..8 are new, the groups 4..7 and 8..11
    means = pool_keys(keys, past, 6, lengths, 4)  # two tokens of padding
    assert means.flatten().tolist() == [5.5, 8.0, 0.0]
    large = torch.full((1, 4, 1), 2.0**15).half()  # the sum of a group is beyond fp16
    assert pool_keys(large, torch.tensor([0]), 4, torch.tensor([4]), 4)[:, 0].item() == 2**15


def test_fp8_keys_keep_four_bits():
    keys = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)) * 100
    rounded, scales = round_keys(keys, "fp8")
    error = (rounded.float() * scales[..., None] - keys).abs()
    assert (error <= keys.abs() / 16 + scales[..., None] * 2**-9).all()
    assert round_keys(torch.zeros(1, 1, 64), "fp8")[0].float().eq(0).all()


def test_int8_keys_and_queries():
    """Scores within the rounding of each: half a step of 1/127 and of 1/63 of the largest entry."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 7, 64, generator=generator) * 100
    queries, weights = torch.randn(2, 5, 3, 64, generator=generator), torch.randn(2, 5, 3, generator=generator)
    rounded_keys, key_scales = round_keys(keys, "int8")
    assert ((rounded_keys.float() - 128) * key_scales[..., None] - keys).abs().le(key_scales[..., None] * 0.501).all()
    rounded, scaled_weights = round_queries(queries, weights)
    assert rounded.abs().max() == 63
    exact = index_scores(queries, weights, keys)
    found = index_scores(rounded, scaled_weights, rounded_keys, key_scales)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
    assert round_keys(torch.zeros(1, 1, 64), "int8")[0].eq(128).all()


@torch.no_grad()
def assert_graph_equals_model(path, model, tokens, calls):
    """The last logits after calls with so many tokens of each of two rows, against the whole texts in torch."""
    runner = Graph(path, 2)  # with more slots than k
    done = [0, 0]
    for sizes in calls:
        logits = runner.step(
            [row[start : start + n] for row, start, n in zip(tokens.tolist(), done, sizes, strict=True)]
        )
        done = [start + n for start, n in zip(done, sizes, strict=True)]
    for row, length in enumerate(done):
        expected = model(tokens[row : row + 1, :length], use_cache=False).logits[0, -1]
        torch.testing.assert_close(torch.from_numpy(logits[row]), expected, **CLOSE)


def test_graphs_with_all_options(dsa_folder, tmp_path, tokens):
    """Chunks of rows of different lengths through the exported graph, against torch."""
    arguments = ["--topk", "24", "--index-pool", "3", "--index-window", "4", "--index-sinks", "1", "--index-share", "2"]
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), *arguments)
    assert result.returncode == 0, result.stderr
    graph = open_export(tmp_path / "onnx").graphs["sparse"]
    assert [name for name, _ in graph.cache_names()] == [
        "0.key", "0.value", "0.index", "0.pooled", "1.key", "1.value",
    ]  # fmt: skip
    assert graph.cache_names()[3][1].concrete(2, 96) == (2, 1, 34, 32)
    per_token = 4 * (2 * 2 * 64 + 32 + 32 / 3)
    assert graph.cache_bytes_per_token() == pytest.approx(per_token)
    assert graph.cache_bytes_read(90) == 4 * (2 * 2 * 64 * 24 + 32 * 5 + 32 * 30)

    # Scores are of the 34 means, not of the 96 keys.
    assert graph.workspace_bytes_per_query(96) == 34 * (2 * 4 + 3) * 4 + 2 * 24 * 64 * 4 * 2

    shortened = dense_while_short(graph, 1)
    assert shortened is not None and [node.op_type for node in shortened.graph.node].count("If") == 2
    onnx.save(shortened, graph.path.with_name("shortened.onnx"))
    model, calls = load_model(dsa_folder, **OPTIONS["all"]), [(20, 31), (1, 14), (1, 1)]
    for path in (graph.path, graph.path.with_name("shortened.onnx")):
        assert_graph_equals_model(path, model, tokens, calls)


def test_graph_with_int8_keys(dsa_folder, tmp_path, tokens):
    """Selected sets equal torch's (the export's own parity check, integers are exact); the engine decodes by bytes."""
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), "--index-keys", "int8")
    assert result.returncode == 0, result.stderr
    graph = open_export(tmp_path / "onnx").graphs["sparse"]
    assert [(tensor.name, tensor.dtype, tensor.row_bytes) for tensor in graph.cache[2:]] == [
        ("index", "uint8", 32),
        ("index_scale", "float32", 4),
    ]
    assert_graph_equals_model(graph.path, load_model(dsa_folder, index_keys="int8"), tokens, [(20, 31), (1, 1), (1, 1)])
    with pytest.raises(UserError, match="export without --index-keys int8"):
        nvidia_graph.check_caches(graph)


def test_graph_with_fp8_keys(dsa_folder, tmp_path):
    """The parity check of the export itself runs it, with the same numbers in fp32 caches."""
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), "--index-keys", "fp8")
    assert result.returncode == 0, result.stderr
    graph = open_export(tmp_path / "onnx").graphs["sparse"]
    assert [(tensor.name, tensor.dtype, tensor.row_bytes) for tensor in graph.cache[2:]] == [
        ("index", "float8_e4m3fn", 32),
        ("index_scale", "float32", 4),
    ]
    with pytest.raises(UserError, match="export without --index-keys fp8"):
        nvidia_graph.check_caches(graph)


def test_packed_weights_in_fp16_stay_outside_the_branches(dsa_folder, tmp_path, tokens):
    """In a branch ONNX Runtime casts their scales at run time, and selects other tokens."""
    arguments = ["--dtype", "fp16", "--weights", "int8", "--int8-indexer"]
    result = export_command("--model", str(dsa_folder), "--out", str(tmp_path / "onnx"), *arguments)
    assert result.returncode == 0, result.stderr
    graph = open_export(tmp_path / "onnx").graphs["sparse"]
    onnx.save(dense_while_short(graph, 1), graph.path.with_name("shortened.onnx"))
    exported, shortened = (
        Graph(path, 1).step([tokens[0].tolist()]) for path in (graph.path, graph.path.with_name("shortened.onnx"))
    )
    np.testing.assert_allclose(shortened, exported, atol=5e-3)


def test_an_indexer_of_several_layers_is_not_given_to_fewer(dsa_folder, tmp_path):
    load_model(dsa_folder, index_share=2).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.index_share == 2
    with pytest.raises(UserError, match="index_share = 1: the checkpoint has one for 2 layers"):
        load_model(tmp_path, index_share=1)


@pytest.mark.parametrize("share", [1, 2])
@torch.no_grad()
def test_a_call_keeps_no_layers_queries_keys_and_values(dsa_folder, tokens, share):
    """They are the largest tensors of a layer, and only its own attention needs them."""
    before: list[weakref.ref] = []

    def observe(trace: AttentionTrace) -> dict:
        assert all(reference() is None for reference in before)
        (v,) = trace.value_norms.args
        before.extend(weakref.ref(tensor) for tensor in (trace.q, trace.k, v))
        return {}

    load_model(dsa_folder, index_share=share)(tokens, use_cache=False, observer=observe)
    assert len(before) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index_pool": 3}, "pool must be at least 1 and divide k = 16, got 3"),
        ({"index_sinks": 10, "index_window": 7}, "always select 17 keys: k = 16"),
        ({"index_share": 0}, "index_share must be at least 1, got 0"),
        ({"index_share": 3}, "index_share = 3 exceeds the 2 layers"),
        ({"index_share": 2, "index_topk": [16, 8]}, "index_share = 2 needs one index_topk for layers that share"),
        ({"index_keys": "fp8", "index_pool": 2}, "index_keys = fp8 excludes index_pool = 2"),
        ({"index_keys": "int2"}, "index_keys must be one of model, fp8, int8, got 'int2'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DSAConfig(**{"index_topk": 16, "num_hidden_layers": 2, **options})
