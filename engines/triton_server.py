"""A model repository for Triton Inference Server from engines that were built.

    DIR/<variant>_<backend>/config.pbtxt
    DIR/<variant>_<backend>/1/model.onnx, model.onnx.data   or   model.plan

The caches are Triton's implicit state: the server keeps them from one request of a sequence to the next, in one buffer
for input and output, zeros at the start. A client sends input_ids, past_lengths and input_lengths with its sequence id
and reads logits. The first dimension is the graph's own batch (max_batch_size 0): a sequence is one row, and requests
of different sequences are never batched, because each has its own caches. Concurrency comes from the instances, one
sequence each. (Triton's user guide: model configuration, implicit state management; the TensorRT backend's README.)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dsa_export.cli import UserError
from dsa_export.files import link_or_copy, output_folder, write_manifest
from engines.artifacts import Engine, Variant
from engines.text import TOKENIZER_FILES

PLATFORMS = {"ort": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16", "uint8": "TYPE_UINT8"}
KIND = "triton-model"
IDLE_SECONDS = 600
"""After so long without a request the server drops a sequence and its caches."""


def check_options(backends: Iterable[str], plans: str) -> None:
    """Raises UserError for what Triton cannot serve."""
    for backend in backends:
        if backend not in PLATFORMS:
            raise UserError(
                f"Triton Inference Server has no backend for {backend}: leave it out, or build --backend tensorrt"
            )
    if plans != "one":
        raise UserError("a model of Triton Inference Server is one plan with both profiles: use --plans one")


def check_types(variant: Variant) -> None:
    """Raises UserError for caches of a type that Triton has no name for."""
    if any(tensor.dtype not in TYPES for tensor in variant.cache):
        raise UserError("Triton Inference Server has no fp8: export without --index-keys fp8")


def model_folder(repository: Path, variant: str, backend: str) -> Path:
    return repository / f"{variant}_{backend}"


def write_model(engine: Engine, repository: Path) -> Path:
    """Writes one model of the repository and returns its folder."""
    target = model_folder(repository, engine.variant, engine.backend)
    with output_folder(target) as folder:
        version = folder / "1"
        version.mkdir()
        for file in sorted(engine.manifest["files"].keys() - set(TOKENIZER_FILES)):
            link_or_copy(engine.folder / file, version / ("model.plan" if file == "engine.plan" else file))
        (folder / "config.pbtxt").write_text(config(engine, target.name, target.resolve() / "1"))
        source = {"path": str(engine.folder.resolve()), "sha256": engine.manifest["source"]["sha256"]}
        write_manifest(folder, KIND, source, backend=engine.backend, variant=engine.variant)
    return target


def config(engine: Engine, name: str, version: Path) -> str:
    """The model's config.pbtxt. version: the folder of its files, from which the server loads a library of kernels."""
    state_type = {cache: TYPES[tensor.dtype] for cache, tensor in engine.cache_names()}
    states = [
        _message(
            "state",
            [
                f'input_name: "past_key_values.{cache}"',
                f'output_name: "present.{cache}"',
                f"data_type: {state_type[cache]}",
                f"dims: {_dims(tensor.concrete(1, engine.limits.max_context))}",
                "use_same_buffer_for_input_output_state: true",
                f"initial_state: {{ data_type: {state_type[cache]} dims: "
                f'{_dims(tensor.concrete(1, engine.limits.max_context))} zero_data: true name: "zeros" }}',
            ],
        )
        for cache, tensor in engine.cache_names()
    ]
    inputs = {"input_ids": (-1, -1), "past_lengths": (-1,), "input_lengths": (-1,)}
    lines = _notes(engine)
    lines += [f'name: "{name}"', f'platform: "{PLATFORMS[engine.backend]}"', "max_batch_size: 0"]
    lines += [_tensor("input", key, "TYPE_INT64", dims) for key, dims in inputs.items()]
    lines.append(_tensor("output", "logits", "TYPE_FP32", (-1, 1, engine.model.vocab_size)))
    idle = f"max_sequence_idle_microseconds: {IDLE_SECONDS * 1_000_000}"
    lines.append(_message("sequence_batching", ["direct { }", idle, *states]))
    kind = "KIND_CPU" if engine.backend == "ort" else "KIND_GPU"
    profiles = [f"profile: [ {', '.join(_quoted(range(len(engine.manifest['profiles']))))} ]"]
    if engine.cpu_library is not None:
        lines.append(_message("model_operations", [f'op_library_filename: "{version / engine.cpu_library.name}"']))
    lines.append(_message("instance_group", ["count: 1", f"kind: {kind}", *(profiles if kind == "KIND_GPU" else [])]))
    return "\n".join(lines) + "\n"


def _notes(engine: Engine) -> list[str]:
    notes = [f"# {engine.variant}, {engine.precision}, at most {engine.limits.max_context} tokens per sequence."]
    if engine.manifest["plugin"]:
        path = engine.manifest["plugin"]["path"]
        notes.append(f'# Start the server with --backend-config=tensorrt,plugins="{path}" (or LD_PRELOAD={path}).')
    return notes


def _tensor(field: str, name: str, data_type: str, dims: Iterable[int]) -> str:
    return _message(field, [f'name: "{name}"', f"data_type: {data_type}", f"dims: {_dims(dims)}"])


def _message(field: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines).replace("\n", "\n  ")
    return f"{field} {{\n  {body}\n}}"


def _dims(dims: Iterable[int]) -> str:
    return f"[ {', '.join(map(str, dims))} ]"


def _quoted(values: Iterable[object]) -> list[str]:
    return [f'"{value}"' for value in values]
