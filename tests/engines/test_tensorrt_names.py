"""What engines/ uses of TensorRT's Python API exists there, in the real bindings.

Of the libraries, which PyPI does not have, they get the functions that they import, and no more.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.conftest import ROOT, compile_cpp

FUNCTIONS = """
#define FUNCTION(name) extern "C" void* name() { return nullptr; }
FUNCTION(createInferBuilder_INTERNAL) FUNCTION(createInferRefitter_INTERNAL) FUNCTION(createInferRuntime_INTERNAL)
FUNCTION(getPluginRegistry) FUNCTION(getBuilderPluginRegistry) FUNCTION(initLibNvInferPlugins)
FUNCTION(createNvOnnxParser_INTERNAL) FUNCTION(createNvOnnxParserRefitter_INTERNAL) FUNCTION(getNvOnnxParserVersion)
"""
OF_OBJECTS = """
IAttention.decomposable IAttentionInputLayer.attention INetworkDefinition.num_layers INetworkDefinition.get_layer
IBuilderConfig.plugins_to_serialize IPluginRegistry.all_creators IPluginRegistry.load_library
Runtime.deserialize_cuda_engine Runtime.engine_host_code_allowed
ICudaEngine.create_engine_inspector ICudaEngine.create_execution_context
EngineInspector.get_engine_information IExecutionContext.set_optimization_profile_async
IExecutionContext.set_input_shape IExecutionContext.set_tensor_address IExecutionContext.execute_async_v3
"""
CHILD = """
import ctypes, json, operator, sys
libraries, names = json.loads(sys.argv[1])
for library in libraries:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt
for name in names:
    operator.attrgetter(name)(trt)

from engines.nvidia import _monitor
from engines.tensorrt_runner import _logger
errors = _logger(trt)
errors.log(trt.ILogger.ERROR, "first\\nline")
errors.log(trt.ILogger.WARNING, "not an error")
assert errors.reason() == "first line" and errors.reason() == "no reason given"
with _monitor(trt, "build") as monitor:
    monitor.phase_start("outer", None, 2)
    assert isinstance(monitor, trt.IProgressMonitor) and monitor.step_complete("outer", 0)
    monitor.phase_finish("outer")
print(trt.__version__)
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_bindings") is None, reason="needs tensorrt-cu13-bindings")
def test_the_names_exist(tmp_path: Path):
    (tmp_path / "functions.cpp").write_text(FUNCTIONS)
    libraries = []
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        path = tmp_path / f"lib{library}.so.11"  # by this name the loader knows it when the bindings ask for it
        compile_cpp(str(tmp_path / "functions.cpp"), path, "-shared", "-fPIC", f"-Wl,-soname,{path.name}")
        libraries.append(str(path))
    names = set(OF_OBJECTS.split())
    for module in ("nvidia", "tensorrt_runner"):
        names |= set(re.findall(r"\btrt\.([A-Za-z_]\w*(?:\.\w+)*)", (ROOT / "engines" / f"{module}.py").read_text()))
    assert {"Runtime", "IProgressMonitor.__init__", "LayerType.ATTENTION_INPUT"} < names
    names = {name for name in names if not name.startswith("ComputeCapability")}  # of TensorRT-RTX
    arguments = json.dumps([libraries, sorted(names)])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("11.4.")
