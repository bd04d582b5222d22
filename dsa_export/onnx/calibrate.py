"""int4 by GPTQ (Frantar et al., 2022, arXiv:2210.17323): the columns of a weight are rounded one after the other, and
those that are left make up for what each rounding changed on real inputs.

Layer by layer, on what the layers before it give once they are rounded. Shapes: N output features, K input features,
G = ⌈K / block⌉ blocks of K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsa_export.cli import UserError
from dsa_export.files import read_text, standard_library
from dsa_export.model.attention import DenseAttention
from dsa_export.model.decoder import DSAForCausalLM
from dsa_export.onnx.parity import PARITY_MODULE
from dsa_export.onnx.quantise import BITS, LM_HEAD, Rounded, Scheme, dequantise
from dsa_export.onnx.stored import StoredModel

WINDOW, WINDOWS = 1024, 12
"""Tokens of calibration: more than the widest input of a 0.5B model has features."""
LONGEST_TEXT = 2**20
"""Characters of a file that are read: more than the tokens of all windows have."""
WIDEST = 32768
"""Input features of a weight: its second moments take their square."""
DAMPING = 0.01
"""Added to the second moments, in parts of their mean: features that hardly vary would else take any error."""
COLUMNS = 128
"""Columns that are rounded before the rest of the weight hears of it: one product instead of many."""
ROWS = 8192
"""Output features that are rounded at a time: they do not depend on each other, and an output projection has many."""
SHRINKAGE = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales that are tried, in parts of the one that clips nothing."""


def calibration_windows(tokenizer: Any, path: Path | None, limit: int) -> Tensor:
    """[windows, tokens] int64 of a UTF-8 text, the standard library's sources if there is none.

    limit: tokens per window at most. Raises UserError if the text does not fill a window.
    """
    size = min(WINDOW, limit)
    if path is None:
        texts: Iterator[str] = (
            p.read_text(encoding="utf-8", errors="replace")
            for p in standard_library("[a-z]*.py")[::3]
            if p.name != PARITY_MODULE  # on which the result is judged
        )
    else:
        texts = iter([read_text(path, LONGEST_TEXT)])
    windows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = (tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size))
        windows += itertools.islice(whole, 1 if path is None else WINDOWS)  # of many modules the beginning of each
        if len(windows) == WINDOWS:
            break
    if not windows:
        raise UserError(f"{path} is too short to calibrate with: it has fewer than {size} tokens")
    return torch.tensor(windows)


@torch.no_grad()
def calibrate(
    stored: StoredModel, windows: Tensor, scheme: Scheme, on_layer: Callable[[], None] = lambda: None
) -> dict[str, Rounded]:
    """Rounds the weights that the scheme wants in int4, by their names.

    windows: [windows, tokens] int64. on_layer is called after every layer and the output projection. Weights that are
    not an nn.Linear's, see none of the tokens, or have more than WIDEST input features are left out. Raises UserError
    if inputs are not finite.
    """
    model = stored.model
    was_training = model.training
    model.eval()  # all experts in two products: in training mode no tensor passes through their linear layers
    for module in model.modules():
        if isinstance(module, DenseAttention):  # selection in its masked form: the same, and faster for whole windows
            module.train()
    names = {module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rounded: dict[str, Rounded] = {}

    def round_weights(measured: dict[nn.Linear, Tensor]) -> None:
        shared: dict[int, Factors] = {}
        for module, sums in measured.items():
            weight, name = module.weight, names[module]
            if not sums.isfinite().all():
                raise UserError(f"the inputs of {name} are not finite in {weight.dtype}: export with --dtype fp32")
            if id(sums) not in shared:
                shared[id(sums)] = factors(sums)
            result = gptq(weight.float(), shared[id(sums)], scheme.block_size, weight.dtype)
            rounded[name] = result
            weight.data = dequantise(result.integers, result.scales, scheme.block_size).T.to(weight.dtype)
        on_layer()

    with stored.converted(model.model.embed_tokens):
        states = first_inputs(model, windows)
    for layer in model.model.layers:
        linear = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features <= WIDEST]
        chosen = [module for module in linear if scheme.bits(names[module]) == BITS["int4"]]
        with stored.converted(layer):
            with moments(chosen) as measured:
                for state in states:
                    layer(*state)
            round_weights(measured)
            states = [(layer(hidden, call)[0], call) for hidden, call in states]
    if scheme.bits(LM_HEAD) == BITS["int4"]:
        with stored.converted(model.model.norm), stored.converted(model.lm_head):
            total = second_moments(model.model.norm(states[0][0]))
            for hidden, _ in states[1:]:
                total += second_moments(model.model.norm(hidden))
            round_weights({model.lm_head: total})
    model.train(was_training)
    return rounded


def first_inputs(model: DSAForCausalLM, windows: Tensor) -> list[tuple[Tensor, Any]]:
    """What the first layer is called with, window by window."""

    class Enough(Exception):
        pass

    found: list[tuple[Tensor, Any]] = []

    def stop(_: nn.Module, arguments: tuple[Tensor, Any]) -> None:
        found.append(arguments)
        raise Enough

    hook = model.model.layers[0].register_forward_pre_hook(stop)
    try:
        for window in windows:
            with suppress(Enough):
                model.model(window[None])
    finally:
        hook.remove()
    return found


def second_moments(inputs: Tensor) -> Tensor:
    """[K, K] fp32: xᵀx over all rows of inputs [..., K]."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows.T @ rows


@contextmanager
def moments(linear: Sequence[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """Sums the second moments of what each of these is given meanwhile. Who is given the same tensor shares the sum."""
    sums: dict[nn.Linear, Tensor] = {}
    followed: dict[nn.Linear, nn.Linear] = {}
    latest: list[tuple[Tensor, nn.Linear]] = []

    def add(module: nn.Linear, arguments: tuple[Tensor]) -> None:
        inputs = arguments[0]
        if latest and latest[0][0] is inputs:
            followed[module] = latest[0][1]
            return
        latest[:] = [(inputs, module)]
        if inputs.numel():
            sums[module] = sums.get(module, 0) + second_moments(inputs)

    hooks = [module.register_forward_pre_hook(add) for module in linear]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        latest.clear()
        sums.update({module: sums[first] for module, first in followed.items() if first in sums})


class Factors(NamedTuple):
    """What gptq() needs of the inputs, of which some weights share theirs: it is most of the work for wide ones."""

    rest: Tensor
    """[K, K] fp32; row i: what an error of column i has to change in the columns after it."""
    sizes: Tensor
    """[K] of the inputs, squared: see best_scales()."""


def factors(second_moments: Tensor) -> Factors:
    """second_moments [K, K] of the inputs of a weight."""
    curvature = second_moments.to(torch.float64, copy=True)
    diagonal = curvature.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # all inputs were zero
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
    rest = torch.linalg.cholesky(inverse, upper=True).float()
    return Factors(rest, (diagonal + diagonal.mean()).float())  # the mean: other texts have other small inputs


def gptq(weight: Tensor, inputs: Factors, block_size: int, dtype: torch.dtype) -> Rounded:
    """weight [N, K] fp32 and factors() of its inputs → integers and scales, which are values of `dtype`.

    Minimises Σ (x wᵀ − x ŵᵀ)² greedily: column by column, left to right.
    """
    parts = [_round_rows(rows.clone(), inputs, block_size, dtype) for rows in weight.split(ROWS)]
    integers, scales = (torch.cat(tensors).T.contiguous() for tensors in zip(*parts, strict=True))
    return Rounded(integers, scales)


def _round_rows(weight: Tensor, inputs: Factors, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [N, K], which is used up → integers [N, K] int8, scales [N, G]."""
    N, K = weight.shape
    rest, sizes = inputs
    integers = torch.empty(N, K, dtype=torch.int8)
    scales = torch.empty(N, -(-K // block_size))
    for start in range(0, K, COLUMNS):
        stop = min(start + COLUMNS, K)
        errors = torch.empty(N, stop - start)
        for column in range(start, stop):
            block, offset = divmod(column, block_size)
            if offset == 0:
                of_block = slice(column, column + block_size)
                scales[:, block] = best_scales(weight[:, of_block], sizes[of_block], dtype)
            exact, scale = weight[:, column], scales[:, block]
            integer = (exact / scale).round().clamp(-8, 7)
            integers[:, column] = integer
            error = (exact - integer * scale) / rest[column, column]
            weight[:, column:stop] -= error[:, None] * rest[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ rest[start:stop, stop:]
    return integers, scales


def best_scales(blocks: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [N, block], sizes [block] of their inputs, squared → scales [N]: -8 times it is the value of largest size,
    or less where clipping costs the output less. (By the weights' own error, weights of few large inputs were clipped.)
    """
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    tried = torch.stack([(largest * part / -8).to(dtype).float() for part in SHRINKAGE])
    tried[tried == 0] = 1  # all are zero, or too small for the type
    errors = (((blocks / tried).round().clamp(-8, 7) * tried - blocks).square() @ sizes)[..., None]
    return tried.gather(0, errors.argmin(0, keepdim=True))[0, :, 0]
