"""Weights that stay as a checkpoint stores them: what comes of them is what comes of converted ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_export.cli import UserError
from dsa_export.model import load_model
from dsa_export.model.checkpoint import parameter_names
from dsa_export.onnx.calibrate import calibrate
from dsa_export.onnx.export import WEIGHTS_FILE, export_graph, save_graphs
from dsa_export.onnx.parity import reference
from dsa_export.onnx.quantise import Scheme, quantise, untie
from dsa_export.onnx.stored import StoredModel
from tests.conftest import build_qwen

INT4 = Scheme("int4", 32, lm_head=True, indexer=True)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def in_bf16(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = build_qwen(tmp_path / "bf16", tied=request.param)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path, dtype: torch.dtype, **options) -> StoredModel:
    torch.manual_seed(0)  # of the new indexer
    return StoredModel(load_model(folder, dtype=dtype, index_topk=16, **options).requires_grad_(False), dtype)


@pytest.mark.parametrize(
    ("how", "dtype"), [("plain", torch.float16), ("int4", torch.float32), ("calibrated", torch.float32)]
)
def test_an_export_is_that_of_converted_weights(in_bf16, tmp_path, tokens, dtype, how):
    written = []
    for name, kept in (("converted", lambda _: ()), ("stored", parameter_names)):
        stored = loaded(in_bf16, dtype, kept=kept)
        if how != "plain":
            untie(stored.model)
        own = {key: (p.dtype, p.data_ptr()) for key, p in stored.model.named_parameters()}
        graph = export_graph(stored)
        if how != "plain":
            quantise([graph], stored, INT4, calibrate(stored, tokens, INT4) if how == "calibrated" else {})
        save_graphs({"sparse": graph}, tmp_path / name)
        found = reference(stored, tokens[0].tolist())
        written.append(((tmp_path / name / "sparse" / WEIGHTS_FILE).read_bytes(), found.text_loss))
        assert {key: (p.dtype, p.data_ptr()) for key, p in stored.model.named_parameters()} == own
    assert {dtype for dtype, _ in own.values()} == {torch.bfloat16, dtype}
    assert written[0] == written[1]


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_a_graph_is_the_models(tmp_path, tied):
    """Also of one that torch knows by two names."""
    stored = loaded(build_qwen(tmp_path / "qwen", tied=tied), torch.float32, kept=parameter_names)
    weights = {
        name: value.const_value.numpy()
        for name, value in export_graph(stored).graph.initializers.items()
        if name.startswith(("model.layers", "model.norm", "model.embed", "lm_head"))
    }
    matrices = [sum(tensor.ndim == 2 for tensor in found) for found in (weights.values(), stored.model.parameters())]
    assert matrices[0] == matrices[1] > 15
    for name, found in weights.items():
        expected = stored.model.get_parameter(name).numpy()
        assert (found == (expected if found.shape == expected.shape else expected.T)).all(), name


def test_quantised_values_are_read_from_the_file_once_it_is_written(in_bf16, tmp_path):
    """A file with several links, which onnx_ir itself does not read."""
    stored = loaded(in_bf16, torch.float32, kept=parameter_names)
    untie(stored.model)
    graphs = {"dense": export_graph(stored.dense()), "sparse": export_graph(stored)}
    quantise(graphs.values(), stored, INT4, {})
    before = {name: stored.value(name) for name in stored.quantised}
    save_graphs(graphs, tmp_path)
    assert len(before) == 2 * (7 + 3) + 2
    assert all(torch.equal(stored.value(name), values) for name, values in before.items())
    (tmp_path / "dense" / WEIGHTS_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        stored.value("lm_head.weight")


def test_what_fails_within_a_layer_leaves_the_weights_as_they_were(in_bf16, tokens):
    stored = loaded(in_bf16, torch.float32, kept=parameter_names)
    own = {key: (p.dtype, p.data_ptr()) for key, p in stored.model.named_parameters()}

    def fail(*_: object) -> None:
        raise MemoryError

    stored.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        reference(stored, tokens[0].tolist())
    assert {key: (p.dtype, p.data_ptr()) for key, p in stored.model.named_parameters()} == own
    assert not any(layer._forward_pre_hooks for layer in stored.model.model.layers)


def test_an_outline_holds_a_number_for_each_weight(in_bf16):
    outline = loaded(in_bf16, torch.float32, kept=parameter_names).outline()
    assert sum(p.untyped_storage().nbytes() for p in outline.parameters()) == 4 * len(list(outline.parameters()))
    assert outline.config.tie_word_embeddings == (outline.lm_head.weight is outline.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_the_asked_type_cannot_hold_are_refused_before_they_are_converted(in_bf16, dtype):
    path = in_bf16 / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    if dtype == torch.float32:
        loaded(in_bf16, dtype, kept=parameter_names)
        return
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that are not finite in torch\.float16"):
        loaded(in_bf16, dtype, kept=parameter_names)
