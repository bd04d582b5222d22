"""dsa::RoundKeys and dsa::RoundQueries: index keys and queries in 8 bits; torch forms and ONNX function bodies.

    index_k        [B, S, Di]      fp32 | fp16 | bf16 -> rounded [B, S, Di] and scales [B, S] fp32
    index_q        [B, S, Hi, Di]  the same, with index_weights [B, S, Hi] -> rounded [B, S, Hi, Di] and the weights
                                   [B, S, Hi] in fp32 with the queries' scales in them

ReLU and a positive scale commute: w ReLU(q · k) = w scale ReLU(q / scale · k). How the operators use them: op.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.registry import PLUGIN_ATTRIBUTES

LEAST = 1e-12
"""The least largest entry of a row: a row of zeros has a scale."""
FULL_KEY, ZERO_KEY, FULL_QUERY = 127, 128, 63


def _steps(numbers: str, full: int) -> str:
    """The part of a body that both share: `whole` steps of `scales`, of which a row's largest number has `full`."""
    return f"""
    numbers = Cast <to = 1> ({numbers})
    size = Abs (numbers)
    last = Constant <value_ints = [-1]> ()
    largest = ReduceMax <keepdims = 0> (size, last)
    least = Constant <value_float = {LEAST}> ()
    bounded = Max (largest, least)
    full = Constant <value_float = {full}.0> ()
    scales = Div (bounded, full)
    column = Unsqueeze (scales, last)
    steps = Div (numbers, column)
    whole = Round (steps)
"""


FUNCTION_BODIES = (
    f"""
RoundKeys <plugin_version, plugin_namespace>
    (index_k) => (rounded, scales)
{{
{_steps("index_k", FULL_KEY)}
    zero = Constant <value_float = {ZERO_KEY}.0> ()
    shifted = Add (whole, zero)
    rounded = Cast <to = 2> (shifted)
}}
""",
    f"""
RoundQueries <plugin_version, plugin_namespace>
    (index_q, index_weights) => (rounded, scaled_weights)
{{
{_steps("index_q", FULL_QUERY)}
    rounded = Cast <to = 3> (whole)
    weights = Cast <to = 1> (index_weights)
    scaled_weights = Mul (weights, scales)
}}
""",
)


def round_keys(index_k: Tensor, key_type: str) -> tuple[Tensor, Tensor]:
    """Index keys [B, S, Di] in the 8 bits of a key type, and one fp32 scale per key [B, S].

    fp8: e4m3, the largest entry becomes 448. int8: uint8 with 128 for zero, the largest entry becomes 128 ± 127.
    """
    if key_type == "int8" and torch.onnx.is_in_onnx_export():
        return _symbolic("RoundKeys", [index_k], [torch.uint8, torch.float32], [index_k.shape, index_k.shape[:2]])
    keys = index_k.float()
    largest = torch.finfo(torch.float8_e4m3fn).max if key_type == "fp8" else FULL_KEY
    scales = keys.abs().amax(-1).clamp(min=LEAST) / largest
    keys = keys / scales[..., None]
    return keys.to(torch.float8_e4m3fn) if key_type == "fp8" else (keys.round() + ZERO_KEY).to(torch.uint8), scales


def unrounded_keys(keys: Tensor, scales: Tensor | None) -> Tensor:
    """Stored index keys [B, C, Di] as their type's numbers times the scales [B, C]; without scales as they are."""
    if scales is None:
        return keys
    return (keys.float() - (ZERO_KEY if keys.dtype == torch.uint8 else 0)) * scales[..., None]


def round_queries(index_q: Tensor, index_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Index queries [B, S, Hi, Di] as int8 in -63 .. 63; the weights [B, S, Hi] in fp32 with the scales in them."""
    if torch.onnx.is_in_onnx_export():
        shapes = [index_q.shape, index_weights.shape]
        return _symbolic("RoundQueries", [index_q, index_weights], [torch.int8, torch.float32], shapes)
    queries = index_q.float()
    scales = queries.abs().amax(-1).clamp(min=LEAST) / FULL_QUERY
    return (queries / scales[..., None]).round().to(torch.int8), index_weights.float() * scales


def _symbolic(
    operator: str, inputs: list[Tensor], dtypes: list[torch.dtype], shapes: list[torch.Size]
) -> tuple[Tensor, Tensor]:
    first, second = torch.onnx.ops.symbolic_multi_out(
        f"dsa::{operator}", inputs, dict(PLUGIN_ATTRIBUTES), dtypes=dtypes, shapes=shapes, version=1
    )
    return first, second
