"""A device that computes on the CPU and refuses tensors of the CPU, as a GPU does.

`start()` adds it to torch for the rest of the process: what makes a tensor on the wrong device fails, and so does what
waits for the device where it must not (`no_waiting`, as in the recording of a CUDA graph). Needs no GPU.

Tensors are wrappers around the CPU's (torch's Python backend for PrivateUse1, which is experimental in torch).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
TAKES_INDICES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
"""Operators whose indices may lie on the CPU."""

waiting_is_an_error = False


class PretendTensor(Tensor):
    """`inner` is the CPU's tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    def __init__(self, inner: Tensor):
        pass

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> PretendTensor:
        return PretendTensor(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    # Those that torch has not for wrappers.
    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"cannot convert a tensor of {self.device} to numpy: call cpu() first")

    def storage(self) -> Any:
        return self.inner.storage()


class Factories(TorchDispatchMode):
    """Catches what makes a tensor of no other tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    if ours:
        refuse_mixtures(function, args, tensors)
    if "device" in kwargs and kwargs["device"] is not None:
        here = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | ({"device": torch.device("cpu"), "pin_memory": False} if here else {})
    else:
        here = isinstance(args[0], PretendTensor) if function in COPIES | TAKES_INDICES else bool(ours)
    crosses = function in COPIES and not (here and len(ours) == len(tensors))
    if waiting_is_an_error and ours and (crosses or function is aten._local_scalar_dense.default):
        raise RuntimeError(f"{function} waits for the device")
    wrappers = {id(tensor.inner): tensor for tensor in ours}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, PretendTensor) else x, (args, kwargs))

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or not here or x.is_meta:
            return x
        return wrappers[id(x)] if id(x) in wrappers else PretendTensor(x)

    result = tree_map(wrap, function(*inner_args, **inner_kwargs))
    return return_and_correct_aliasing(function, args, kwargs, result) if ours and function not in COPIES else result


def refuse_mixtures(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises RuntimeError where a GPU would: only numbers, indices and what is copied may lie on the CPU."""
    allowed = tree_leaves(args[1]) if function in TAKES_INDICES and isinstance(args[0], PretendTensor) else []
    for tensor in tensors:
        on_cpu = not isinstance(tensor, PretendTensor) and not tensor.is_meta
        if on_cpu and tensor.dim() and function not in COPIES and not any(tensor is one for one in allowed):
            devices = [(tuple(one.shape), str(one.device)) for one in tensors]
            raise RuntimeError(f"expected all tensors on the same device: {function}, {devices}")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block the CPU must not wait for the device, nor copy between the two."""
    global waiting_is_an_error
    waiting_is_an_error = True
    try:
        yield
    finally:
        waiting_is_an_error = False


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def start() -> torch.device:
    """Adds the device to torch and returns it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    device = torch.device(NAME, 0)
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """torch.tensor() asks no mode where to put what it made."""
        there = device is not None and torch.device(device).type == NAME
        return plain(data, **options).to(device) if there else plain(data, device=device, **options)

    _device_constructors()  # remembers torch.tensor, to which it gives the device of a `with`
    torch.tensor = tensor
    Factories().__enter__()
    return device
