"""Mixture of experts: equal to GLM4-MoE's block, the same in both forms, balanced by its loss, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from dsa_export.config import DSAConfig
from dsa_export.files import read_manifest
from dsa_export.model import DSAForCausalLM, dense_twin, load_model
from dsa_export.model.feed_forward import MixtureOfExperts
from dsa_export.onnx.calibrate import calibrate
from dsa_export.onnx.quantise import Scheme
from dsa_export.onnx.stored import StoredModel
from engines.build.folder import step_weights
from tests.conftest import VOCABULARY, build_tokenizer
from tests.dsa_export.conftest import Graph, export_command

EXACT = {"atol": 1e-5, "rtol": 1e-5}
MOE = {
    "feed_forward": "moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "routed_scaling_factor": 1.8,
}  # fmt: skip
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "head_dim": 16, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "index_heads": 2, "index_dim": 16, "index_topk": 8, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    model = DSAForCausalLM(DSAConfig(**SHAPE, **MOE))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(5) * 0.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def glm_block(config: DSAConfig, ours: MixtureOfExperts) -> Glm4MoeMoE:
    """transformers' block with our weights."""
    glm = Glm4MoeConfig(
        hidden_size=config.hidden_size, moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
        n_shared_experts=config.n_shared_experts, routed_scaling_factor=config.routed_scaling_factor,
    )  # fmt: skip
    block = Glm4MoeMoE(glm)
    state = dict(ours.state_dict())
    N, size = config.num_experts, config.moe_intermediate_size
    state["experts.gate_up_proj"] = state.pop("experts.gate_up_proj.weight").unflatten(0, (N, 2 * size))
    state["experts.down_proj"] = state.pop("experts.down_proj.weight").unflatten(1, (N, size)).transpose(0, 1)
    block.load_state_dict(state, strict=True)
    return block


@pytest.mark.parametrize("training", [False, True], ids=["all experts", "chosen experts"])
@pytest.mark.parametrize("chosen", [2, 5])
def test_equals_glm4_moe_on_the_same_weights(training, chosen):
    torch.manual_seed(1)
    config = DSAConfig(**SHAPE, **MOE | {"num_experts_per_tok": chosen})
    ours = MixtureOfExperts(config).train(training)
    ours.gate.e_score_correction_bias.copy_(torch.randn(5))
    glm = glm_block(config, ours)
    hidden = torch.randn(3, 40, 32)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0])[0], glm(inputs[1])]
    torch.testing.assert_close(*outputs, **EXACT)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.gate.weight.grad, glm.gate.weight.grad, atol=1e-3, rtol=1e-4)
    ours_gradient = ours.experts.gate_up_proj.weight.grad.unflatten(0, (5, 48))
    torch.testing.assert_close(ours_gradient, glm.experts.gate_up_proj.grad, atol=1e-3, rtol=1e-4)


def test_the_correction_bias_decides_the_choice_and_not_the_weights():
    torch.manual_seed(2)
    block = MixtureOfExperts(DSAConfig(**SHAPE, **MOE)).eval()
    hidden = torch.randn(1, 20, 32)
    block.gate.e_score_correction_bias[3] = 10.0
    scores, weights = block.gate(hidden)
    assert (weights[..., 3] > 0).all() and ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((1, 20), 1.8))
    kept = (weights > 0) * scores
    torch.testing.assert_close(weights, 1.8 * kept / kept.sum(-1, keepdim=True))


def test_balance_loss_counts_valid_tokens_of_each_row_and_is_least_when_balanced():
    torch.manual_seed(3)
    block = MixtureOfExperts(DSAConfig(**SHAPE, **MOE)).train()
    hidden = torch.randn(2, 30, 32)
    lengths = torch.tensor([30, 11])
    rows = []
    for row, length in zip(hidden, lengths, strict=True):
        scores, weights = block.gate(row[None, :length])
        chosen = (weights[0] > 0).float().mean(0) * 5 / 2
        share = (scores[0] / scores[0].sum(-1, keepdim=True)).mean(0)
        rows.append((chosen * share).sum())
    balance = block(hidden, lengths)[1]["balance"]
    torch.testing.assert_close(balance, 0.01 * torch.stack(rows).mean())
    with torch.no_grad():
        block.gate.weight.zero_()  # all scores alike
        assert block(hidden, lengths)[1]["balance"].item() == pytest.approx(0.01, rel=1e-5)
        lengths[1] = 0
        assert block(hidden, lengths)[1]["balance"].item() == pytest.approx(0.01 / 2, rel=1e-5), "a row of padding"
        block.gate.weight[:2] = 5 * hidden[0, 0]  # the scores of one token: 1 twice, 0.5 three times
        assert block(hidden[:1, :1])[1]["balance"].item() == pytest.approx(0.01 * 2 * (5 / 2) / 3.5, rel=1e-3)
    assert block.eval()(hidden, lengths)[1] == {}


def test_both_forms_compute_in_bf16(moe_folder, tokens):
    """As the base of a warm-up is held, whose weights of the chosen experts are fp32."""
    model = load_model(moe_folder).bfloat16()
    all_experts, chosen = (model.train(training)(tokens, labels=tokens).loss.item() for training in (False, True))
    assert chosen == pytest.approx(all_experts, rel=0.02)


def test_the_router_is_fp32_under_autocast(moe_folder, tokens):
    router = load_model(moe_folder).model.layers[-1].mlp.gate
    hidden = torch.randn(2, 7, router.in_features)
    exact, _ = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = router(hidden)
    assert torch.equal(scores, exact)


def test_the_loss_travels_with_the_observers_and_reaches_the_router(moe_folder, tokens):
    model = load_model(moe_folder).train()
    output = model(tokens, observer=lambda trace: {"seen": trace.q.sum()})
    assert set(output.aux_losses) == {"balance", "seen"}
    output.aux_losses["balance"].backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


@torch.no_grad()
def test_no_later_token_leaks_and_padding_changes_nothing(moe_folder, tokens):
    for training in (False, True):
        model = load_model(moe_folder).train(training)
        before = model(tokens, use_cache=False).logits
        changed = tokens.clone()
        changed[:, 30:] = (changed[:, 30:] + 7) % 500 + 3
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :30], before[:, :30], atol=1e-5, rtol=0)
        mask = torch.ones_like(tokens)
        mask[1, :20] = 0
        padded = model(tokens, attention_mask=mask, use_cache=False).logits[1, 20:]
        torch.testing.assert_close(padded, model(tokens[1:, 20:], use_cache=False).logits[0], **EXACT)


def test_export(moe_folder, tmp_path):
    """The command checks both graphs against torch and proves that they differ in attention alone."""
    out = tmp_path / "onnx"
    result = export_command("--model", str(moe_folder), "--out", str(out))
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(out, "onnx", "test")
    for variant in ("dense", "sparse"):
        assert manifest["parity"][variant]["passed"]
        assert manifest["parity"][variant]["max_abs_error"] < 1e-3
    assert manifest["parity"]["sparse"]["selected_sets"]["different"] == 0
    text = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    model = load_model(moe_folder)
    # The floors of bench/ count what the graph computes: every expert, not the chosen ones.
    multiplied = sum(p.numel() for n, p in dense_twin(model).named_parameters() if p.dim() == 2 and "embed" not in n)
    counted = step_weights(out / "dense" / "model.onnx").step_weights
    assert multiplied <= counted < multiplied + 2000, "and norms, biases, shapes"
    for variant, twin in {"sparse": model, "dense": dense_twin(model)}.items():
        session = Graph(out / variant / "model.onnx", batch=2)
        session.step([text[0, :25].tolist(), text[1, :9].tolist()])
        logits = session.step([text[0, 25:26].tolist(), text[1, 9:16].tolist()])
        with torch.no_grad():
            expected = [twin(text[row : row + 1, :n], use_cache=False).logits[0, -1] for row, n in ((0, 26), (1, 16))]
        np.testing.assert_allclose(logits, torch.stack(expected).numpy(), atol=1e-3, rtol=0)


def test_experts_are_quantised_and_the_router_is_not(moe_folder):
    scheme = Scheme("int4", 32, lm_head=True, indexer=True)
    bits = {name: scheme.bits(name) for name in load_model(moe_folder).state_dict() if ".mlp." in name}
    experts = {name for name in bits if "experts" in name}
    assert {bits[name] for name in experts} == {4} and {bits[name] for name in bits.keys() - experts} == {None}


def test_experts_are_calibrated(moe_folder):
    model = load_model(moe_folder).requires_grad_(False)
    text = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    scheme = Scheme("int4", 32, lm_head=True, indexer=True)
    rounded = calibrate(StoredModel(model, torch.float32), text, scheme)
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert rounded.keys() == {name for name in linear if scheme.bits(name) == 4} and len(rounded) == 2 * 9 + 1
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_experts", 0),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 6),
        ("moe_intermediate_size", 0),
        ("n_shared_experts", -1),
        ("routed_scaling_factor", 0.0),
        ("router_aux_loss_coef", -0.1),
    ],
)
def test_what_cannot_work_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        DSAConfig(**SHAPE, **{**MOE, option: value})
    DSAConfig(**SHAPE, **{**MOE, option: value, "feed_forward": "gated"})
