"""TensorRT (with this project's plugins) and TensorRT-RTX: one runner over what their Python APIs have in common.

Device memory is torch's. The capacity is the build's; one buffer is bound to past and present of every cache, which is
what the cache update layer asks for (its output aliases its input). The manifest says which profile of which plan
decodes and which pre-fills.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_export.cli import UserError
from engines.artifacts import Engine, rebuild_command
from engines.device import DeviceCaches, DeviceRunner
from engines.nvidia import load_plugins

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
DECODE, PREFILL = "decode", "prefill"


class TensorRTRunner(DeviceRunner):
    """Runs an engine folder of backend `tensorrt` or `tensorrt-rtx` on the first GPU."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        check_gpu(engine, self._compute_capability())
        self.trt = importlib.import_module(MODULES[engine.backend])
        plugin = engine.manifest["plugin"]
        if plugin and (library := Path(plugin["path"])).is_file():  # else the plan carries it, see check_machine()
            load_plugins(self.trt.get_plugin_registry(), library)
        self._logger = _logger(self.trt)
        self._runtime = self.trt.Runtime(self._logger)  # kept: the engine needs it as long as it lives
        self._runtime.engine_host_code_allowed = bool(engine.manifest.get("plugins_serialized"))
        self._stream = self._new_stream()
        # One context per profile: none has to switch, and each keeps its addresses and shapes.
        self._plans: dict[str, Any] = {}
        profiles = {profile["name"]: profile for profile in engine.manifest["profiles"]}
        self._contexts = {name: self._context(profiles[name]) for name in (DECODE, PREFILL)}
        self._bound: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {DECODE: {}, PREFILL: {}}

    def allocate(self, batch: int, capacity: int) -> DeviceCaches:
        fixed = self.engine.limits.max_context
        if capacity > fixed:
            raise UserError(f"{self.engine.folder} was built for {fixed} tokens per row, not for {capacity}")
        return super().allocate(batch, fixed)

    def run(
        self, caches: DeviceCaches, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> np.ndarray:
        with self._on_stream():
            inputs, outputs = self.bound(caches, input_ids, past_lengths, input_lengths)
            phase = DECODE if input_ids.shape[1] == 1 else PREFILL
            self._bind(phase, inputs, outputs)
            if not self._contexts[phase].execute_async_v3(self._stream.cuda_stream):
                raise UserError(f"{self.engine.backend} failed in {self.engine.folder}: {self._logger.reason()}")
            return outputs["logits"][:, 0].cpu().numpy()

    def _bind(self, phase: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Tells the context what has changed since its last call: every change makes it prepare its layers anew."""
        context, bound = self._contexts[phase], self._bound[phase]
        for name, tensor in (inputs | outputs).items():
            shape, address = tuple(tensor.shape), tensor.data_ptr()
            if bound.get(name) == (shape, address):
                continue
            bound.pop(name, None)
            if name in inputs and not context.set_input_shape(name, shape):
                raise UserError(self._refusal(f"does not take {name} of shape {list(shape)}"))
            if not context.set_tensor_address(name, address):
                raise UserError(self._refusal(f"cannot bind {name} at {address:#x}"))
            bound[name] = shape, address

    def _context(self, profile: dict[str, Any]) -> Any:
        """A context for one profile of the manifest; both may stand in one plan, or each in its own."""
        path = self.engine.folder / profile["plan"]
        if profile["plan"] not in self._plans:
            self._plans[profile["plan"]] = self._runtime.deserialize_cuda_engine(path.read_bytes())
        plan = self._plans[profile["plan"]]
        if plan is None:
            raise UserError(self._refusal(f"cannot load {path}"))
        context = plan.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile["number"], self._stream.cuda_stream):
            raise UserError(self._refusal(f"has no memory, or no {profile['name']} profile, for a context"))
        return context

    def _refusal(self, what: str) -> str:
        again = rebuild_command(self.engine.folder, self.engine.manifest)
        return f"{self.engine.backend} {self.trt.__version__} {what} ({self._logger.reason()}): run `{again}`"

    def _new_stream(self) -> Any:
        """One of its own: on the default one, says NvInferRuntime.h of enqueueV3, TensorRT synchronises the device."""
        return torch.cuda.Stream()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())  # where caches are filled and copied
        with torch.cuda.stream(self._stream):
            yield

    def _compute_capability(self) -> str | None:
        if not torch.cuda.is_available():
            return None
        major, minor = torch.cuda.get_device_capability()
        return f"{major}.{minor}"


def check_gpu(engine: Engine, found: str | None) -> None:
    """Raises UserError unless the GPU of compute capability `found` (None: no GPU) can run the engine."""
    if found is None:
        raise UserError(
            f"{engine.folder} needs an NVIDIA GPU and a CUDA build of torch, and torch sees no GPU; "
            "engines of --backend ort or torch run on this machine"
        )
    built_for = engine.manifest["compute_capability"]  # none: TensorRT-RTX compiles for the GPU that it finds
    if built_for and found not in built_for:
        again = rebuild_command(engine.folder, engine.manifest)
        raise UserError(
            f"{engine.folder} was built for compute capability {', '.join(built_for)}, this GPU has {found}: "
            f"run `{again}` here"
        )


def _logger(trt: Any) -> Any:
    """A logger that keeps errors, for the one line that a user gets."""

    class Errors(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """The first error since the last time: those that follow are its consequences."""
            first = self.errors[0] if self.errors else "no reason given"
            self.errors.clear()
            return first

    return Errors()
