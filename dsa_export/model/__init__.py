"""The model: a decoder with two independent slots (attention, feed-forward), its KV caches and its checkpoints.

Importing this package registers the model with transformers: AutoModelForCausalLM.from_pretrained("ckpt/") then works.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dsa_export.config import DSAConfig
from dsa_export.model.attention import AttentionTrace, Selector
from dsa_export.model.checkpoint import dense_twin, load_model, load_tokenizer
from dsa_export.model.decoder import DSAForCausalLM, DSAModel

AutoConfig.register(DSAConfig.model_type, DSAConfig)
AutoModel.register(DSAConfig, DSAModel)
AutoModelForCausalLM.register(DSAConfig, DSAForCausalLM)

__all__ = ["AttentionTrace", "DSAForCausalLM", "DSAModel", "Selector", "dense_twin", "load_model", "load_tokenizer"]
