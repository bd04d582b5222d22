"""Dense and sparse language models, and their export to ONNX.

Importing this package registers the model with transformers: AutoModelForCausalLM.from_pretrained("ckpt/") then works.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM

AutoConfig.register(DSAConfig.model_type, DSAConfig)
AutoModelForCausalLM.register(DSAConfig, DSAForCausalLM)

__all__ = ["DSAConfig", "DSAForCausalLM"]
