"""ONNX Runtime's CUDA provider: the same graph with caches in device memory, bound by address.

Not tried on a GPU yet. Operators that the provider lacks run on the CPU, with copies in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsa_export.cli import UserError
from engines.artifacts import GQA, Engine, rebuild_command
from engines.device import DeviceCaches, DeviceRunner
from engines.ort import CUDA_PROVIDER, RUN_ERRORS, check_caches, check_types, load, run_failure

NUMPY_DTYPES = {
    torch.int64: np.int64, torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8,
}  # fmt: skip


class OrtCudaRunner(DeviceRunner):
    """Runs an engine folder of backend `ort` on the first GPU."""

    providers = (CUDA_PROVIDER, "CPUExecutionProvider")

    def __init__(self, engine: Engine, *, threads: int | None = None, profile: Path | None = None):
        super().__init__(engine)
        check_types(engine)
        if engine.attention_operator == GQA:
            raise UserError(f"{engine.folder} was built for CPUs: remove it, its neighbour `dense` runs on GPUs too")
        if engine.cpu_library is not None:
            again = rebuild_command(engine.folder, engine.manifest)
            raise UserError(f"{engine.folder} was built for CPUs, and there is a GPU here: run `{again}`")
        self.session = load(engine.folder / "model.onnx", threads, self.providers, profile)
        loaded = self.session.get_providers()  # without those whose libraries are missing, which it keeps to itself
        if self.providers[0] not in loaded:
            raise UserError(
                f"ONNX Runtime cannot load {CUDA_PROVIDER}: onnxruntime-gpu wants the CUDA and cuDNN that it was built "
                "for (`pip install onnxruntime-gpu[cuda,cudnn]` brings them)"
            )
        check_caches(self.session, engine)

    def run(
        self, caches: DeviceCaches, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> np.ndarray:
        inputs, outputs = self.bound(caches, input_ids, past_lengths, input_lengths)
        binding = self.session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *_place(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *_place(tensor))
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the provider has a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except RUN_ERRORS as error:
            raise run_failure(self.engine, error) from None
        return outputs["logits"][:, 0].cpu().numpy()


def _place(tensor: Tensor) -> tuple[str, int, type, list[int], int]:
    """Device, its number, element type, shape and address, as IOBinding takes them."""
    return (
        tensor.device.type, tensor.device.index or 0, NUMPY_DTYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr(),
    )  # fmt: skip
