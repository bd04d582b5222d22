"""Parses one operator's node with TensorRT-RTX: parse_with_rtx.py OPERATOR [LIBRARY [fp8] [NAME=VALUE ...]].

Run in a process of its own. `fp8`, NAME=VALUE: IndexTopK with fp8 keys, with these attributes.

With the plugin library its parser takes the plugin, and then aborts the process (it supports no user plugins). Without
the library, the function body is built into an engine, in the form that engines.build gives NVIDIA's products.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tensorrt_rtx as trt
from onnx import TensorProto

from engines.nvidia_graph import take_general_branches
from plugins.load import load_library
from tests.plugins import bodies

SHAPES = {
    "index_q": (1, 2, 4, 64), "index_weights": (1, 2, 4), "index_k": (1, 256, 64), "kv_lengths": (1,),
    "q": (1, 14, 2, 64), "k_cache": (1, 2, 256, 64), "v_cache": (1, 2, 256, 64), "indices": (1, 2, 64),
}  # fmt: skip


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        print(message, flush=True)


def main(operator: str, library: str | None = None, *options: str) -> None:
    log = Log()
    if library:
        load_library(trt.get_plugin_registry(), Path(library))
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    attributes = {"k": 64} if operator == "IndexTopK" else {"scale": 0.125}
    attributes |= {name: int(value) for name, _, value in (o.partition("=") for o in options if o != "fp8")}
    model = bodies.model(operator, TensorProto.FLOAT16, keys="fp8" if "fp8" in options else "model", **attributes)
    take_general_branches(model)
    if not parser.parse(model.SerializeToString()):
        sys.exit("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *[SHAPES[name]] * 3)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    print(f"ENGINE {engine.nbytes if engine else 0} bytes, plugin layers {plugins}")


if __name__ == "__main__":
    main(*sys.argv[1:])
