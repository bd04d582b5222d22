"""Dense and sparse language models, and their export to ONNX.

`import dsa_export.model` makes the model known to transformers, for AutoModelForCausalLM.from_pretrained("ckpt/"). What
engines of ONNX Runtime need of this package does without it, and without torch.
"""

from dsa_export import interrupt

interrupt.expect()
