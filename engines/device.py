"""Caches that are torch's tensors: what the runners share that compute in torch, or on a GPU outside it.

Shapes: B rows, C capacity, S tokens of one call, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_export.cli import is_out_of_memory
from dsa_export.model.cache import fill_randomly
from engines.artifacts import Engine
from engines.memory import OutOfMemory, no_room
from engines.session import check_room


@dataclass
class DeviceCaches:
    batch: int
    capacity: int
    tensors: dict[str, Tensor]  # "{layer}.{name}" -> [B, H, C, D]
    capture: Any = None  # of TorchRunner: the decode call on these tensors


class DeviceRunner:
    """Allocates, copies and binds caches; a backend adds run()."""

    device = torch.device("cuda")

    def __init__(self, engine: Engine):
        self.engine = engine

    def allocate(self, batch: int, capacity: int) -> DeviceCaches:
        try:
            tensors = {
                name: torch.zeros(
                    tensor.concrete(batch, capacity), dtype=getattr(torch, tensor.dtype), device=self.device
                )
                for name, tensor in self.engine.cache_names()
            }
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise no_room(self.engine, batch, capacity) from None
        return DeviceCaches(batch, capacity, tensors)

    def rows(self, caches: DeviceCaches, start: int, stop: int) -> DeviceCaches:
        return DeviceCaches(stop - start, caches.capacity, {n: t[start:stop] for n, t in caches.tensors.items()})

    def copy(self, source: DeviceCaches, target: DeviceCaches, tokens: int, *, release: bool = False) -> None:
        if release:
            source.capture = None
        for name, tensor in target.tensors.items():
            rows = min(tokens, source.tensors[name].shape[2], tensor.shape[2])
            tensor[:, :, :rows] = source.tensors[name][:, :, :rows]
            if release:
                del source.tensors[name]

    def randomise(self, caches: DeviceCaches, seed: int) -> None:
        fill_randomly(caches.tensors.values(), seed)

    def bound(
        self, caches: DeviceCaches, input_ids: np.ndarray, past_lengths: np.ndarray, input_lengths: np.ndarray
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The graph's inputs and outputs on the device: one buffer for past and present, new logits [B, 1, V]."""
        check_room(caches, input_ids, past_lengths)
        step = {"input_ids": input_ids, "past_lengths": past_lengths, "input_lengths": input_lengths}
        try:
            inputs = {n: torch.from_numpy(np.ascontiguousarray(a, np.int64)).to(self.device) for n, a in step.items()}
            logits = torch.empty(caches.batch, 1, self.engine.model.vocab_size, device=self.device)
        except torch.OutOfMemoryError:
            raise OutOfMemory(f"the GPU has no memory for the logits of {caches.batch} rows") from None
        inputs |= {f"past_key_values.{name}": tensor for name, tensor in caches.tensors.items()}
        return inputs, {"logits": logits} | {f"present.{name}": tensor for name, tensor in caches.tensors.items()}
