"""int4 by GPTQ: the arithmetic against its obvious form, what it is for, and the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dsa_export.cli import UserError
from dsa_export.files import read_manifest
from dsa_export.model import load_model
from dsa_export.onnx import __main__ as export_main
from dsa_export.onnx import calibrate as module
from dsa_export.onnx.calibrate import best_scales, calibrate, calibration_windows, factors, gptq, moments
from dsa_export.onnx.export import export_graph
from dsa_export.onnx.parity import parity_text
from dsa_export.onnx.quantise import Scheme, dequantise, quantise, untie
from dsa_export.onnx.stored import StoredModel
from tests.conftest import build_tokenizer
from tests.dsa_export.conftest import export_command
from tests.dsa_export.test_nsa import build as build_nsa

FP32 = torch.float32


def case(N: int, K: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and inputs [rows, K] whose features go together and differ in size."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, K, generator=g) @ torch.randn(K, K, generator=g) * torch.rand(K, generator=g).exp()
    return torch.randn(N, K, generator=g), inputs


def obvious(weight: Tensor, moments_: Tensor, block: int) -> Tensor:
    """[N, K] fp64: column by column, the rest corrected by the inverse of what is left of the second moments."""
    left, done = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    curvature = moments_.double() + module.DAMPING * moments_.double().diagonal().mean() * torch.eye(len(moments_))
    for column in range(weight.shape[1]):
        if column % block == 0:
            of_block = slice(column, column + block)
            sizes = curvature.diagonal() + curvature.diagonal().mean()
            scale = best_scales(left[:, of_block].float(), sizes[of_block].float(), FP32).double()
        inverse = torch.linalg.inv(curvature[column:, column:])
        done[:, column] = (left[:, column] / scale).round().clamp(-8, 7) * scale
        error = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return done


@given(
    N=st.integers(1, 9),
    K=st.sampled_from([32, 48, 130, 200]),
    block=st.sampled_from([32, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_rounding_in_pieces_is_the_obvious_rounding(N: int, K: int, block: int, seed: int):
    """But for integers that rounding errors decide: almost all are the same, and the loss is."""
    weight, inputs = case(N, K, 300, seed)
    second = module.second_moments(inputs)
    result = gptq(weight, factors(second), block, FP32)
    assert result.integers.shape == (K, N) and result.scales.shape == (-(-K // block), N)
    assert result.integers.min() >= -8 and result.integers.max() <= 7
    expected, ours = obvious(weight, second, block), dequantise(result.integers, result.scales, block).T.double()
    assert (ours - expected).abs().lt(1e-4).double().mean() > 0.9
    losses = [((inputs.double() @ (w - weight.double()).T) ** 2).sum() for w in (ours, expected)]
    assert losses[0] == pytest.approx(float(losses[1]), rel=0.2)


def test_it_loses_less_than_rounding_to_the_nearest():
    weight, inputs = case(64, 192, 1000, 0)
    result = gptq(weight, factors(module.second_moments(inputs)), 32, FP32)
    nearest = torch.cat([rounded_to_nearest(block) for block in weight.split(32, 1)], 1)
    ours = dequantise(result.integers, result.scales, 32).T
    assert (inputs @ (ours - weight).T).square().sum() < 0.6 * (inputs @ (nearest - weight).T).square().sum()


def rounded_to_nearest(block: Tensor) -> Tensor:
    scale = block.gather(1, block.abs().argmax(1, keepdim=True)) / -8
    return (block / scale).round().clamp(-8, 7) * scale


def test_inputs_that_are_always_zero_and_weights_of_zeros():
    weight, inputs = case(8, 64, 100, 1)
    inputs[:, 5:9] = 0
    weight[3] = 0
    result = gptq(weight, factors(module.second_moments(inputs)), 32, FP32)
    assert torch.isfinite(result.scales).all() and not result.integers[:, 3].any()
    nothing = gptq(weight, factors(torch.zeros(64, 64)), 32, FP32)
    assert torch.isfinite(nothing.scales).all()


def test_no_weight_is_clipped_that_large_inputs_meet():
    """Such inputs are few and decide much: scales by the weights' own error cost a real model twice as much."""
    block = torch.full((1, 32), 0.9)
    block[0, 5] = 8.0
    even, uneven = torch.ones(32), torch.ones(32).index_fill(0, torch.tensor([5]), 1000.0)
    assert best_scales(block, uneven, FP32).item() == -1
    assert best_scales(block, even, FP32).item() > -1


def test_scales_are_values_of_the_exported_type():
    weight, inputs = case(8, 64, 100, 2)
    scales = gptq(weight, factors(module.second_moments(inputs)), 32, torch.bfloat16).scales
    assert torch.equal(scales, scales.bfloat16().float())


def test_who_is_given_the_same_tensor_shares_its_moments():
    a, b, c, unused = (nn.Linear(8, 3) for _ in range(4))
    first, second = torch.randn(2, 5, 8), torch.randn(4, 8)
    with torch.no_grad(), moments([a, b, c, unused]) as measured:
        for _ in range(2):
            a(first), b(first), c(second)
    assert measured[a] is measured[b] and unused not in measured
    torch.testing.assert_close(measured[a], 2 * torch.einsum("bti,btj->ij", first, first))
    torch.testing.assert_close(measured[c], 2 * second.T @ second)
    a(second)
    torch.testing.assert_close(measured[a], 2 * torch.einsum("bti,btj->ij", first, first))


@torch.no_grad()
def test_a_calibrated_model_follows_the_original_better(dsa_folder: Path):
    """On other text of the same kind; the torch model then is what the graph's integers stand for."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (9, 64), generator=g)
    original = load_model(dsa_folder).eval()
    expected = original(ids[8:]).logits
    scheme, errors = Scheme("int4", 32, lm_head=True, indexer=True), {}
    for name in ("nearest", "calibrated"):
        model = load_model(dsa_folder).requires_grad_(False).eval()
        untie(model)
        whole = StoredModel(model, FP32)
        rounded = calibrate(whole, ids[:8], scheme) if name == "calibrated" else {}
        assert not model.training
        graph = export_graph(whole)
        quantise([graph], whole, scheme, rounded)
        with whole.computing(FP32):
            errors[name] = float((model(ids[8:]).logits - expected).square().mean())
        for weight, result in rounded.items():
            stored = graph.graph.initializers[weight].const_value.numpy().astype(np.int8)
            np.testing.assert_array_equal(stored, result.integers.numpy())
            values = dequantise(result.integers, result.scales, 32)
            assert torch.equal(whole.value(weight), values.T)
    assert len(rounded) == 2 * 7 + 1 and not any("indexer" in name for name in rounded)
    assert errors["calibrated"] < 0.8 * errors["nearest"]


@torch.no_grad()
def test_every_weight_is_rounded_on_what_the_rounded_layers_before_it_give(dsa_folder: Path):
    """The second layer's and the output projection's, from a model whose first layers are rounded already."""
    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    scheme = Scheme("int4", 32, lm_head=True, indexer=True)
    model = load_model(dsa_folder).requires_grad_(False)
    untie(model)
    original = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rounded = calibrate(StoredModel(model, FP32), ids, scheme)
    assert all(torch.equal(parameter, original[name]) for name, parameter in model.named_parameters())
    inputs: dict[str, Tensor] = {}
    watched = {
        "model.layers.1.self_attn.q_proj": model.model.layers[1].self_attn.q_proj,
        "model.layers.1.mlp.gate_proj": model.model.layers[1].mlp.gate_proj,
        "lm_head": model.lm_head,
    }
    for name, part in watched.items():
        part.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    parameters = dict(model.named_parameters())
    for name, result in rounded.items():  # before the second layer was rounded, and all of it when the head was
        if name.startswith("model.layers.0."):
            parameters[name].copy_(dequantise(result.integers, result.scales, 32).T)
    model.train()(ids, use_cache=False)
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"):
        expected = gptq(original[f"{name}.weight"], factors(module.second_moments(inputs[name])), 32, FP32)
        assert (rounded[f"{name}.weight"].integers == expected.integers).float().mean() > 0.98
    for name, result in rounded.items():
        parameters[name].copy_(dequantise(result.integers, result.scales, 32).T)
    model(ids, use_cache=False)
    expected = gptq(original["lm_head.weight"], factors(module.second_moments(inputs["lm_head"])), 32, FP32)
    assert (rounded["lm_head.weight"].integers == expected.integers).float().mean() > 0.98


def test_weights_too_small_for_the_type_and_inputs_that_are_not_finite(dsa_folder: Path):
    weight, inputs = case(4, 64, 100, 3)
    weight[1, :32] = 1e-9
    weight[1, 3] = 0
    result = gptq(weight, factors(module.second_moments(inputs)), 32, torch.float16)
    assert torch.isfinite(result.scales).all() and not result.integers[:32, 1].any()
    model = load_model(dsa_folder).requires_grad_(False)
    model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    scheme = Scheme("int4", 32, lm_head=True, indexer=True)
    with pytest.raises(UserError, match=r"the inputs of model\.layers\.1\.\S+ are not finite in torch.float32: export"):
        calibrate(StoredModel(model, FP32), torch.randint(3, 250, (1, 16)), scheme)


def test_all_weights_of_native_sparse_attention(tmp_path: Path):
    model = build_nsa(layers=1).requires_grad_(False).eval()
    untie(model)
    scheme = Scheme("int4", 32, lm_head=True, indexer=True)
    rounded = calibrate(StoredModel(model, FP32), torch.randint(3, 250, (2, 64)), scheme)
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert rounded.keys() == linear and len(linear) > 12


def test_windows_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = build_tokenizer()
    path = tmp_path / "text"
    path.write_text("abc " * 200)
    windows = calibration_windows(tokenizer, path, 32)
    tokens = tokenizer("abc " * 200)["input_ids"]
    assert windows.flatten().tolist() == tokens[: windows.numel()] and windows.shape[1] == 32
    library = calibration_windows(tokenizer, None, 4096)
    judge = tokenizer(parity_text())["input_ids"][: module.WINDOW]
    assert judge not in library.tolist(), "what is calibrated on cannot judge"
    assert library.shape == (module.WINDOWS, module.WINDOW) and len({tuple(row) for row in library.tolist()}) == 12
    read = []
    path.write_text("abcd" * (module.LONGEST_TEXT // 2))
    calibration_windows(lambda text, **_: read.append(len(text)) or {"input_ids": list(range(64))}, path, 32)
    assert read == [module.LONGEST_TEXT], "not all of a long text"
    for content, message in ((b"abc", "too short to calibrate with"), (b"h\xe4l", "is not UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            calibration_windows(tokenizer, path, 4096)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--calibrate"], "--calibrate is for --weights int4"),
        (["--calibrate", "--weights", "int8"], "--calibrate is for --weights int4"),
        (["--calibrate", "", "--weights", "int4"], "--calibrate: name a file"),
    ],
)
def test_calibration_is_for_int4(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        export_main.parse_arguments(options)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_command(dsa_folder: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 500)
    out = tmp_path / "onnx"
    command = ["--model", str(dsa_folder), "--out", str(out), "--weights", "int4", "--calibrate"]
    result = export_command(*command, str(text))
    assert (result.returncode, result.stderr) == (0, "")
    manifest = read_manifest(out, "onnx", "")
    assert manifest["quantisation"]["calibration"] | {"sha256": ""} == {"text": str(text), "tokens": 3072, "sha256": ""}
    assert "Calibrated 15 weights on 3,072 tokens; rounded to the nearest: 0" in result.stdout
    nearest = export_command(*command[:2], "--out", str(tmp_path / "nearest"), *command[4:-1])
    assert nearest.returncode == 0, nearest.stderr
    weights = [(folder / "dense" / "model.onnx.data").read_bytes() for folder in (out, tmp_path / "nearest")]
    assert weights[0] != weights[1]
    assert all(manifest["parity"][variant]["passed"] for variant in ("dense", "sparse"))
    result = export_command(*command, str(tmp_path / "missing"))
    assert (
        result.returncode == 1
        and result.stderr.count("\n") == 1
        and "missing cannot be read as text: No such file" in result.stderr
    )
    result = export_command(*command)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_manifest(out, "onnx", "")["quantisation"]["calibration"]["text"] == "standard library"
