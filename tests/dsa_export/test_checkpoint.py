"""Loading: strict, and one clear line for what cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, Qwen3Config, Qwen3ForCausalLM

from dsa_export.cli import UserError
from dsa_export.files import checkpoint_hash, write_manifest
from dsa_export.model import dense_twin, load_model, load_tokenizer
from dsa_export.model.checkpoint import INDEXER, load_config, model_source, parameter_names, stored_types
from tests.conftest import build_qwen


@pytest.fixture
def damaged(dsa_folder, tmp_path):
    """A copy of the DSA checkpoint to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(dsa_folder, folder)
    return folder


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "nothing")


def test_a_name_without_an_owner_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **_: pytest.fail("waits for the hub"))
    with pytest.raises(UserError, match=r"no such folder: qwen-dsa \(a model of the hub has an owner"):
        load_model("qwen-dsa")


def test_a_file_is_no_checkpoint(dsa_folder):
    with pytest.raises(UserError, match=r"config\.json is a file: name the folder of the checkpoint"):
        load_config(dsa_folder / "config.json")


def test_weights_that_this_user_may_not_read(damaged, monkeypatch):
    (damaged / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"model\.safetensors may not be read by this user: chmod a\+r"):
        load_model(damaged)


def test_no_such_hub_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read at import
    with pytest.raises(UserError, match="no folder and no reachable hub model"):
        load_model("nobody/no-such-model")


def test_another_architecture(tmp_path):
    MistralConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'mistral' models are not supported"):
        load_model(tmp_path)


def test_a_gguf_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a GGUF file: make a checkpoint of it first"):
        load_config(tmp_path / "model.gguf")


def test_code_of_a_checkpoint_is_not_asked_for(tmp_path, monkeypatch):
    """On a terminal transformers would ask whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    config = {"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="no readable model in"):
        load_config(tmp_path)


def test_truncated_weights(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(damaged)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_corrupt_weights(damaged, name):
    (damaged / "model.safetensors").unlink()
    (damaged / name).write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(damaged)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "b"}}', '{"weight_'])
def test_an_index_of_shards_that_is_none(damaged, text):
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(damaged)


def test_missing_base_tensor(damaged):
    edit_weights(damaged, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        load_model(damaged)


def test_missing_indexer_tensor_of_a_dsa_checkpoint(damaged):
    edit_weights(damaged, lambda tensors: tensors.pop("model.layers.0.self_attn.indexer.k_proj.weight"))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.indexer\.k_proj\.weight"):
        load_model(damaged)


def test_unexpected_tensor(damaged):
    edit_weights(damaged, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"model\.extra"):
        load_model(damaged)


def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(tmp_path):
    """As transformers decides by the file; the dense twin must not tie it either."""
    folder = build_qwen(tmp_path / "tied", tied=True)
    weights = load_file(folder / "model.safetensors")
    own = torch.randn(weights["model.embed_tokens.weight"].shape)
    save_file({**weights, "lm_head.weight": own}, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(dense_twin(model).lm_head.weight, own) and torch.equal(model.lm_head.weight, own)


def test_weights_that_do_not_fit_are_not_loaded(dsa_folder, damaged, monkeypatch):
    needed = sum(tensor.nelement() * 4 for tensor in load_file(dsa_folder / "model.safetensors").values())
    monkeypatch.setattr("dsa_export.model.checkpoint.available_memory", lambda: needed)
    load_model(dsa_folder)
    monkeypatch.setattr("dsa_export.model.checkpoint.available_memory", lambda: needed - 1)
    load_model(dsa_folder)  # mapped
    edit_weights(damaged, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    load_model(damaged, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"the weights of .* take 0\.0 GiB, and this machine has 0\.0 GiB of"):
        load_model(damaged)


def test_parameters_that_are_kept_as_the_file_has_them(qwen_folder, damaged):
    """Also where others are converted. What is new has the type that was asked for."""
    low = {"model.embed_tokens.weight": torch.bfloat16, "model.norm.weight": torch.float16}
    edit_weights(damaged, lambda tensors: tensors.update({name: tensors[name].to(t) for name, t in low.items()}))
    every = {"kept": parameter_names}
    assert {n: p.dtype for n, p in load_model(damaged, **every).named_parameters() if p.dtype != torch.float32} == low
    assert {p.dtype for p in load_model(damaged).parameters()} == {torch.float32}
    model = load_model(damaged, dtype=torch.bfloat16, **every)
    assert {n: p.dtype for n, p in model.named_parameters() if p.dtype != torch.float32} == low
    plain = load_model(qwen_folder, dtype=torch.float16, **every)
    assert {p.dtype for n, p in plain.named_parameters() if INDEXER in n} == {torch.float16}


def test_types_are_those_of_the_files_that_are_loaded(damaged):
    """A folder may hold others, such as a variant in fp16, or a shard of what was there before."""
    whole = stored_types(damaged)
    half = {name: tensor.half() for name, tensor in load_file(damaged / "model.safetensors").items()}
    save_file(half, damaged / "model.fp16.safetensors")
    (damaged / "model-00001-of-00002.safetensors").write_bytes(b"half a file")
    assert stored_types(damaged) == whole
    assert {p.dtype for p in load_model(damaged, kept=parameter_names).parameters()} == {torch.float32}


def test_tied_matrices_of_a_file_that_holds_both_stay_tied(tmp_path):
    folder = build_qwen(tmp_path / "tied", tied=True)
    low = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    low["lm_head.weight"] = low["model.embed_tokens.weight"].clone()
    save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.float16):
        assert load_model(folder, dtype=dtype, kept=parameter_names).config.tie_word_embeddings


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Where someone/small lies in the hub's cache; its name is the revision."""
    folder, revision = tmp_path / "models--someone--small", "0123abcd" * 5
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder / "snapshots" / revision


def test_weights_of_the_hub(dsa_folder, snapshot):
    """In one file or in several."""
    load_model(dsa_folder).save_pretrained(snapshot, max_shard_size="200KB")
    types = stored_types("someone/small")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    assert types == stored_types(dsa_folder) and set(types.values()) == {torch.float32}
    with pytest.raises(UserError, match="the weights of someone/else cannot be fetched: Cannot find"):
        stored_types("someone/else")


def test_weights_that_are_not_finite(damaged):
    edit_weights(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0].fill_(torch.nan))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"):
        load_model(damaged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 100}, r"mlp\.down_proj\.weight has the shape \[96, 192\], and \[96, 100\] by the conf"),
        ({"vocab_size": 300}, r"lm_head\.weight has the shape \[512, 96\], and \[300, 96\] by the configuration"),
        ({"num_hidden_layers": 5}, r"`num_hidden_layers` \(5\) must be equal to the number of `layer_types` \(2\)"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"intermediate_size": -1}, "negative dimension -1"),
        ({"hidden_size": "x"}, "'hidden_size' expected int"),
        ({"index_heads": "x"}, "index_heads must be of type int, got 'x'"),
        ({"index_heads": 4.0}, "index_heads must be of type int, got 4.0"),
        ({"index_share": 1.5}, "index_share must be of type int, got 1.5"),
        ({"index_window": None}, "index_window must be of type int, got None"),
        ({"index_sinks": True}, "index_sinks must be of type int, got True"),
        ({"num_experts": "x"}, "num_experts must be of type int, got 'x'"),
        ({"q_lora_rank": "x"}, "q_lora_rank must be of type int, got 'x'"),
        ({"routed_scaling_factor": "x"}, "routed_scaling_factor must be of type float, got 'x'"),
        ({"qk_norm": 0}, "qk_norm must be of type bool, got 0"),
        ({"family": ["qwen2"]}, r"family must be of type str, got \['qwen2'\]"),
        ({"attention": ["dsa"]}, r"attention must be of type str, got \['dsa'\]"),
    ],
)
def test_a_configuration_of_another_model(damaged, change, said):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load_model(damaged)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "foo"}, "hidden_act='foo' is not known"),
        ({"pad_token_id": 9999}, "pad_token_id=9999 is no token: vocab_size is 512"),
        ({"dtype": "x"}, "no attribute 'x'"),
    ],
)
def test_values_that_no_model_has(qwen_folder, dsa_folder, tmp_path, plain, change, said):
    config = json.loads(((qwen_folder if plain else dsa_folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_options_that_do_not_fit_the_weights_are_named(dsa_folder):
    with pytest.raises(UserError, match=r"config.json with the options that were given \(index_heads=8\): .*indexer"):
        load_model(dsa_folder, index_heads=8)


def test_the_source_of_a_hub_model_is_its_revision(qwen_folder, snapshot):
    shutil.copytree(qwen_folder, snapshot)
    assert model_source("someone/small") == {"path": "someone/small", "sha256": snapshot.name}
    assert model_source(str(qwen_folder)) == {"path": str(qwen_folder), "sha256": checkpoint_hash(qwen_folder)}


def test_indexer_is_new_for_a_plain_checkpoint_and_kept_for_ours(qwen_folder, dsa_folder):
    torch.manual_seed(5)
    first = load_model(qwen_folder).model.layers[0].self_attn.indexer.weights_proj.weight
    second = load_model(qwen_folder).model.layers[0].self_attn.indexer.weights_proj.weight
    assert not torch.equal(first, second)
    assert first.std() > 0
    kept = [load_model(dsa_folder).model.layers[0].self_attn.indexer.k_proj.weight for _ in range(2)]
    assert torch.equal(*kept)


@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (9, 64), (3, 32), (3, 48)])
def test_a_new_indexer_starts_from_the_heads_of_the_attention(qwen_folder, heads, dim):
    """7 query heads and 1 KV head of size 64; every second of its rotations is one of an indexer of size 32."""
    model = load_model(qwen_folder, index_heads=heads, index_dim=dim).model
    attention = model.layers[1].self_attn
    q, k = (proj.weight.unflatten(0, (-1, 64)) for proj in (attention.q_proj, attention.k_proj))
    index_q = attention.indexer.q_proj.weight.unflatten(0, (heads, dim))
    rows = torch.arange(0, 64, 64 // dim)
    copied = torch.equal(attention.indexer.k_proj.weight, k[0, rows])
    assert copied == (dim != 48)
    if copied:
        torch.testing.assert_close(model.index_rotary.inv_freq, model.rotary.inv_freq[rows[: dim // 2]])
        for mine, theirs in {2: [(0, 0), (1, 6)], 9: [(h, h) for h in range(7)], 3: [(0, 0), (1, 3), (2, 6)]}[heads]:
            assert torch.equal(index_q[mine], q[theirs, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_indexer_is_the_same_whatever_is_converted(tmp_path, dtype):
    """The export leaves the weights as they are stored, the torch engine does not."""
    shape = {"hidden_size": 48, "head_dim": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}
    Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **shape)).save_pretrained(tmp_path)
    found = []
    for kept in (parameter_names, lambda _: ()):
        torch.manual_seed(0)
        model = load_model(tmp_path, dtype=dtype, index_heads=3, index_dim=32, kept=kept)
        found.append([p for name, p in model.named_parameters() if INDEXER in name])
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("attention", ["dense", "nsa"])
def test_our_checkpoint_with_another_attention_leaves_its_indexer(dsa_folder, attention):
    model = load_model(dsa_folder, attention=attention)
    assert model.config.attention == attention
    assert not any(".indexer." in name for name in model.state_dict())


def test_options_that_cannot_work_name_the_option(qwen_folder):
    with pytest.raises(UserError, match="index_topk"):
        load_model(qwen_folder, index_topk=-3)


@pytest.mark.parametrize(
    "text", ["null", '{"model_type": ["qwen2"]}', '{"model_type": "qwen2", "vocab_size": []}', "[1]"]
)
def test_a_configuration_that_is_no_object_of_one(dsa_folder, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="no readable model in"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", "[1]"), ("tokenizer.json", '{"model": {"vocab": 5}}'), ("tokenizer_config.json", "[]")],
)
def test_a_tokenizer_that_is_none(qwen_folder, tmp_path, file, text):
    shutil.copytree(qwen_folder, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "model")


def test_no_tokenizer(tmp_path, qwen_folder):
    shutil.copy(qwen_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_path_beside_outputs_of_ours_is_no_hub_name(tmp_path, monkeypatch):
    """Nobody waits for the hub to hear of a typing error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/onnx").mkdir(parents=True)
    write_manifest(tmp_path / "out/onnx", "onnx", {})
    monkeypatch.setattr(
        "dsa_export.model.checkpoint.AutoConfig.from_pretrained", lambda _: pytest.fail("asked the hub")
    )
    with pytest.raises(UserError, match="no such folder: out/nothing"):
        load_config("out/nothing")


def test_a_folder_of_another_kind(tmp_path):
    write_manifest(tmp_path, "onnx", {})
    with pytest.raises(UserError, match="holds 'onnx', not a checkpoint"):
        load_config(str(tmp_path))
