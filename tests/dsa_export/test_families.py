"""Every supported family, against transformers' own model on the same random weights; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from bench import measure, peers
from dsa_export.cli import UserError
from dsa_export.config import DSAConfig
from dsa_export.files import read_manifest
from dsa_export.model import DSAForCausalLM, dense_twin, families, load_model
from dsa_export.model.checkpoint import load_config
from tests.conftest import VOCABULARY, build_tokenizer
from tests.dsa_export.conftest import export_command

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
STOCK: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
}
EXACT = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="session", params=STOCK)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's name and a folder with a stock model of it, whose norms and biases matter."""
    return request.param, build(STOCK[request.param], tmp_path_factory.mktemp(request.param))


def build(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_equals_the_stock_model(family: tuple[str, Path], tokens: torch.Tensor, tmp_path: Path) -> None:
    """Dense, and sparse where k covers the text; also after a round trip through a checkpoint of ours."""
    name, folder = family
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    model = load_model(folder, index_topk=tokens.shape[1], index_heads=2, index_dim=16)
    assert model.config.family == name
    torch.testing.assert_close(model(tokens).logits, expected, **EXACT)
    torch.testing.assert_close(dense_twin(model)(tokens).logits, expected, **EXACT)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config.family == name
    torch.testing.assert_close(again(tokens).logits, expected, **EXACT)
    torch.testing.assert_close(load_model(tmp_path, attention="dense")(tokens).logits, expected, **EXACT)
    again.set_topk(8)
    assert (again(tokens).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_the_peer_is_the_familys_stock_model(family: tuple[str, Path], tokens: torch.Tensor, tmp_path: Path) -> None:
    """On a checkpoint of ours too; and a cache of random rows has the stock cache's shapes."""
    _, folder = family
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    load_model(folder, index_heads=2, index_dim=16).save_pretrained(tmp_path)
    for checkpoint in (folder, tmp_path):
        task = peers.Task(str(checkpoint), [59], tokens[0].numpy(), "prefill", 8, measure.Budget(1), 1)
        peer = peers.TransformersPeer(task)
        assert type(peer.model) is type(stock)
        torch.testing.assert_close(peer.model(tokens).logits, stock(tokens).logits, **EXACT)
        peer.randomise(5)
        peer.append(np.array([3]))
        assert peer.cache.get_seq_length() == 6
        assert peers.torch_bytes(str(checkpoint), 100) > peers.torch_bytes(str(checkpoint), 10)


def test_qwen3_exports(tmp_path: Path) -> None:
    """The richest of them: norms of every head, no bias, a head size of its own."""
    folder, ours, out = build(STOCK["qwen3"], tmp_path / "qwen3"), tmp_path / "dsa", tmp_path / "onnx"
    model = load_model(folder, index_topk=16, index_heads=2, index_dim=16)
    model.save_pretrained(ours)
    build_tokenizer().save_pretrained(ours)
    result = export_command("--model", str(ours), "--out", str(out))
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(out, "onnx", "test")
    assert manifest["parity"]["sparse"]["passed"] and manifest["parity"]["dense"]["passed"]
    assert manifest["parity"]["sparse"]["selected_sets"]["different"] == 0
    assert manifest["identical_operators"]["sparse_core"] == 2
    assert manifest["model"]["head_dim"] == 16


PUBLISHED = {
    "Qwen2.5-0.5B": ((896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "Qwen2.5-1.5B": ((1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "Qwen2.5-3B": ((2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688),
    "Qwen2.5-7B": ((3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
}
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model: str) -> None:
    """Parameters of the whole model: the stock model's and the indexers', and nothing else."""
    shape, published = PUBLISHED[model]
    stock = Qwen2Config(**dict(zip(FIELDS, shape, strict=True)))
    config = DSAConfig(**{**families.dsa_fields(stock), "attention": "dsa"})
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in DSAForCausalLM(config).named_parameters()}
        assert sum(p.numel() for p in Qwen2ForCausalLM(stock).parameters()) == published
    indexers = sum(size for name, size in sizes.items() if ".indexer." in name)
    E, Hi, Di = config.hidden_size, config.index_heads, config.index_dim
    assert indexers == config.num_hidden_layers * (E * Hi * Di + E * Di + 2 * Di + E * Hi)
    assert sum(sizes.values()) == published + indexers


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias=True is not supported in Llama"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias=True"),
        (Qwen3Config(**SHAPE, attention_bias=True), "attention_bias=True is not supported in Qwen3"),
        (Qwen3Config(**SHAPE, use_sliding_window=True, max_window_layers=1), "use_sliding_window"),
        (Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=0), "use_sliding_window"),
        (
            LlamaConfig(
                **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "partial_rotary_factor=0.5",
        ),
        (
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
        (MistralConfig(**SHAPE), r"'mistral' models are not supported; these are: .*qwen2.*qwen3.*llama"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(config: PreTrainedConfig, option: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=option) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    STOCK["llama"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantization_config"):
        load_config(tmp_path)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="family must be one of 'qwen2', 'qwen3'"):
        DSAConfig(family="gpt2")
