"""NVIDIA's ONNX parser on the exported node: with the library loaded the plugin, without it the function body."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.conftest import ROOT

pytest.importorskip("tensorrt_rtx", reason="the parser is TensorRT-RTX's")


def parse(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.plugins.parse_with_rtx", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("operator", "options"),
    [("IndexTopK", []), ("IndexTopK", ["fp8", "sinks=4", "window=8", "pool=4"]), ("SparseAttention", [])],
)
def test_parser_takes_the_plugin(operator: str, options: list[str], library: Path) -> None:
    log = parse(operator, library, *options).stdout
    assert f"Searching for plugin: {operator}, plugin_version: 1, plugin_namespace: dsa" in log
    assert f"Successfully created plugin: {operator}" in log


@pytest.mark.parametrize("operator", ["IndexTopK", "SparseAttention"])
def test_without_the_library_the_function_body_is_built(operator: str) -> None:
    result = parse(operator)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert f"Found registered local function: {operator}" in result.stdout
    built = re.search(r"ENGINE (\d+) bytes, plugin layers 0", result.stdout)
    assert built and int(built[1]) > 1000, result.stdout[-2000:]
