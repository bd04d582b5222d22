"""One call of a model on caches that are given and returned: what is exported, and what the torch engine runs."""

from __future__ import annotations

from torch import Tensor, nn

from dsa_export.model.cache import LayerCache
from dsa_export.model.decoder import DSAForCausalLM


class StepGraph(nn.Module):
    """`past` holds all layers' cache tensors in the order of their layouts."""

    def __init__(self, model: DSAForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past_lengths: Tensor, input_lengths: Tensor, past: list[Tensor]):
        tensors = iter(past)
        caches = [
            LayerCache({entry.name: next(tensors) for entry in layout}, past_lengths)
            for layout in self.model.model.cache_layouts
        ]
        hidden, _ = self.model.model.run(input_ids, past_lengths, input_lengths, caches)
        last = (input_lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
        logits = self.model.lm_head(hidden.gather(1, last)).float()
        return logits, *(cache.tensors[name] for cache in caches for name in cache.tensors)
