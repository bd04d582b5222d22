"""A model whose weights lie in memory as its checkpoint stores them, and are converted where and while they are used.

Of a checkpoint in bf16, mapped from its file, no more than a layer is ever in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, nn

from dsa_export.model import DSAForCausalLM, dense_twin
from dsa_export.model.checkpoint import empty_model


@dataclass(frozen=True)
class StoredModel:
    """Parameters of any floating types, and the type that the model computes in.

    quantised: what quantisation made of parameters [N, K], by their names; shared with the dense twin.
    """

    model: DSAForCausalLM
    dtype: torch.dtype
    quantised: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def dense(self) -> StoredModel:
        """The dense twin, of the same weights."""
        return replace(self, model=dense_twin(self.model))

    @cached_property
    def names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def value(self, name: str) -> Tensor:
        """A parameter's value in `dtype`, quantised if it is."""
        value = self.quantised[name]() if name in self.quantised else self.model.get_parameter(name).detach()
        return value.to(self.dtype)

    def tensor(self, name: str) -> ir.LazyTensor:
        """The same for a graph; computed each time that it is read."""
        return ir.LazyTensor(
            lambda: TorchTensor(self.value(name), name),
            dtype=from_torch_dtype(self.dtype),
            shape=ir.Shape(self.model.get_parameter(name).shape),
            name=name,
        )

    def outline(self) -> DSAForCausalLM:
        """The model with one number in the place of each weight: for tracing."""
        outline = empty_model(self.model.config)
        numbers = {
            name: nn.Parameter(torch.zeros((), dtype=self.dtype).expand(parameter.shape), requires_grad=False)
            for name, parameter in outline.named_parameters()
        }
        for name, tensor in {**numbers, **dict(self.model.named_buffers())}.items():
            module, _, attribute = name.rpartition(".")
            setattr(outline.get_submodule(module), attribute, tensor)
        outline.tie_weights()
        return outline

    @contextmanager
    def converted(self, module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Within the block a part of the model has its values, in `dtype` (None: the model's)."""
        stored = [(parameter, parameter.data) for parameter in module.parameters()]
        try:
            for parameter, _ in stored:
                parameter.data = self.value(self.names[parameter]).to(dtype or self.dtype)
            yield
        finally:
            for parameter, data in stored:
                parameter.data = data

    @contextmanager
    def computing(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the block the model computes in `dtype`; the weights of a layer are converted only while it runs."""
        running: list[ExitStack] = []

        def enter(module: nn.Module, _: Any) -> None:
            running.append(ExitStack())
            running[-1].enter_context(self.converted(module, dtype))

        def leave(*_: Any) -> None:
            running.pop().close()

        model = self.model
        with ExitStack() as hooks:
            for module in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
                for hook in (
                    module.register_forward_pre_hook(enter),
                    module.register_forward_hook(leave, always_call=True),
                ):
                    hooks.callback(hook.remove)
            yield
