"""The operators: each folder holds one, in all its forms (reference, ONNX function body, GPU kernel, plugin shell)."""


class UnsupportedOnGPU(ValueError):
    """What an operator takes and its GPU kernels do not; the message names the limit."""
