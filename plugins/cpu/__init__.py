"""The operators as CPU kernels, and the library that brings them to ONNX Runtime as operators of domain `dsa.cpu`."""

from plugins.cpu.library import DOMAIN, LIBRARY, OPERATORS, build, fast_here

__all__ = ["DOMAIN", "LIBRARY", "OPERATORS", "build", "fast_here"]
