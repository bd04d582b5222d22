"""The model: a decoder with two independent slots (attention, feed-forward), its KV caches and its checkpoints."""

from dsa_export.model.attention import AttentionTrace, Selector
from dsa_export.model.checkpoint import dense_twin, load_model, load_tokenizer
from dsa_export.model.decoder import DSAForCausalLM, DSAModel

__all__ = ["AttentionTrace", "DSAForCausalLM", "DSAModel", "Selector", "dense_twin", "load_model", "load_tokenizer"]
