"""torch: the project's own model from the checkpoint. On a GPU decoding is one CUDA graph with the project's kernels.

The engine folder holds what the export was made from: config, weights (hard links) and tokenizer. The step is the one
that was exported (`StepGraph`), so both backends compute the same function. Built with --compile, decoding goes through
torch.compile, which fuses the small operators around attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsa_export.cli import UserError, first_line, is_out_of_memory
from dsa_export.files import checkpoint_hash, link_or_copy, weight_files
from dsa_export.model import load_model
from dsa_export.model.checkpoint import DTYPES
from dsa_export.model.step import StepGraph
from dsa_export.topk import compact_topk
from engines.artifacts import Engine, Export, content_hash
from engines.device import DeviceCaches, DeviceRunner
from engines.memory import OutOfMemory
from engines.session import check_room

CHECKPOINT_FILES = ("config.json", "generation_config.json", "*.index.json")  # and the weights
WARM_UP_CALLS = 3  # before a capture: kernels are compiled and library workspaces allocated


@dataclass
class Capture:
    """A recorded decode call: replaying reads and writes these tensors."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor]
    logits: Tensor


class TorchRunner(DeviceRunner):
    """Runs an engine folder of backend `torch` on the first GPU, or on the CPU where there is none."""

    def __init__(self, engine: Engine, *, threads: int | None = None):
        super().__init__(engine)
        self.compiles = bool(engine.manifest.get("compiled"))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if threads and self.device.type == "cpu":
            torch.set_num_threads(threads)
        # All graphs work in the same memory: one is replayed at a time, and what it gives is copied before the next.
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        torch.manual_seed(0)  # as in the export: a random indexer becomes the same one
        model = load_model(
            engine.folder,
            attention="dense" if engine.variant == "dense" else None,
            dtype=DTYPES[engine.dtype],
            index_topk=compact_topk(engine.topk),
            **engine.model_options,
        )
        try:
            self.step = StepGraph(model.requires_grad_(False).to(self.device)).eval()
            self.decode_step = torch.compile(self.step, fullgraph=True) if self.compiles else self.step
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU has no memory for the weights of {engine.folder}") from None

    def run(
        self, caches: DeviceCaches, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> np.ndarray:
        check_room(caches, input_ids, past_lengths)
        inputs = [torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in (input_ids, past_lengths, input_lengths)]
        try:
            with torch.inference_mode():
                if self.device.type == "cuda" and input_ids.shape[1] == 1:
                    logits = self._replay(caches, inputs)
                else:
                    logits = self._call(caches, [tensor.to(self.device) for tensor in inputs])
            return logits[:, 0].cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the GPU's memory is full: {first_line(error)}") from None
        except torch._dynamo.exc.TorchDynamoException as error:  # whatever torch.compile cannot do, at the first calls
            raise UserError(
                f"torch.compile failed for {self.engine.folder}: {first_line(error)}; it needs a C++ compiler "
                "(g++ on the PATH, or CXX; on a GPU gcc, or CC): mend that, or build the engine without --compile"
            ) from None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"no memory for a call of {self.engine.folder}: fewer or shorter rows need less"
            ) from None

    def _call(self, caches: DeviceCaches, inputs: list[Tensor]) -> Tensor:
        if self.engine.dense_while_short:
            self.step.model.select_where(caches.capacity > max(k, self.engine.dense_slots) for k in self.engine.topk)
        decodes = inputs[0].shape[1] == 1
        if decodes and self.compiles:  # one compilation for all batches and capacities, and one for a single row
            for tensor in inputs:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for tensor in caches.tensors.values():
                torch._dynamo.maybe_mark_dynamic(tensor, (0, 2))
        step = self.decode_step if decodes else self.step
        logits, *_ = step(*inputs, list(caches.tensors.values()))  # outside an export the caches are updated in place
        return logits

    def _replay(self, caches: DeviceCaches, inputs: list[Tensor]) -> Tensor:
        """The decode call as a CUDA graph, recorded at the first call on these caches.

        Warming up writes the same tokens to the same slots again and again, which changes nothing.
        """
        if caches.capture is None:
            static = [tensor.to(self.device) for tensor in inputs]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_CALLS):
                    self._call(caches, static)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                logits = self._call(caches, static)
            caches.capture = Capture(graph, (static[0], static[1], static[2]), logits)
        for static_input, tensor in zip(caches.capture.inputs, inputs, strict=True):
            static_input.copy_(tensor)
        caches.capture.graph.replay()
        return caches.capture.logits


def link_checkpoint(export: Export, folder: Path) -> list[str]:
    """Puts the checkpoint that an export was made from into an engine folder; returns the names of its files.

    Raises UserError if it is not a local folder, if it changed since the export, or if its type cannot be run.
    """
    source = Path(export.manifest["source"]["path"])
    precision = export.manifest["precision"]
    if precision not in DTYPES:
        raise UserError(
            f"backend torch computes in {', '.join(DTYPES)}, not with {precision} weights: use --backend ort"
        )
    if not source.is_dir():
        raise UserError(f"backend torch needs the checkpoint of {export.folder}, and {source} is no folder here")
    if checkpoint_hash(source, content_hash) != export.manifest["source"]["sha256"]:
        raise UserError(f"{source} has changed since it was exported: run `python -m dsa_export.onnx` again")
    files = [path for pattern in CHECKPOINT_FILES for path in sorted(source.glob(pattern))] + weight_files(source)
    for path in files:
        link_or_copy(path, folder / path.name)
    return [path.name for path in files]
