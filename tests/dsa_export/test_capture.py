"""A decoding step can be recorded as a CUDA graph: no operator of it waits for a number from the GPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM
from dsa_export.model.step import StepGraph
from dsa_export.onnx.export import cache_names
from plugins.block_topk import block_topk
from tests.conftest import VOCABULARY

# Their results have sizes, or are numbers, that only the GPU knows.
aten = torch.ops.aten
WAITING = {aten.nonzero.default, aten._local_scalar_dense.default, aten.masked_select.default, aten.is_nonzero.default}

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 24}
INDEXER = {"index_heads": 2, "index_dim": 16, "index_topk": 8}
NSA = {
    "nsa_block_size": 8, "nsa_stride": 4, "nsa_selection_size": 8, "nsa_selected_blocks": 4, "nsa_window": 10,
}  # fmt: skip
CONFIGS = {
    "dense": {"attention": "dense"},
    "dsa": {"attention": "dsa", **INDEXER},
    "pooled": {"attention": "dsa", **INDEXER, "index_topk": 16, "index_pool": 4, "index_sinks": 1, "index_window": 2},
    "mla-dsa": {"attention": "mla-dsa", "num_key_value_heads": 1, "qkv_bias": False, **LATENT, **INDEXER},
    "nsa": {"attention": "nsa", **NSA},
    "moe": {"attention": "dsa", **INDEXER, "feed_forward": "moe", "num_experts": 4, "num_experts_per_tok": 2},
}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITING, f"{function} waits for the GPU"
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            masks = [t for t in args[1] if t is not None and t.dtype == torch.bool]
            assert not masks, f"{function} by a mask waits for the GPU"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoding_step_waits_for_nothing(name: str) -> None:
    model = DSAForCausalLM(DSAConfig(**{**SHAPE, **CONFIGS[name]})).eval()
    caches = [entry.zeros(2, 64, model.dtype) for _, entry in cache_names(model)]
    step = torch.tensor([[5], [7]]), torch.tensor([40, 9]), torch.tensor([1, 1])
    with torch.inference_mode(), NoWaiting():
        logits, *_ = StepGraph(model)(*step, caches)
    assert logits.shape == (2, 1, VOCABULARY) and logits.isfinite().all()


def test_the_test_sees_what_waits() -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the GPU"):
        torch.ones(3).nonzero()
    with NoWaiting(), pytest.raises(AssertionError, match="by a mask"):
        torch.ones(3)[torch.tensor([True, False, True])]
    with NoWaiting():
        block_topk(torch.rand(1, 2, 1, 6), torch.tensor([90]), 4, 16)
