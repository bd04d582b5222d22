"""Every supported family, against transformers' own model on the same random weights; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV32Config,
    GlmMoeDsaConfig,
    LlamaConfig,
    LlamaForCausalLM,
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
from engines.artifacts import open_export
from engines.ort_graph import group_query
from tests.conftest import VOCABULARY, build_tokenizer
from tests.dsa_export.conftest import export_command
from train.adapters import add_adapters, merge_adapters

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
LATENT: dict[str, Any] = {
    **SHAPE,
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 2,
}
YARN_MSCALE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64,
}
STOCK: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "deepseek_v3": DeepseekV3Config(**LATENT, q_lora_rank=24),
}
LATENT_VARIANTS: dict[str, PreTrainedConfig] = {
    "full queries, half-split RoPE": DeepseekV3Config(**LATENT, q_lora_rank=None, rope_interleave=False),
    "YaRN with mscale": DeepseekV3Config(**LATENT, q_lora_rank=24, rope_parameters=YARN_MSCALE),
    "YaRN": DeepseekV3Config(
        **LATENT, q_lora_rank=None, rope_parameters={k: v for k, v in YARN_MSCALE.items() if "mscale" not in k}
    ),
}
FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4, "first_k_dense_replace": 4}
SPARSE: dict[str, Any] = {
    **LATENT,
    **FOUR_LAYERS,
    "mlp_layer_types": ["dense"] * 4,
    "q_lora_rank": LATENT["hidden_size"],
    "rms_norm_eps": 1e-6,
    "index_topk": 8,
    "index_head_dim": LATENT["qk_rope_head_dim"],
    "index_n_heads": 16,
}
SPARSE_STOCK: dict[str, tuple[PreTrainedConfig, int]] = {
    "DeepSeek-V3.2": (DeepseekV32Config(**SPARSE), 1),
    "GLM": (GlmMoeDsaConfig(**SPARSE), 1),
    "GLM, two layers to a selection": (GlmMoeDsaConfig(**SPARSE, indexer_types=["full", "shared"] * 2), 2),
}
"""And how many layers share a selection."""
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


@pytest.mark.parametrize("variant", LATENT_VARIANTS)
@torch.no_grad()
def test_latent_attention_equals_the_stock_model(variant: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(LATENT_VARIANTS[variant], tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder, index_topk=tokens.shape[1], index_heads=2, index_dim=16)
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, **EXACT)
    torch.testing.assert_close(dense_twin(model)(tokens).logits, stock(tokens).logits, **EXACT)
    task = peers.Task(str(folder), [59], tokens[0].numpy(), "prefill", 8, {}, measure.Budget(1), 1)
    assert families.stock_config(model.config).to_diff_dict().get("q_lora_rank") == stock.config.q_lora_rank
    assert type(peers.TransformersPeer(task).model) is type(stock)


@pytest.mark.parametrize("stock", SPARSE_STOCK)
@torch.no_grad()
def test_sparse_attention_is_that_of_stock_models(stock: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    """The models that were trained with DSA: whole logits at k = 8 of 60 tokens, and what is generated from a cache.

    Their indexers make queries from the compressed queries of attention, ours from the layer's input: here these are
    the same, as the compression keeps all of it. 16 heads: with few, many scores are exactly 0, and which of equal ones
    they take is open.
    """
    config, share = SPARSE_STOCK[stock]
    torch.manual_seed(3)
    folder = build(DeepseekV3Config(**LATENT | FOUR_LAYERS, q_lora_rank=LATENT["hidden_size"]), tmp_path)
    ours = load_model(folder, index_topk=8, index_heads=16, index_dim=8, index_share=share)
    for layer in ours.model.layers:
        layer.input_layernorm.weight.fill_(1)
        layer.self_attn.q_a_layernorm.weight.fill_(1)
        nn.init.eye_(layer.self_attn.q_a_proj.weight)
        for parameter in layer.self_attn.indexer.parameters() if layer.self_attn.leads else ():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    state = ours.state_dict()
    if config.model_type == "glm_moe_dsa":  # rotates neighbours in index queries and keys, we numbers half a row apart
        for name in [n for n in state if ".indexer." in n and "weights_proj" not in n]:
            state[name] = state[name].unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
    for name, its_name in (("indexer.q_proj", "indexer.wq_b"), ("indexer.k_proj", "indexer.wk")):
        state = {key.replace(name, its_name): value for key, value in state.items()}
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(state)
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, **EXACT)
    indexer, theirs = (m.model.layers[0].self_attn.indexer for m in (ours, model))
    assert indexer.k_norm.eps == theirs.k_norm.eps
    mask = torch.ones_like(tokens)
    mask[1, :23] = 0  # padded on the left
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **options), model.generate(tokens, **options))
    ours.set_topk(9)
    assert (ours(tokens).logits - model(tokens).logits).abs().max() > 1e-2


@torch.no_grad()
def test_a_new_indexer_starts_from_heads_times_the_weights_of_their_norm(tmp_path: Path) -> None:
    folder = build(STOCK["qwen3"], tmp_path)
    attention = load_model(folder, index_heads=2, index_dim=16).model.layers[0].self_attn
    for name, heads in (("k", slice(None)), ("q", [0, attention.query_heads - 1])):
        projection, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm")
        scaled = (projection.weight.unflatten(0, (-1, 16)) * norm.weight[:, None])[heads]
        expected = scaled.mean(0) if name == "k" else scaled.flatten(0, 1)
        torch.testing.assert_close(getattr(attention.indexer, f"{name}_proj").weight, expected)


@torch.no_grad()
def test_the_peer_is_the_familys_stock_model(family: tuple[str, Path], tokens: torch.Tensor, tmp_path: Path) -> None:
    """On a checkpoint of ours too; and a cache of random rows has the stock cache's shapes."""
    _, folder = family
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    load_model(folder, index_heads=2, index_dim=16).save_pretrained(tmp_path)
    for checkpoint in (folder, tmp_path):
        task = peers.Task(str(checkpoint), [59], tokens[0].numpy(), "prefill", 8, {}, measure.Budget(1), 1)
        peer = peers.TransformersPeer(task)
        assert type(peer.model) is type(stock)
        torch.testing.assert_close(peer.model(tokens).logits, stock(tokens).logits, **EXACT)
        peer.randomise(5)
        peer.append(np.array([3]))
        assert peer.cache.get_seq_length() == 6
        needed = [peers.torch_bytes(str(checkpoint), context) for context in (10, 100)]
        assert needed[1] > needed[0] > 4 * peer.model.num_parameters() + peers.MARGIN_BYTES


@pytest.mark.parametrize("share", [1, 2])
@torch.no_grad()
def test_an_observer_is_told_what_each_key_can_add_to_the_output(
    family: tuple[str, Path], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    """The norms are those of the layer's output where one head attends to the query's own key alone."""
    model = load_model(family[1], index_topk=12, index_heads=2, index_dim=16, index_share=share)
    attention: Any = model.model.layers[1].self_attn
    attend, outputs, norms = type(attention).attend, [], []

    def one_head(self: Any, hidden: Any, q_BSE: Any, q: torch.Tensor, k: Any, v: torch.Tensor, call: Any) -> Any:
        head = len(outputs)
        alone = torch.zeros(*q.shape[:-1], v.shape[-1])
        alone[:, head] = v[:, head // (q.shape[1] // v.shape[1])]
        return alone, attend(self, hidden, q_BSE, q, k, v, call)[1]

    monkeypatch.setattr(attention, "attend", one_head.__get__(attention))
    attention.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].norm(dim=-1)))
    for _ in range(attention.query_heads):
        model(tokens, use_cache=False, observer=lambda trace: norms.append(trace.value_norms()) or {})
    torch.testing.assert_close(norms[-1], torch.stack(outputs, dim=1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_a_key_can_add_is_exact_under_autocast_and_never_nothing(family: tuple[str, Path]) -> None:
    """Of keys that add nothing at all there would be no target to learn from."""
    attention: Any = load_model(family[1], index_topk=12, index_heads=2, index_dim=16).model.layers[0].self_attn
    v = torch.randn(2, attention.kv_heads, 5, attention.value_maps().shape[-1])
    v[0] = 0
    exact = attention.value_norms(v)
    assert exact[0].min() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.value_norms(v), exact)


@pytest.mark.parametrize("form", ["dense", "sparse", "sparse with options"])
@torch.no_grad()
def test_causal_and_the_same_in_any_cut(family: tuple[str, Path], tokens: torch.Tensor, form: str) -> None:
    """No later token moves an earlier output; chunks and single steps on a cache give what one call gives."""
    torch.manual_seed(3)
    options = {"index_sinks": 2, "index_window": 3, "index_pool": 4, "index_share": 2} if "options" in form else {}
    model = load_model(family[1], index_topk=12, index_heads=2, index_dim=16, **options)
    model = dense_twin(model) if form == "dense" else model
    whole = model(tokens, use_cache=False).logits
    for position in (1, 30, 59):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % 500 + 3
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :position], whole[:, :position], atol=1e-6, rtol=0)
        assert (after[:, position] - whole[:, position]).abs().max() > 1e-3
    cache, parts, start = None, [], 0
    for length in (1, 36, 1, 1, 21):
        output = model(tokens[:, start : start + length], cache=cache, use_cache=True)
        cache, start = output.cache, start + length
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


def test_training_sees_latent_attention_as_it_runs(tokens: torch.Tensor, tmp_path: Path) -> None:
    """Training's masked core gives what the gathering core gives, the observed scores are the attention's own, and
    gradients reach every parameter of the base."""
    model = load_model(build(STOCK["deepseek_v3"], tmp_path), index_topk=12, index_heads=2, index_dim=16)
    gathered = model(tokens, use_cache=False).logits
    traces = []
    output = model.train()(tokens, labels=tokens, observer=lambda trace: traces.append(trace) or {})
    torch.testing.assert_close(output.logits, gathered, **EXACT)
    assert traces[0].q.shape[1:] == (8, 60, 40) and traces[0].k.shape[1:] == (1, 60, 40)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert ".indexer." in name or parameter.grad.abs().sum() > 0, name


def test_adapters_stand_where_latent_attention_multiplies(tokens: torch.Tensor, tmp_path: Path) -> None:
    """An adapter beside a matrix that attention takes apart would learn nothing and never be noticed."""
    model = load_model(build(STOCK["deepseek_v3"], tmp_path), index_topk=12, index_heads=2, index_dim=16)
    before = model(tokens, use_cache=False).logits.detach()
    add_adapters(model, rank=2)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_B" in name}
    assert len(adapters) == 2 * 7  # q_a, q_b, kv_a, o; gate, up, down
    model.train()(tokens, labels=tokens).loss.backward()
    for name, parameter in adapters.items():
        assert parameter.grad.abs().sum() > 0, name
        parameter.data.add_(parameter.grad, alpha=-1.0)
    adapted, norms = model(tokens).logits.detach(), []
    model(tokens, use_cache=False, observer=lambda trace: norms.append(trace.value_norms()) or {})
    merge_adapters(model)
    torch.testing.assert_close(model(tokens).logits, adapted, atol=1e-4, rtol=0)
    model(tokens, use_cache=False, observer=lambda trace: norms.append(trace.value_norms()) or {})
    for with_adapters, merged in zip(norms[:2], norms[2:], strict=True):  # two layers
        torch.testing.assert_close(with_adapters, merged, rtol=1e-4, atol=1e-6)
    assert (adapted - before).abs().max() > 1e-3


@pytest.mark.parametrize("family_name", ["qwen3", "deepseek_v3"])
def test_exports(family_name: str, tmp_path: Path) -> None:
    """The two that differ most: norms of every head and a head size of its own; rows that are key and value at once."""
    folder, ours, out = build(STOCK[family_name], tmp_path / "stock"), tmp_path / "dsa", tmp_path / "onnx"
    load_model(folder, index_topk=16, index_heads=2, index_dim=16).save_pretrained(ours)
    build_tokenizer().save_pretrained(ours)
    result = export_command("--model", str(ours), "--out", str(out))
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(out, "onnx", "test")
    assert manifest["parity"]["sparse"]["passed"] and manifest["parity"]["dense"]["passed"]
    assert manifest["parity"]["sparse"]["selected_sets"]["different"] == 0
    assert manifest["identical_operators"]["sparse_core"] == 2
    grouped = group_query(open_export(out).graphs["dense"])
    assert (grouped is None) == (family_name == "deepseek_v3"), "GroupQueryAttention does not do latent rows"
    caches = [(entry["name"], entry["shape"][1], entry["shape"][3]) for entry in manifest["graphs"]["sparse"]["cache"]]
    sparse = open_export(out).graphs["sparse"]
    row = {"qwen3": 4 * 2 * 2 * 16, "deepseek_v3": 4 * 40}[family_name]  # bytes of a token in one layer
    assert sparse.cache_bytes_per_token() == 2 * (row + 4 * 16)
    assert sparse.cache_bytes_read(1000) == 2 * (16 * row + 1000 * 4 * 16), "16 selected rows, every index key"
    if family_name == "deepseek_v3":
        assert caches == [("latent", 1, 32 + 8), ("index", 1, 16)]
        assert (manifest["model"]["kv_heads"], manifest["model"]["head_dim"]) == (1, 40)


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
        (LlamaConfig(**SHAPE, pad_token_id=-9999), "pad_token_id=-9999 is no token"),
        (
            DeepseekV3Config(**{**LATENT, "first_k_dense_replace": 1}),
            "first_k_dense_replace=1 makes mixture-of-experts",
        ),
        (DeepseekV3Config(**LATENT, attention_bias=True), "attention_bias=True is not supported in DeepSeek-V3"),
        (MistralConfig(**SHAPE), r"'mistral' models are not supported; these are: .*qwen2.*qwen3.*llama"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(config: PreTrainedConfig, option: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=option) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type 'dynamic'"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}, "factor='two' is not a number"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_positions_that_the_table_cannot_follow_are_named(
    rope: dict[str, Any], message: str, ours: bool, dsa_folder: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(dsa_folder if ours else qwen_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model")


def test_an_older_llamas_frequencies_are_not_unexpected(tmp_path: Path) -> None:
    """Which its files hold beside the weights."""
    LlamaForCausalLM(STOCK["llama"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path)


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    STOCK["llama"].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantization_config"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dsa"}, "has no latent rows .kv_lora_rank.: use 'mla'"),
        ({"attention": "mla-dsa", "index_queries": "shared"}, "index_queries='shared'"),
        ({"attention": "mla", "kv_lora_rank": 0}, "needs kv_lora_rank"),
        ({"attention": "mla-dsa", "qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"attention": "mla", "qk_norm": True}, "needs qk_norm=False"),
        ({"attention": "mla-dsa", "index_topk": 0}, "index_topk"),
    ],
)
def test_what_latent_attention_cannot_take_is_refused(options: dict[str, Any], message: str) -> None:
    fields = families.dsa_fields(STOCK["deepseek_v3"])
    with pytest.raises(ValueError, match=message):
        DSAConfig(**{**fields, **options})


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="family must be one of 'qwen2', 'qwen3'"):
        DSAConfig(family="gpt2")
