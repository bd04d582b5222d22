"""The operators: each folder holds one, in all its forms (reference, ONNX function body, GPU kernel, plugin shell)."""
