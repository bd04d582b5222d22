"""An export of the small checkpoint, made once with the command, and a step function over its graphs."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest

from dsa_export.cli import run
from dsa_export.onnx.__main__ import main
from engines.artifacts import CacheTensor

CAPACITY = 96


@pytest.fixture(scope="session")
def export(dsa_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "onnx"
    result = export_command("--model", str(dsa_folder), "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def export_command(*arguments: str) -> Result:
    """`python -m dsa_export.onnx`, run in this process: importing torch again would take longer than the export."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["onnx", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        run(main)
    return Result(int(end.value.code or 0), out.getvalue(), err.getvalue())


NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class Graph:
    """An exported graph with its own cache, fed with chunks of rows of any length."""

    def __init__(self, path: Path, batch: int):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.cache = {
            value.name: np.zeros(
                CacheTensor(value.name, tuple(value.shape), "").concrete(batch, CAPACITY), NUMPY_TYPES[value.type]
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.lengths = np.zeros(batch, np.int64)

    def step(self, rows: list[list[int]]) -> np.ndarray:
        """Feeds one chunk per row, padded on the right with token 7; returns logits [batch, V]."""
        lengths = np.array([len(row) for row in rows], np.int64)
        input_ids = np.full((len(rows), lengths.max()), 7, np.int64)
        for row, tokens in zip(input_ids, rows, strict=True):
            row[: len(tokens)] = tokens
        feeds = {"input_ids": input_ids, "past_lengths": self.lengths, "input_lengths": lengths, **self.cache}
        names = [output.name for output in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(None, feeds), strict=True))
        self.cache = {name: outputs[name.replace("past_key_values", "present")] for name in self.cache}
        self.lengths = self.lengths + lengths
        return outputs["logits"][:, 0]


@pytest.fixture(params=["dense", "sparse"])
def graph(request, export):
    """A factory of fresh graphs of one variant: graph(batch)."""
    return lambda batch=1: Graph(export / request.param / "model.onnx", batch)
