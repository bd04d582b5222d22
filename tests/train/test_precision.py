"""Where training computes in bf16, and what it holds in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM, load_model
from dsa_export.model.checkpoint import load_config
from tests.train.conftest import INDEXER, SHORT, batch, joint_of, trained, weights
from train import adapters, finetune, precision, warmup
from train.losses import TARGETS


@pytest.mark.parametrize(
    "capabilities, fast",
    [({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), (None, False)],
)
def test_which_cpus_are_fast_in_bf16(
    capabilities: dict[str, bool] | None, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a torch that cannot tell."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.is_fast_in_bf16(torch.device("cpu")) == fast


def test_bf16_computation_keeps_fp32_weights(tiny: Path, records: Path, tmp_path: Path) -> None:
    """All but what bf16 holds exactly, such as norms of ones."""
    warm = trained(tiny, records, tmp_path / "w", "--dtype", "bf16")
    out = joint_of(warm, records, tmp_path / "j", "--dtype", "bf16")
    for folder in (warm, out):
        low = {name: t for name, t in weights(folder).items() if t.dtype != torch.float32}
        assert all(t.dtype == torch.bfloat16 for t in low.values())
        assert not any("proj.weight" in name for name in low)
    assert all(torch.equal(t, weights(warm)[name].float()) for name, t in weights(tiny).items())


@pytest.fixture(scope="module")
def tiny_in_bf16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "tiny"
    shutil.copytree(tiny, folder)
    low = {name: t.to(torch.bfloat16) for name, t in weights(tiny).items()}
    save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_frozen_base_in_bf16_stays_in_bf16(
    tiny_in_bf16: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """In the file, and in memory if computed so, where it changes no bit of what is learned."""
    out = trained(tiny_in_bf16, records, tmp_path / "held", "--dtype", dtype)
    before, after = weights(tiny_in_bf16), weights(out)
    for name, tensor in after.items():
        if name in before:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name
        elif "proj" in name:
            assert tensor.dtype == torch.float32, name
    assert load_config(out).dtype == torch.float32
    monkeypatch.setattr(warmup, "load_frozen", lambda name, dtype, **options: load_model(name, **options))
    plain = weights(trained(tiny_in_bf16, records, tmp_path / "plain", "--dtype", dtype))
    assert all(torch.equal(after[name], plain[name]) for name in after)


@pytest.mark.parametrize("attention", ["dsa", "mla-dsa"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_held_in_bf16_changes_no_bit(attention: str, target: str) -> None:
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qkv_bias": False}
    kind = {"num_key_value_heads": 1, **latent} if attention == "mla-dsa" else {"num_key_value_heads": 2}
    config = DSAConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        attention=attention, **kind, **INDEXER,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DSAForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if "o_proj" not in name:  # which stays in fp32 then
            parameter.data = parameter.bfloat16().float()
    parameters = warmup.indexer_parameters(model)["indexer"]
    found = []
    for _ in range(2):
        with precision.autocast(torch.device("cpu"), torch.bfloat16):
            terms = warmup.warmup_terms(model, batch(), 8, kl_target=target)
        found.append([terms["kl"], *torch.autograd.grad(terms["kl"], parameters)])
        precision.hold_matrices(model, torch.bfloat16)
    kinds = {p.dtype for name, p in model.named_parameters() if "proj.weight" in name and ".indexer." not in name}
    assert kinds == {torch.float32, torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_held_in_bf16(tiny: Path, tiny_in_bf16: Path) -> None:
    def held(model: nn.Module, **options: bool) -> set[str]:
        precision.hold_matrices(model, torch.bfloat16, **options)
        return {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}

    matrices = {name for name, _ in load_model(tiny).named_parameters() if "layers" in name and "norm" not in name}
    base = {name for name in matrices if ".indexer." not in name}
    assert {
        name for name in held(load_model(tiny, **INDEXER)) if "bias" not in name
    } == set()  # it would lose something
    assert held(load_model(tiny, **INDEXER), rounded=True) == base
    assert held(load_model(tiny_in_bf16, **INDEXER)) == base


def test_a_base_of_a_bf16_file_is_never_in_fp32(tiny_in_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would not fit where it does once it is held."""
    loaded: dict[str, torch.dtype] = {}

    def look(model: nn.Module, *_: Any, **__: Any) -> None:
        loaded.update({name: parameter.dtype for name, parameter in model.named_parameters()})

    monkeypatch.setattr(precision, "hold_matrices", look)
    model = precision.load_frozen(str(tiny_in_bf16), torch.bfloat16, **INDEXER)
    matrices = set(precision.matrices(model, torch.bfloat16))
    assert {name for name, dtype in loaded.items() if dtype == torch.bfloat16} == matrices > set()
    precision.load_frozen(str(tiny_in_bf16), torch.float32, **INDEXER)
    assert set(loaded.values()) == {torch.float32}


@pytest.mark.parametrize("stage", ["joint", "finetune"])
def test_adapters_learn_in_fp32_beside_a_base_that_is_held(
    tiny_in_bf16: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """And are merged in fp32: a change that bf16 would round away arrives."""
    types: dict[str, set[torch.dtype]] = {"adapters": set(), "matrices": set(), "others": set()}
    merge = adapters.merge_adapters

    def look(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            held = "adapters" if adapters.ADAPTER in name else "matrices" if ".base_layer." in name else "others"
            types[held].add(parameter.dtype)
        merge(model)

    monkeypatch.setattr(adapters, "merge_adapters", look)
    settings = ("--lora-rank", "2", "--lr", "1e-3", "--dtype", "bf16")
    if stage == "joint":
        start = trained(tiny_in_bf16, records, tmp_path / "warm", "--dtype", "bf16")
        out = joint_of(start, records, tmp_path / "out", *settings)
    else:
        start, out = tiny_in_bf16, tmp_path / "out"
        where = ("--model", str(start), "--data", str(records), "--out", str(out))
        finetune.main([*where, "--attention", "nsa", *SHORT, *settings])
    fp32 = {torch.float32}
    assert types == {"adapters": fp32, "matrices": {torch.bfloat16}, "others": fp32}
    before, after = weights(start), weights(out)
    for name, tensor in before.items():
        if "_proj.weight" in name and ".indexer." not in name:
            change = after[name].float() - tensor.float()
            assert after[name].dtype == torch.float32 and torch.linalg.matrix_rank(change, atol=1e-6) == 2, name
            assert (change != 0).float().mean() > 0 and change.abs().max() < tensor.abs().max() / 2**9, name


def test_what_an_adapter_adds_to_the_output_is_not_rounded(tiny_in_bf16: Path) -> None:
    """By the norms of what values add to it the indexer learns where to look."""
    maps = []
    for load in (load_model, lambda name, **options: precision.load_frozen(name, torch.bfloat16, **options)):
        model = load(str(tiny_in_bf16), **INDEXER)
        adapters.add_adapters(model, 2)
        g = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if adapters.ADAPTER in name:
                parameter.data.normal_(std=0.01, generator=g)
        maps.append(model.model.layers[0].self_attn.value_maps())
    assert maps[1].dtype == torch.float32
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=1e-7)
