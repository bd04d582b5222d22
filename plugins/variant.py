"""One ahead-of-time compiled form of a kernel: what the plugin library launches by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AOT_DTYPES = ("fp16", "bf16")

# Fused multiply-add on every triton version, so that torch and the plugin run the same arithmetic.
COMMON_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: Any  # triton.JITFunction
    pointers: dict[str, str]  # pointer and fp32 arguments: triton types; all other arguments are i32
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def signature(self) -> dict[str, str]:
        """Argument name -> triton type, in the order of the kernel's arguments."""
        constants = self.constants_on(0)
        return {
            name: "constexpr" if name in constants else self.pointers.get(name, "i32") for name in self.kernel.arg_names
        }

    def constants_on(self, arch: int) -> dict[str, Any]:
        """The compile-time arguments; arch: 90 for sm_90."""
        return {**self.constants, "ARCH": arch}
