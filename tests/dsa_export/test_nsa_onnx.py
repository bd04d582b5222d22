"""Native sparse attention as graphs and engines: export, parity, ragged batches, byte counts, a session, a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_export.files import read_manifest
from dsa_export.model import load_model
from tests.conftest import build_tokenizer
from tests.dsa_export.conftest import Graph, export_command
from tests.dsa_export.test_nsa import OPTIONS, build


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, export) of a model with one layer."""
    folder = tmp_path_factory.mktemp("nsa")
    build(layers=1).save_pretrained(folder / "checkpoint")
    build_tokenizer().save_pretrained(folder / "checkpoint")
    result = export_command("--model", str(folder / "checkpoint"), "--out", str(folder / "onnx"))
    assert result.returncode == 0, result.stderr
    return folder / "checkpoint", folder / "onnx"


def test_the_export_says_what_it_checked(exported):
    manifest = read_manifest(exported[1], "onnx", "")
    assert manifest["parity"]["sparse"]["passed"] and manifest["parity"]["dense"]["passed"]
    assert manifest["identical_operators"] is None
    assert manifest["shared_weights"]["shared"] > 5 and manifest["shared_weights"]["sparse_only"] > 5
    assert manifest["topk"] == OPTIONS["nsa_selection_size"] * OPTIONS["nsa_selected_blocks"]
    caches = {entry["name"]: entry for entry in manifest["graphs"]["sparse"]["cache"]}
    assert caches["compressed"]["shape"] == ["batch", 4, "capacity_per_4", 16]
    assert [entry["name"] for entry in manifest["graphs"]["dense"]["cache"]] == ["key", "value"]


@torch.no_grad()
def test_chunks_and_decoding_of_rows_of_different_lengths(exported, tokens):
    checkpoint, onnx = exported
    model = load_model(checkpoint)
    graph = Graph(onnx / "sparse" / "model.onnx", batch=2)
    rows = [tokens[0].tolist(), tokens[1].tolist()]
    done = [0, 0]
    for chunk in [(13, 5), (20, 3), (1, 17), *[(1, 1)] * 9]:
        logits = graph.step([row[start : start + n] for row, start, n in zip(rows, done, chunk, strict=True)])
        done = [start + n for start, n in zip(done, chunk, strict=True)]
        for b, (row, end) in enumerate(zip(rows, done, strict=True)):
            expected = model(torch.tensor([row[:end]]), use_cache=False, logits_to_keep=1).logits[0, 0]
            np.testing.assert_allclose(logits[b], expected, atol=1e-4, err_msg=f"row {b}, {end} tokens")
