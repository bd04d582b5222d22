"""Dense and sparse language models, and their export to ONNX.

Importing this package registers the model with transformers: AutoModelForCausalLM.from_pretrained("ckpt/") then works.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM, DSAModel

AutoConfig.register(DSAConfig.model_type, DSAConfig)
AutoModel.register(DSAConfig, DSAModel)
AutoModelForCausalLM.register(DSAConfig, DSAForCausalLM)

__all__ = ["DSAConfig", "DSAForCausalLM"]
