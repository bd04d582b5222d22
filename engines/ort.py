"""ONNX Runtime on the CPU: a runner with bound buffers.

Input and output of each cache are one buffer: TensorScatter then writes the new rows in place and copies nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from dsa_export.cli import OUT_OF_MEMORY, UserError, first_line, says, usable_cpus
from dsa_export.files import MANIFEST
from engines.artifacts import GQA, Engine, Variant, rebuild_command
from engines.huge_pages import huge_pages
from engines.memory import OutOfMemory, no_room
from engines.session import check_room

# What ONNX Runtime's CPU kernels compute in: bfloat16 has no MatMul there.
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "uint8": np.uint8}
CPU_DTYPES = ("fp32", "fp16")
CUDA_PROVIDER = "CUDAExecutionProvider"

# What a graph that was edited by hand raises; and what memory that ran out does, while loading or in a call.
LOAD_ERRORS = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument, state.NotImplemented)
RUN_ERRORS = (RuntimeError, state.RuntimeException, state.Fail, MemoryError)


def runs_on_gpu() -> bool:
    """Whether ONNX Runtime has its CUDA provider (onnxruntime-gpu) and torch sees a GPU."""
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return False
    import torch

    return torch.cuda.is_available()


@dataclass
class OrtCaches:
    """Caches as NumPy arrays, bound to the graph's inputs and outputs."""

    batch: int
    capacity: int
    arrays: dict[str, np.ndarray]  # "{layer}.{name}" -> [B, H, rows, D]
    values: dict[str, onnxruntime.OrtValue]  # the same memory
    binding: onnxruntime.IOBinding
    logits: np.ndarray  # [B, 1, V] float32


class OrtRunner:
    """Runs an engine folder of backend `ort` on the CPU with `threads` threads (default: all that may be used)."""

    def __init__(self, engine: Engine, *, threads: int | None = None, profile: Path | None = None):
        self.engine = engine
        check_types(engine)
        with huge_pages():
            self.session = load(engine.folder / "model.onnx", threads, profile=profile, library=engine.cpu_library)
        check_caches(self.session, engine)
        # GroupQueryAttention takes several tokens after others for one row only.
        self.row_by_row = engine.attention_operator == GQA

    def allocate(self, batch: int, capacity: int) -> OrtCaches:
        try:
            # Pages of zeros are not touched: they become real memory when tokens are written.
            arrays = {
                name: np.zeros(tensor.concrete(batch, capacity), NUMPY_DTYPES[tensor.dtype])
                for name, tensor in self.engine.cache_names()
            }
        except MemoryError:
            raise no_room(self.engine, batch, capacity) from None
        logits = np.empty((batch, 1, self.engine.model.vocab_size), np.float32)
        return self._bind(batch, capacity, arrays, logits)

    def rows(self, caches: OrtCaches, start: int, stop: int) -> OrtCaches:
        arrays = {name: array[start:stop] for name, array in caches.arrays.items()}
        return self._bind(stop - start, caches.capacity, arrays, caches.logits[start:stop])

    def copy(self, source: OrtCaches, target: OrtCaches, tokens: int, *, release: bool = False) -> None:
        if release:
            source.values.clear()
            source.binding.clear_binding_inputs()
            source.binding.clear_binding_outputs()
        for name, _ in self.engine.cache_names():
            rows = min(tokens, source.arrays[name].shape[2], target.arrays[name].shape[2])
            target.arrays[name][:, :, :rows] = source.arrays[name][:, :, :rows]
            if release:
                del source.arrays[name]

    def _bind(self, batch: int, capacity: int, arrays: dict[str, np.ndarray], logits: np.ndarray) -> OrtCaches:
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        return OrtCaches(batch, capacity, arrays, values, binding, logits)

    def randomise(self, caches: OrtCaches, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for array in caches.arrays.values():
            if array.dtype == np.uint8:
                array[...] = rng.integers(1, 256, array.shape, np.uint8)
            else:
                array[...] = rng.standard_normal(array.shape, np.float32)

    def run(
        self, caches: OrtCaches, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> np.ndarray:
        check_room(caches, input_ids, past_lengths)
        if self.row_by_row and caches.batch > 1 and input_ids.shape[1] > 1:
            for b in range(caches.batch):
                row = slice(b, b + 1)
                one = self.rows(caches, b, b + 1)  # its logits are a row of theirs
                self.run(one, input_ids[row], past_lengths[row], input_lengths[row])
            return caches.logits[:, 0]
        inputs = {"input_ids": input_ids, "past_lengths": past_lengths, "input_lengths": input_lengths}
        for name, array in inputs.items():
            caches.binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        try:
            self.session.run_with_iobinding(caches.binding)
        except RUN_ERRORS as error:  # such as no memory for the workspace
            raise run_failure(self.engine, error) from None
        return caches.logits[:, 0]


def run_failure(engine: Engine, error: Exception) -> UserError:
    """What to tell of an error inside a call."""
    text = str(error)
    if isinstance(error, MemoryError) or says(error, OUT_OF_MEMORY):
        size = re.search(r"requested buffer of size (\d+)", text)
        wanted = f" of {int(size[1]) / 2**20:,.0f} MiB" if size else ""
        return OutOfMemory(
            f"no memory for the workspace{wanted} of a call of {engine.folder}: fewer or shorter rows need less"
        )
    return UserError(f"ONNX Runtime failed in {engine.folder}: {text}")


def check_types(variant: Variant) -> None:
    """Raises UserError for types that ONNX Runtime's kernels do not take."""
    if variant.dtype not in CPU_DTYPES:
        raise UserError(
            f"ONNX Runtime's CPU kernels do not compute in {variant.dtype}: export with --dtype fp32 or fp16, or use "
            "--backend torch"
        )
    if any(tensor.dtype not in NUMPY_DTYPES for tensor in variant.cache):
        raise UserError("ONNX Runtime cannot update fp8 caches: export with --index-keys int8, or use --backend torch")


def check_caches(session: onnxruntime.InferenceSession, engine: Engine) -> None:
    """Raises UserError if the graph's caches are not those that the engine's manifest describes."""
    prefix = "past_key_values."
    graph = {value.name: value.shape for value in session.get_inputs() if value.name.startswith(prefix)}
    if graph != {prefix + name: list(tensor.shape) for name, tensor in engine.cache_names()}:
        again = rebuild_command(engine.folder, engine.manifest)
        raise UserError(f"{engine.folder}: {MANIFEST} describes other caches than the graph has: run `{again}`")


def load(
    path: Path,
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    profile: Path | None = None,
    library: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Loads a graph, for the CPU unless told otherwise; library: of its custom operators.

    Raises UserError if ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cpus()
    # Threads that spin on after a call take the cores from whoever runs next: on two cores, engines timed in turn took
    # up to twice as long. One engine alone is as fast as before.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # its errors are raised too, its warnings say nothing to a user
    if profile is not None:  # from its birth on, or not at all
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library.resolve()))
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except (*LOAD_ERRORS, *RUN_ERRORS) as error:
        full = isinstance(error, MemoryError) or says(error, OUT_OF_MEMORY)
        reason = f"memory is full ({first_line(error)})" if full else error
        raise UserError(f"ONNX Runtime cannot load {path}: {reason}") from None
