"""Does the exported graph compute what the torch model computes?

ONNX Runtime prefills real text in chunks and then takes the text's next tokens one at a time; torch runs the whole text
in one call without a cache. Logits must agree at every one of these positions, given the same selections; the preferred
token must be torch's; and each query's selected set must be torch's, save where scores tie within rounding. In fp16,
where the scores themselves are rounded, the sets of every layer must be torch's in most of what they could differ in.
In every type a set must be one that could have been selected: visible tokens, each once, as many as in torch.

fp32: error at most 1e-3. fp16: at most twice the error that torch's own fp16 run has against fp32. bf16, which ONNX
Runtime lacks on CPUs: the graph is upcast, so the bf16 weights are checked in fp32 arithmetic, error at most 1e-3.
Quantised weights: the same, in the arithmetic of the unquantised type, against torch with the values that the integers
stand for, rounded to that type. What quantisation costs is measured apart, with the kernels that deployment uses,
against the unquantised model: see `quality`.
"""

from __future__ import annotations

import math
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsa_export.model import AttentionTrace, DSAForCausalLM
from dsa_export.onnx import passes
from dsa_export.onnx.export import MODEL_FILE, WEIGHTS_FILE, cache_names
from dsa_export.onnx.stored import StoredModel
from plugins.registry import ONNX_OPSET

DECODED_TOKENS = 32
CHUNK = 128
TOLERANCE = 1e-3
TIE = {"model": 1e-5, "int8": 1 / 127, "fp8": 1 / 16}
"""By type of the index keys: scores closer than this fraction of the row's largest may be selected either way.

In 8 bits a number just at the edge may round to either side, and then is a step off.
"""

MAX_APART = 0.2
"""In fp16: how much of what could differ between the selections of a layer may (see _apart). Rounding makes a hundredth
differ, another selection most."""

PARITY_MODULE = "argparse.py"


def parity_text() -> str:
    """Real text on every machine: a module of the standard library."""
    return (Path(sysconfig.get_paths()["stdlib"]) / PARITY_MODULE).read_text(encoding="utf-8")


def check_parity(
    stored: StoredModel, graph_folder: Path, text: list[int], scratch: Path, unquantised: Reference | None = None
) -> dict[str, Any]:
    """Runs the check for one variant (model and graph_folder/model.onnx) and returns its figures, "passed" among them.

    text: the last DECODED_TOKENS are fed one at a time. `scratch` is a folder for temporary graphs. unquantised:
    reference() of the model before its weights were quantised. Memory: the torch model as it is stored and one ONNX
    Runtime session, whose weights are mapped; a graph of bf16 or with quantised weights is raised to fp32 in `scratch`
    for it.
    """
    model, rounded = stored.model, stored.dtype == torch.float16
    session = _session(stored, graph_folder, scratch, fuse=False)
    ort_logits, ort_indices = _run_onnx(stored, session, text)
    del session
    with stored.computing(torch.float32):
        ours, sets = _run_torch(model, text, ort_indices)
    expected = ours.logits
    error = float((ort_logits - expected).abs().max())
    tolerance = TOLERANCE
    if rounded:
        with stored.computing(stored.dtype):
            own_error = float((_run_torch(model, text, ort_indices)[0].logits - expected).abs().max())
        tolerance = max(TOLERANCE, 2 * own_error)
    best = expected.topk(2).values
    wrong = (ort_logits.argmax(-1) != expected.argmax(-1)) & (best[:, 0] - best[:, 1] > 2 * tolerance)
    result: dict[str, Any] = {
        "prompt_tokens": len(text) - DECODED_TOKENS,
        "decoded_tokens": DECODED_TOKENS,
        "max_abs_error": error,
        "tolerance": tolerance,
        "greedy_tokens_differ": int(wrong.sum()),
        "passed": error <= tolerance < math.inf,
    }
    if ort_indices:
        result["selected_sets"] = sets
        result["passed"] &= sets["unlawful"] == 0
        result["passed"] &= sets["apart"] <= MAX_APART if rounded else sets["different"] == 0
    if unquantised is not None:
        expected = unquantised.logits
        ort_logits, _ = _run_onnx(stored, _session(stored, graph_folder, scratch, fuse=True), text)
    result["quality"] = {
        **_quality(ort_logits, expected, text),
        "text_tokens": len(text) - 1,
        "text_loss": ours.text_loss,
        "text_reference_loss": (unquantised or ours).text_loss,
    }
    return result


@dataclass(frozen=True)
class Reference:
    """What a torch model makes of a text: logits [DECODED_TOKENS, V] fp32 of its last tokens, loss over all of it."""

    logits: Tensor
    text_loss: float


def reference(stored: StoredModel, text: list[int]) -> Reference:
    with stored.computing(torch.float32):
        return _run_torch(stored.model, text)[0]


def _loss(logits: Tensor, text: list[int]) -> float:
    """Of logits [N, V] that predict the last N tokens of the text."""
    return float(cross_entropy(logits, torch.tensor(text[-len(logits) :])))


def _quality(logits: Tensor, reference: Tensor, text: list[int]) -> dict[str, float]:
    """What the graph as deployed gives away against the unquantised torch model, over the text's last tokens."""
    return {
        "tokens": len(logits),
        "max_abs_error": float((logits - reference).abs().max()),
        "mean_abs_error": float((logits - reference).abs().mean()),
        "greedy_agreement": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        "loss": _loss(logits, text),
        "reference_loss": _loss(reference, text),
    }


def _session(stored: StoredModel, graph_folder: Path, scratch: Path, *, fuse: bool) -> ort.InferenceSession:
    """The graph with its selections as extra outputs (indices.{layer}), bf16 raised to fp32.

    fuse: let ONNX Runtime replace DequantizeLinear and MatMul by its kernel, which rounds the activations too.
    """
    graph = ir.load(graph_folder / MODEL_FILE)
    for layer, node in enumerate(node for node in graph.graph if node.op_type == "IndexTopK"):
        output = node.outputs[0]
        output.name = f"indices.{layer}"
        output.type = ir.TensorType(ir.DataType.INT32)
        output.shape = ir.Shape(["batch", "sequence", node.attributes["k"].as_int()])
        graph.graph.outputs.append(output)
    if stored.model.config.index_keys == "fp8":
        passes.upcast_fp8_caches(graph)
    raised = stored.dtype == torch.bfloat16
    if raised:
        passes.upcast_bf16(graph)
    if not fuse:
        raised |= _dequantise(graph, rounded=raised)
    folder = scratch if raised else graph_folder
    external = WEIGHTS_FILE if raised else None
    folder.mkdir(exist_ok=True)
    path = folder / "parity.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fuse else "1")
    if not fuse:  # then the weights stay in the file, which ONNX Runtime maps, instead of being copied in another order
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False  # it asks for room for all of them at once, though it needs none
    try:
        ir.save(graph, path, external_data=external)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink(missing_ok=True)
        if folder == scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _dequantise(graph: ir.Model, *, rounded: bool) -> bool:
    """Stores quantised weights by their values, as ONNX Runtime computes them; returns whether there were any.

    At loading it would compute them all into memory. rounded: to bf16, for a graph that was raised from it.
    """
    initializers = graph.graph.initializers
    nodes = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    for value in initializers.values() if nodes else ():
        value.const_value = passes.read_tensor(value.const_value)
    for node in nodes:
        (product,) = node.outputs
        integers, factors = node.inputs
        weight, scales = integers.const_value, factors.const_value
        compute = partial(_product, node.attributes, weight, scales, product.name, rounded)
        tensor = ir.LazyTensor(compute, dtype=scales.dtype, shape=ir.Shape(weight.shape), name=product.name)
        values = ir.Value(name=product.name, type=ir.TensorType(scales.dtype), shape=tensor.shape, const_value=tensor)
        ir.convenience.replace_all_uses_with(product, values)
        graph.graph.remove(node, safe=True)
        graph.graph.register_initializer(values)
        del initializers[integers.name], initializers[factors.name]
    return bool(nodes)


def _product(
    attributes: Any, weight: ir.TensorProtocol, scales: ir.TensorProtocol, name: str, rounded: bool
) -> ir.Tensor:
    """What ONNX Runtime's DequantizeLinear makes of a weight."""
    constants = [ir.val(tensor.name, const_value=tensor) for tensor in (weight, scales)]
    node = ir.node("DequantizeLinear", constants, attributes)
    node.outputs[0].type = ir.TensorType(scales.dtype)
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=constants, opset_imports={"": ONNX_OPSET}, name="weight"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (values,) = ort.InferenceSession(proto, providers=["CPUExecutionProvider"]).run(None, {})
    if rounded:
        values = torch.from_numpy(values).bfloat16().float().numpy()
    return ir.tensor(values, name=name)


def _run_onnx(stored: StoredModel, session: ort.InferenceSession, text: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Chunked prefill, then single tokens: logits [DECODED_TOKENS, V], indices [T, K] of every layer."""
    topk = stored.model.config.topk_per_layer
    capacity = -(-max(len(text), *topk) // CHUNK) * CHUNK
    dtype = torch.float16 if stored.dtype == torch.float16 else torch.float32
    binding = session.io_binding()
    for name, entry in cache_names(stored.model):
        raised = torch.float32 if entry.dtype == torch.float8_e4m3fn else entry.dtype
        zeros = torch.zeros(entry.shape(1, capacity), dtype=raised or dtype)
        cache = ort.OrtValue.ortvalue_from_numpy(zeros.numpy())
        binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
        binding.bind_ortvalue_output(f"present.{name}", cache)
    layers = sum(output.name.startswith("indices.") for output in session.get_outputs())
    shaped_by_the_call = ["logits", *(f"indices.{layer}" for layer in range(layers))]

    done, logits = 0, []
    first = min(CHUNK, *topk)  # a call in which everything is selected, and others
    indices: list[list[Tensor]] = [[] for _ in range(layers)]
    prompt = len(text) - DECODED_TOKENS
    while done < len(text) - 1:
        size = (CHUNK if done else first) if done < prompt else 1
        chunk = text[done : min(done + size, max(prompt, done + 1))]
        binding.bind_cpu_input("input_ids", np.array([chunk], np.int64))
        binding.bind_cpu_input("past_lengths", np.array([done], np.int64))
        binding.bind_cpu_input("input_lengths", np.array([len(chunk)], np.int64))
        for name in shaped_by_the_call:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        outputs = dict(zip(shaped_by_the_call, binding.get_outputs()[-len(shaped_by_the_call) :], strict=True))
        done += len(chunk)
        for layer in range(layers):
            indices[layer].append(torch.from_numpy(outputs[f"indices.{layer}"].numpy()[0].copy()))
        if done >= prompt:
            logits.append(torch.from_numpy(outputs["logits"].numpy()[0, 0].astype(np.float32)))
    return torch.stack(logits), [torch.cat(layer) for layer in indices]


@torch.no_grad()
def _run_torch(
    model: DSAForCausalLM, text: list[int], selected: Sequence[Tensor] = ()
) -> tuple[Reference, dict[str, Any]]:
    """One whole call without cache.

    In the training mode's masked form of selection: the same function, which does not gather k rows for every token.

    selected: indices [T, K] of every layer that selects, which attention then follows: a tie that was decided otherwise
    in one layer would change all that comes after it. Also returned: how they compare with the layers' own selections,
    the counts of all layers together, and what is "apart" in the worst one.
    """
    compared: list[dict[str, Any]] = []
    theirs = iter(selected)

    def select(trace: AttentionTrace) -> Tensor:
        indices = next(theirs)
        compared.append(_compare_sets(model.model.layers[trace.layer].self_attn, trace, indices))
        return indices[None]

    was_training = model.training
    output = model.train().model(
        torch.tensor([text[:-1]]), use_cache=False, selector=select if selected else None
    )  # fmt: skip
    model.train(was_training)
    hidden, targets = output.last_hidden_state[0], torch.tensor(text[1:])
    losses = [  # the logits of a whole text would take gigabytes
        cross_entropy(model.lm_head(states).float(), words, reduction="sum")
        for states, words in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    logits = model.lm_head(hidden[-DECODED_TOKENS:]).float()
    sets = {
        name: (max if name == "apart" else sum)(layer[name] for layer in compared)
        for name in (compared[0] if compared else ())
    }
    return Reference(logits, float(sum(losses)) / len(targets)), sets


def _compare_sets(attention: Any, trace: AttentionTrace, theirs: Tensor) -> dict[str, Any]:
    """Query tokens with the same set, with ties decided otherwise, and with truly different sets; theirs [T, K].

    Also: how many of theirs are no selection at all (unlawful: tokens that the query does not see, tokens twice, more
    or fewer of them), whether K covers the text, so that nothing was selected, and how far the sets are apart.
    """
    indices, scores = attention.reselect(trace)
    ours, theirs = indices[0].sort(-1).values, theirs.sort(-1).values
    same = (ours == theirs).all(-1)
    lawful = ((ours >= 0).sum(-1) == (theirs >= 0).sum(-1)) & (theirs[:, -1] <= torch.arange(len(theirs)))
    lawful &= ((theirs.diff(dim=-1) > 0) | (theirs[:, 1:] < 0)).all(-1)
    ties = 0
    for t in (lawful & ~same).nonzero()[:, 0].tolist():
        disputed = scores[0, t, sorted(set(ours[t].tolist()) ^ set(theirs[t].tolist()))]
        ties += float(disputed.max() - disputed.min()) <= TIE[attention.key_type] * float(
            scores[0, t, : t + 1].abs().max()
        )
    identical = int(same.sum())
    return {
        "rows": len(same),
        "identical": identical,
        "ties": ties,
        "different": len(same) - identical - ties,
        "unlawful": int((~lawful).sum()),
        "covered_layers": int(theirs.shape[1] >= len(theirs)),
        "apart": _apart(ours, theirs),
    }


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """How much of what could differ between two selections [T, K] does: 0 to 1.

    Where k is near a token's position even random sets share most keys: so what our sets have and theirs lack is taken
    in parts of the most that it can be, all of a set or as many keys as it leaves out.
    """
    T = len(ours)
    has = torch.zeros(2, T, T + 1, dtype=torch.bool)
    for mask, indices in zip(has, (ours, theirs), strict=True):
        mask.scatter_(1, torch.where((indices < 0) | (indices > T), T, indices).long(), True)
    mine, other = has[..., :T]
    chosen = mine.sum(1)
    most = torch.minimum(chosen, torch.arange(1, T + 1) - chosen).sum()
    return float((mine & ~other).sum() / most.clamp(min=1))
