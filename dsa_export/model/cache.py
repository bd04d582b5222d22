"""The KV cache: its layout, declared once per attention variant, and the two caches that follow it.

One slot per token and row: row b's token at position p stands in slot p, whatever the batch. Rows have their own
lengths; a call writes its S tokens, padding included, at each row's length, and padding is overwritten by what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dsa_export.capacity import cache_rows
from dsa_export.model.standard_ops import write_cache

CAPACITY_STEP = 256
MOST_DOUBLED = 2**20  # slots: what the GPU kernels take


@dataclass(frozen=True)
class CacheEntry:
    """One cached tensor of a layer: [batch, heads, rows, dim]. TensorRT's cache update takes 4-D tensors only.

    stride: tokens per row; row g belongs to the tokens g stride .. (g + 1) stride - 1. dtype: None is the model's.
    recent: the last rows before a call's own that it reads; None is what the variant says of the others.
    """

    name: str
    heads: int
    dim: int
    stride: int = 1
    dtype: torch.dtype | None = None
    recent: int | None = None

    def shape(self, batch: Any, capacity: Any) -> tuple[Any, int, Any, int]:
        """The tensor's shape; batch and capacity (in tokens) may be numbers or the names of dynamic dimensions."""
        return (batch, self.heads, cache_rows(capacity, self.stride), self.dim)

    def zeros(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(self.shape(batch, capacity), dtype=self.dtype or dtype, device=device)


def fill_randomly(tensors: Iterable[Tensor], seed: int) -> None:
    """Fills caches with standard normal numbers, or every byte but 0 where index keys are bytes around 128."""
    for number, tensor in enumerate(tensors):
        generator = torch.Generator(tensor.device).manual_seed(seed + number)
        if tensor.dtype == torch.uint8:
            tensor.random_(1, 256, generator=generator)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device))  # fp8 has no normal_()


class LayerCache:
    """What an attention layer sees of its cache: update() stores this call's rows and returns the cached tensor.

    `used`: the tokens that any row holds after this call. None: not known.
    """

    def __init__(self, tensors: dict[str, Tensor], past_lengths: Tensor, used: int | None = None):
        self.tensors = tensors
        self.past_lengths = past_lengths
        self.used = used

    def update(self, name: str, new: Tensor, stride: int = 1, *, whole: bool = False) -> Tensor:
        """Writes new [B, H, rows, D] from the row of the first token of this call on.

        Returns the rows in use, which are no contiguous tensor, or the `whole` one with the free rows behind them.
        """
        first = self.past_lengths if stride == 1 else self.past_lengths // stride
        self.tensors[name] = write_cache(self.tensors[name], new, first)
        if whole or self.used is None:
            return self.tensors[name]
        return self.tensors[name][:, :, : -(-self.used // stride)]


class DSACache(Cache):
    """The cache of `generate` and of the model's forward: grows by doubling, one length per row.

    `columns` counts the columns of the caller's padded batch (what transformers calls the sequence length); `lengths`
    [B] int64 counts the tokens of each row.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, layouts: Sequence[Sequence[CacheEntry]]):
        self.layouts = layouts
        self.layers: list[dict[str, Tensor]] = []  # type: ignore[assignment]
        self.lengths: Tensor | None = None
        self.columns = 0
        self.capacity = 0

    def begin(self, batch: int, new_tokens: int, dtype: torch.dtype, device: torch.device) -> list[LayerCache]:
        """Makes room for `new_tokens` slots in every row and returns the layers' views."""
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.layers = [{e.name: e.zeros(batch, 0, dtype, device) for e in layout} for layout in self.layouts]
        if batch != len(self.lengths):
            raise ValueError(f"the cache holds {len(self.lengths)} rows, the input {batch}")
        used = int(self.lengths.max()) + new_tokens
        self._reserve(used)
        return [LayerCache(tensors, self.lengths, used) for tensors in self.layers]

    def advance(self, lengths: Tensor, columns: int) -> None:
        """Counts the tokens of a finished call: `lengths` [B] valid ones per row, `columns` of the padded batch."""
        assert self.lengths is not None
        self.lengths = self.lengths + lengths
        self.columns += columns

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        doubled = min(2 * self.capacity, MOST_DOUBLED)
        self.capacity = -(-max(tokens, doubled) // CAPACITY_STEP) * CAPACITY_STEP
        for layout, tensors in zip(self.layouts, self.layers, strict=True):
            for entry in layout:
                old = tensors[entry.name]
                new = old.new_zeros(entry.shape(old.shape[0], self.capacity))
                new[:, :, : old.shape[2]] = old
                tensors[entry.name] = new

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Assisted generation asks for what a crop needs, and every slot is kept anyway."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens of every row, and columns of the batch: a number below 0, or 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes minus the number of tokens to forget, got {tokens_to_remove}")
        if self.lengths is not None:
            self.lengths = (self.lengths + tokens_to_remove).clamp(min=0)
            self.columns = max(self.columns + tokens_to_remove, 0)

    def reset(self) -> None:
        self.layers, self.lengths, self.columns, self.capacity = [], None, 0, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.lengths is None:
            return
        self.lengths = self.lengths[indices]
        self.layers = [{name: t[indices] for name, t in tensors.items()} for tensors in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.lengths is not None:
            self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))
