"""Runs one operator's ONNX function body in ONNX Runtime."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from plugins.registry import DOMAIN, ONNX_OPSET, PLUGIN_ATTRIBUTES, function_protos

KEYS = {np.dtype(np.uint8): "int8", np.dtype(ml_dtypes.float8_e4m3fn): "fp8"}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def model(operator: str, float_type: int, keys: str = "model", **attributes: int | float) -> onnx.ModelProto:
    """One node of `operator`, with its function body appended; every dimension is dynamic.

    keys: type of the index keys; for the CPU kernels "half", "half k", "half v": caches in fp16, both or one of them.
    """
    k_type, v_type = (TensorProto.FLOAT16 if keys in ("half", f"half {one}") else float_type for one in "kv")
    if operator == "IndexTopK":
        inputs = {"index_q": (float_type, "B S Hi Di"), "index_weights": (float_type, "B S Hi"),
                  "index_k": (float_type, "B G Di"), "kv_lengths": (TensorProto.INT64, "B")}  # fmt: skip
        if keys == "int8":
            inputs["index_q"] = (TensorProto.INT8, "B S Hi Di")
        if keys != "model":
            inputs["index_k"] = (TensorProto.FLOAT8E4M3FN if keys == "fp8" else TensorProto.UINT8, "B G Di")
            inputs["index_scale"] = (TensorProto.FLOAT, "B G")
        outputs = [helper.make_tensor_value_info("indices", TensorProto.INT32, ["B", "S", attributes["k"]])]
    elif operator == "BlockTopK":
        inputs = {"importance": (TensorProto.FLOAT, "B H S J"), "kv_lengths": (TensorProto.INT64, "B")}
        outputs = [helper.make_tensor_value_info("indices", TensorProto.INT32, ["B", "H", "S", "N"])]
    elif operator == "RoundKeys":
        inputs = {"index_k": (float_type, "B S Di")}
        outputs = [helper.make_tensor_value_info("rounded", TensorProto.UINT8, ["B", "S", "Di"]),
                   helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["B", "S"])]  # fmt: skip
    elif operator == "RoundQueries":
        inputs = {"index_q": (float_type, "B S Hi Di"), "index_weights": (float_type, "B S Hi")}
        outputs = [helper.make_tensor_value_info("rounded", TensorProto.INT8, ["B", "S", "Hi", "Di"]),
                   helper.make_tensor_value_info("scaled_weights", TensorProto.FLOAT, ["B", "S", "Hi"])]  # fmt: skip
    elif operator == "DenseAttention":  # of the CPU kernels, without a body
        inputs = {"q": (float_type, "B Hq S D"), "k_cache": (k_type, "B Hkv C D"),
                  "v_cache": (v_type, "B Hkv C D"), "kv_lengths": (TensorProto.INT64, "B")}  # fmt: skip
        outputs = [helper.make_tensor_value_info("output", float_type, ["B", "Hq", "S", "D"])]
    else:
        inputs = {"q": (float_type, "B Hq S D"), "k_cache": (k_type, "B Hkv C D"),
                  "v_cache": (v_type, "B Hkv C D"), "indices": (TensorProto.INT32, "B S K")}  # fmt: skip
        outputs = [helper.make_tensor_value_info("output", float_type, ["B", "Hq", "S", "D"])]
    names = [output.name for output in outputs]
    node = helper.make_node(operator, list(inputs), names, domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES)
    infos = [helper.make_tensor_value_info(name, kind, dims.split()) for name, (kind, dims) in inputs.items()]
    return helper.make_model(
        helper.make_graph([node], operator, infos, outputs),
        functions=[]
        if keys.startswith("half")
        else [f for f in function_protos("pool" in attributes, keys) if f.name == operator],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


@cache
def session(operator: str, dtype: str, keys: str, **attributes: int | float) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    serialized = model(operator, TYPES[dtype], keys, **attributes).SerializeToString()
    return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def run(operator: str, arrays: list[np.ndarray], **attributes: int | float) -> np.ndarray:
    """The first output; `arrays`: the inputs in their order; float8 ones as ml_dtypes has them."""
    return run_all(operator, arrays, **attributes)[0]


def run_all(operator: str, arrays: list[np.ndarray], **attributes: int | float) -> list[np.ndarray]:
    keys = KEYS.get(arrays[2].dtype, "model") if operator == "IndexTopK" else "model"
    dtype = arrays[1].dtype if operator == "IndexTopK" else arrays[0].dtype
    runner = session(operator, str(dtype), keys, **attributes)
    names = [i.name for i in runner.get_inputs()]
    feeds = {name: _value(array) for name, array in zip(names, arrays, strict=True)}
    return [value.numpy() for value in runner.run_with_ort_values(None, feeds)]


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TensorProto.FLOAT8E4M3FN)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
