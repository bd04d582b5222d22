"""Export to ONNX: `python -m dsa_export.onnx --model ckpt/`."""
