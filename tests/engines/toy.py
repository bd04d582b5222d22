"""A toy model with the real operators: what `python -m dsa_export.onnx` writes, at a size that tests can afford.

Two decoder layers (no feed-forward) with random weights, a dense and a sparse graph that share one weight file, and a
byte-level tokenizer. Shapes: B batch, S query tokens, C cache capacity, E hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from dsa_export.files import sha256, write_manifest
from dsa_export.topk import topk_per_layer
from plugins import cpu
from plugins.registry import DOMAIN, ONNX_OPSET, PLUGIN_ATTRIBUTES, function_protos

E, LAYERS, HQ, HKV, D, HI, DI, V, MAX_POSITIONS = 32, 2, 4, 2, 16, 2, 8, 257, 4096
END_OF_TEXT = 256
# Built for ONNX Runtime, each with an operator of its own: ours where it is fast.
DENSE_CORES = {
    "Attention": "dense",
    **({"DenseAttention": "dense-kernels"} if cpu.fast_here() else {}),
    "GroupQueryAttention": "dense-gqa",
}
DTYPES = {"fp32": ("float32", TensorProto.FLOAT), "fp16": ("float16", TensorProto.FLOAT16)}
DTYPES["bf16"] = ("bfloat16", TensorProto.BFLOAT16)
CACHE_SHAPES = {
    "key": ["batch", HKV, "capacity", D],
    "value": ["batch", HKV, "capacity", D],
    "index": ["batch", 1, "capacity", DI],
}
CACHES = {"dense": ("key", "value"), "sparse": ("key", "value", "index")}


def write_export(out: Path, *, topk: int | list[int] = 16, dtype: str = "fp32", seed: int = 0) -> Path:
    """Writes an export folder by the contract of dsa_export.onnx and returns it."""
    weights = _weights(np.random.default_rng(seed))
    name, onnx_type = DTYPES[dtype]
    numpy_type = np.dtype(getattr(ml_dtypes, name, None) or name)
    graphs = {}
    data = out / "dense" / "model.onnx.data"
    for variant in CACHES:
        folder = out / variant
        folder.mkdir(parents=True)
        initializers, content = _external(weights, numpy_type, onnx_type)
        if variant == "dense":
            initializers = [tensor for tensor in initializers if not is_index_weight(tensor.name)]
        if variant == "dense":
            data.write_bytes(content)
        else:
            os.link(data, folder / data.name)
        path = folder / "model.onnx"
        path.write_bytes(_model(variant, initializers, onnx_type, topk).SerializeToString())
        graphs[variant] = {
            "path": f"{variant}/model.onnx",
            "sha256": sha256(path),
            "cache": [{"name": cache, "shape": CACHE_SHAPES[cache], "dtype": name} for cache in CACHES[variant]],
        }
    write_tokenizer(out)
    model = {"hidden_size": E, "layers": LAYERS, "query_heads": HQ, "kv_heads": HKV, "head_dim": D}
    model |= {"index_heads": HI, "index_dim": DI}
    write_manifest(
        out,
        "onnx",
        {"path": "toy", "sha256": "0" * 64},
        random_indexer=False,
        dtype=dtype,
        precision=dtype,
        topk=topk,
        model={**model, "vocab_size": V, "max_position_embeddings": MAX_POSITIONS, "eos_token_id": [END_OF_TEXT]},
        graphs=graphs,
        weights={"file": data.name, "bytes": data.stat().st_size, "sha256": sha256(data)},
        parity={},
    )
    return out


def is_index_weight(name: str) -> bool:
    """Whether only the indexer reads the weight: the dense graph does not hold it."""
    return name.partition(".")[2].startswith("i") or name.endswith(f"_{DI}")


def _weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) * rows**-0.5

    weights = {"embed": rng.standard_normal((V, E)), "lm_head": matrix(E, V) * 3}
    for size in {D, DI}:
        angles = np.arange(MAX_POSITIONS)[:, None] / 10_000 ** (np.arange(size // 2) / (size // 2))
        weights |= {f"cos_{size}": np.cos(angles), f"sin_{size}": np.sin(angles)}
    for i in range(LAYERS):
        columns = {"q": HQ * D, "k": HKV * D, "v": HKV * D, "iq": HI * DI, "ik": DI, "iw": HI}
        weights |= {f"{i}.{name}": matrix(E, n) * 2 for name, n in columns.items()}
        weights |= {f"{i}.o": matrix(HQ * D, E), f"{i}.norm": np.ones(E), f"{i}.ik_scale": np.ones(DI)}
    return weights


def _external(weights: dict[str, np.ndarray], numpy_type: np.dtype, onnx_type: int) -> tuple[list[TensorProto], bytes]:
    initializers, content = [], b""
    for name, value in weights.items():
        data = value.astype(numpy_type).tobytes()
        tensor = TensorProto(name=name, data_type=onnx_type, dims=value.shape, data_location=TensorProto.EXTERNAL)
        for key, entry in (("location", "model.onnx.data"), ("offset", len(content)), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(entry))
        initializers.append(tensor)
        content += data + bytes(-len(data) % 64)
    return initializers, content


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, out: str | None = None, domain: str = "", **attributes: object) -> str:
        out = out or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], domain=domain, **attributes))
        return out

    def ints(self, *values: int) -> str:
        return self("Constant", value_ints=values)


def _model(variant: str, initializers: list[TensorProto], dtype: int, topk: int | list[int]) -> onnx.ModelProto:
    g = _Graph()
    hidden = g("Gather", "embed", "input_ids")
    last_axis, axis_1 = g.ints(-1), g.ints(1)
    S_1 = g("Shape", "input_ids", start=1, end=2)
    steps = g("Range", g("Constant", value_int=0), g("Squeeze", S_1), g("Constant", value_int=1))
    positions = g("Add", g("Unsqueeze", "past_lengths", last_axis), steps)  # [B, S]
    # Padded positions at the end of the table are clipped; their results are not used.
    positions = g("Min", positions, g("Constant", value_int=MAX_POSITIONS - 1))
    kv_lengths = g("Add", "past_lengths", S_1)

    def heads(x: str, n: int) -> str:
        return g("Transpose", g("Reshape", x, g.ints(0, 0, n, -1)), perm=[0, 2, 1, 3])

    def rotate(x: str, size: int) -> str:
        return g("RotaryEmbedding", x, f"cos_{size}", f"sin_{size}", positions)

    def scatter(i: int, name: str, new: str) -> str:
        past, present = f"past_key_values.{i}.{name}", f"present.{i}.{name}"
        return g("TensorScatter", past, new, "past_lengths", out=present, axis=2, mode="linear")

    for i in range(LAYERS):
        h = g("RMSNormalization", hidden, f"{i}.norm", axis=-1)
        q = rotate(heads(g("MatMul", h, f"{i}.q"), HQ), D)
        key = scatter(i, "key", rotate(heads(g("MatMul", h, f"{i}.k"), HKV), D))
        value = scatter(i, "value", heads(g("MatMul", h, f"{i}.v"), HKV))
        if variant == "dense":
            attended = g("Attention", q, key, value, "", "", "", kv_lengths, is_causal=1, scale=D**-0.5)
        else:
            index_q = g("Transpose", rotate(heads(g("MatMul", h, f"{i}.iq"), HI), DI), perm=[0, 2, 1, 3])
            index_k = g("LayerNormalization", g("MatMul", h, f"{i}.ik"), f"{i}.ik_scale")
            index = scatter(i, "index", rotate(g("Unsqueeze", index_k, axis_1), DI))
            index = g("Squeeze", index, axis_1)
            w = g("MatMul", h, f"{i}.iw")
            dsa = {"domain": DOMAIN, **PLUGIN_ATTRIBUTES}
            indices = g("IndexTopK", index_q, w, index, kv_lengths, k=topk_per_layer(topk, LAYERS)[i], **dsa)
            attended = g("SparseAttention", q, key, value, indices, scale=D**-0.5, **dsa)
        by_token = g("Reshape", g("Transpose", attended, perm=[0, 2, 1, 3]), g.ints(0, 0, -1))
        hidden = g("Add", hidden, g("MatMul", by_token, f"{i}.o"))

    last = g("Unsqueeze", g("Sub", "input_lengths", g("Constant", value_int=1)), last_axis)
    row = g("GatherND", hidden, last, batch_dims=1)
    logits = g("MatMul", g("Unsqueeze", row, axis_1), "lm_head")
    g("Cast", logits, out="logits", to=TensorProto.FLOAT)

    int64 = TensorProto.INT64
    inputs = [helper.make_tensor_value_info("input_ids", int64, ["batch", "sequence"])]
    inputs += [helper.make_tensor_value_info(name, int64, ["batch"]) for name in ("past_lengths", "input_lengths")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, V])]
    for i in range(LAYERS):
        for name in CACHES[variant]:
            shape = CACHE_SHAPES[name]
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{name}", dtype, shape))
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{name}", dtype, shape))
    graph = helper.make_graph(g.nodes, f"toy_{variant}", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = function_protos() if variant == "sparse" else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11, producer_name="toy")


def write_tokenizer(out: Path) -> None:
    """One token per byte; a chat template that names the roles and refuses those that it does not know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"<|endoftext|>": END_OF_TEXT}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


CHAT_TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role not in ("system", "user", "assistant") %}{{ raise_exception("unknown role " + m.role) }}{% endif -%}
{{ m.role }}: {{ m.content }}
{% endfor -%}
{% if add_generation_prompt %}assistant: {% endif %}"""
