"""Command-line options of the selection that need no other weights: they can be set for any trained indexer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dsa_export.topk import TopK, describe_topk

DEFAULTS: dict[str, Any] = {
    "index_sinks": 0,
    "index_window": 0,
    "index_pool": 1,
    "index_share": 1,
    "index_keys": "model",
}
"""Fields of DSAConfig."""

NSA_OPTIONS = {
    "nsa_block_size": "l, tokens of a compressed block",
    "nsa_stride": "d, tokens from one compressed block to the next",
    "nsa_selection_size": "l', tokens of a selected block",
    "nsa_selected_blocks": "n, blocks per query",
    "nsa_window": "w, tokens of the sliding window",
}
"""Fields of DSAConfig for native sparse attention and what they are; manifests always state them: its branches follow
from no k."""

KEY_TYPES = ("model", "fp8", "int8")

INDEX_CACHES = ("index", "index_scale", "pooled")
"""The caches that only the selection reads: keys, their scales, and means of groups of keys."""


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "selection", "What else is selected, and what the indexer costs [the checkpoint's]"
    )
    add = group.add_argument
    add("--index-sinks", type=int, metavar="N", help="always select the first N tokens, counted in k [0]")
    add("--index-window", type=int, metavar="N", help="always select the last N tokens, counted in k [0]")
    add("--index-pool", type=int, metavar="M", help="score means of M keys and select M tokens at a time [1]")
    add("--index-share", type=int, metavar="N", help="N layers in a row follow the first one's selection [1]")
    add(
        "--index-keys",
        choices=KEY_TYPES,
        help="type of the cached index keys: the model's, or 8 bits and a scale: fp8 (torch), int8 (torch and ONNX "
        "Runtime) [model]",
    )


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as fields of DSAConfig."""
    return {name: value for name in DEFAULTS if (value := getattr(args, name)) is not None}


def chosen_options(config: Any) -> dict[str, Any]:
    """The options of a DSAConfig that are not as they are by default: what manifests hold."""
    if config.attention == "nsa":
        return {name: getattr(config, name) for name in NSA_OPTIONS}
    return {name: getattr(config, name) for name, usual in DEFAULTS.items() if getattr(config, name) != usual}


def describe_selection(topk: TopK, options: Mapping[str, Any]) -> str:
    """For people: "512", or "512, pool 4, share 2"."""
    named = (f"{name.removeprefix('index_').replace('_', ' ')} {value}" for name, value in options.items())
    return ", ".join([describe_topk(topk), *named])
