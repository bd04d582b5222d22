"""python -m dsa_export.onnx: a checkpoint becomes dense and sparse ONNX graphs with one weight file, checked."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from dsa_export.cli import UserError, console, path, progress_bar, run
from dsa_export.config import DSAConfig
from dsa_export.files import check_output, output_folder, sha256, write_manifest
from dsa_export.model import load_model, load_tokenizer
from dsa_export.model.attention import VARIANTS, SparseAttention
from dsa_export.model.cache import CacheEntry
from dsa_export.model.checkpoint import (
    DEFAULT_CHECKPOINT,
    DTYPES,
    check_vocabulary,
    load_config,
    model_source,
    parameter_names,
)
from dsa_export.onnx.calibrate import calibrate, calibration_windows
from dsa_export.onnx.export import MODEL_FILE, WEIGHTS_FILE, dense_from_sparse, export_graph, save_graphs
from dsa_export.onnx.identical import Comparison, SharedWeights, compare_graphs, compare_weights
from dsa_export.onnx.parity import DECODED_TOKENS, Reference, check_parity, parity_text, reference
from dsa_export.onnx.quantise import BITS, BLOCK_SIZES, Scheme, quantise, untie
from dsa_export.onnx.stored import StoredModel
from dsa_export.selection import add_selection_arguments, chosen_options, selection_options
from dsa_export.topk import compact_topk, describe_topk

MAX_PARITY_PROMPT = 2304
STANDARD_LIBRARY = Path("standard library")
"""--calibrate without a file, and what the manifest says then."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsa_export.onnx",
        description="Exports a DSA checkpoint to OUT/dense/model.onnx and OUT/sparse/model.onnx (one weight file, "
        "hard-linked into both folders), checks both against torch, and proves that they differ only in attention.",
    )
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, help="checkpoint folder or hub name (default: %(default)s)"
    )
    parser.add_argument("--out", type=path, default=Path("out/onnx"), help="output folder (default: out/onnx)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="type of weights, activations and caches (default: fp32)"
    )
    parser.add_argument(
        "--weights",
        choices=BITS,
        help="quantise the weights of the linear layers, except the indexer's, in blocks, and store an embedding "
        "of fp32 in fp16 (default: no)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="with --weights: input features that share one scale; fewer: more accurate, larger (default: 32)",
    )
    parser.add_argument(
        "--keep-lm-head", action="store_true", help="with --weights: leave the output projection in --dtype"
    )
    parser.add_argument(
        "--int8-indexer",
        action="store_true",
        help="with --weights: the indexer's projections in int8, which matters for speed at short contexts "
        "(default: they stay in --dtype)",
    )
    parser.add_argument(
        "--calibrate",
        nargs="?",
        type=path,
        const=STANDARD_LIBRARY,
        metavar="FILE",
        help="with --weights int4: choose the integers by GPTQ on a UTF-8 text (without FILE: the standard library's "
        "sources), which loses much less than rounding to the nearest, above all after the joint stage; takes some "
        "minutes for 0.5B (default: round to the nearest)",
    )
    parser.add_argument(
        "--topk",
        type=int,
        metavar="K",
        help="keys selected per token in every layer (default: the checkpoint's own k, which may differ by layer)",
    )
    add_selection_arguments(parser)
    parser.add_argument(
        "--random-indexer",
        action="store_true",
        help="accept a plain checkpoint and give it an untrained indexer: good for timings only, its output "
        "is not the model's (recorded in the manifest)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.weights and (arguments.block_size or arguments.keep_lm_head or arguments.int8_indexer):
        parser.error("--block-size, --keep-lm-head and --int8-indexer say how to quantise: they need --weights")
    if arguments.calibrate == Path():
        parser.error("--calibrate: name a file, or leave the name out")
    if arguments.calibrate and arguments.weights != "int4":
        parser.error("--calibrate is for --weights int4: int8 loses nothing worth it")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_output(arguments.out, "onnx")
    config = load_config(arguments.model)
    check_request(arguments, config)
    random_indexer = not isinstance(config, DSAConfig)
    tokenizer = load_tokenizer(arguments.model)
    check_vocabulary(tokenizer, config.vocab_size)
    windows, calibration = None, None
    if arguments.calibrate:
        source = None if arguments.calibrate == STANDARD_LIBRARY else arguments.calibrate
        windows = calibration_windows(tokenizer, source, config.max_position_embeddings)
        tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        calibration = {"text": str(arguments.calibrate), "tokens": windows.numel(), "sha256": tokens}
    torch.manual_seed(0)
    console.print(f"Loading {arguments.model}")
    model = load_model(
        arguments.model,
        dtype=DTYPES[arguments.dtype],
        kept=parameter_names,
        index_topk=arguments.topk,
        **selection_options(arguments),
    )
    model.requires_grad_(False)
    scheme = scheme_of(arguments)
    if scheme and scheme.lm_head:
        untie(model)
    stored = StoredModel(model, DTYPES[arguments.dtype])
    check_disk(arguments.out, stored, scheme)

    with output_folder(arguments.out) as out:
        models = {"dense": stored.dense(), "sparse": stored}
        with console.status("Exporting the graphs"):
            sparse = export_graph(stored)
            derivable = issubclass(VARIANTS[model.config.attention], SparseAttention)
            dense = dense_from_sparse(sparse) if derivable else export_graph(models["dense"])
            graphs = {"dense": dense, "sparse": sparse}
        length = min(max(model.config.topk_per_layer) + 64, MAX_PARITY_PROMPT) + DECODED_TOKENS
        text = tokenizer(parity_text(), add_special_tokens=False).input_ids[:length]
        unquantised: dict[str, Reference] = {}
        if scheme:
            with console.status("Computing without quantised weights"):
                unquantised = {variant: reference(m, text) for variant, m in models.items()}
            quantise_graphs(graphs, stored, scheme, windows)
        with console.status("Writing the weights"):
            save_graphs(graphs, out)
        del graphs, sparse, dense
        tokenizer.save_pretrained(out)

        compare = compare_graphs if derivable else compare_weights
        same = compare(*(ir.load(out / variant / MODEL_FILE) for variant in models))
        console.print(f"{'Identical operators' if derivable else 'Shared weights'}: {same}")
        parity = {}
        for variant, variant_model in models.items():
            with console.status(f"Checking the {variant} graph against torch"):
                parity[variant] = check_parity(
                    variant_model, out / variant, text, out / "parity", unquantised.get(variant)
                )
            console.print(describe(variant, parity[variant]))
        if not all(result["passed"] for result in parity.values()):
            raise UserError("the exported graphs do not compute what torch computes (figures above): nothing was kept")
        quantisation = asdict(scheme) | {"calibration": calibration} if scheme else None
        write_export_manifest(out, arguments, models, parity, same, quantisation, random_indexer=random_indexer)
    size = (arguments.out / "dense" / WEIGHTS_FILE).stat().st_size / 2**20
    console.print(
        f"Wrote {arguments.out}/dense/{MODEL_FILE} and {arguments.out}/sparse/{MODEL_FILE} "
        f"(k = {describe_topk(model.config.topk_per_layer)}, {precision_of(arguments)}) "
        f"with {size:.0f} MiB of shared weights"
    )
    if random_indexer:
        console.print("The indexer is random: time these graphs, do not use what they say")


def check_request(arguments: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Raises UserError if the checkpoint has no indexer to export, or not one that can be exported so."""
    plain = not isinstance(config, DSAConfig)
    if plain and not arguments.random_indexer:
        raise UserError(
            f"{arguments.model} is a plain checkpoint without an indexer: train one with "
            f"`python -m train.warmup --model {arguments.model}`, or pass --random-indexer if only timings are wanted"
        )
    if not plain and config.attention == VARIANTS[config.attention].DENSE:
        raise UserError(
            f"{arguments.model} was saved with attention={config.attention!r}, which has no indexer to export: train "
            f"one with `python -m train.warmup --model {arguments.model}`"
        )
    if arguments.topk is not None and not 1 <= arguments.topk <= config.max_position_embeddings:
        raise UserError(f"--topk must be between 1 and {config.max_position_embeddings}, got {arguments.topk}")
    if getattr(config, "attention", None) == "nsa" and (arguments.topk or selection_options(arguments)):
        raise UserError(
            f"{arguments.model} has native sparse attention: --topk and --index-… are options of an indexer"
        )


def check_disk(out: Path, stored: StoredModel, scheme: Scheme | None) -> None:
    """Raises UserError if the disk cannot hold the weights, which lie there in fp32 while a graph that is quantised or
    in bf16 is checked."""
    in_fp32 = scheme is not None or stored.dtype == torch.bfloat16
    needed = stored.model.num_parameters() * (torch.float32 if in_fp32 else stored.dtype).itemsize
    disk = next(folder for folder in out.absolute().parents if folder.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        raise UserError(
            f"the export needs {needed / 2**30:.1f} GiB of disk{' while it checks the graphs' if in_fp32 else ''}, and "
            f"{disk} has {free / 2**30:.1f} free: free some space, or choose an --out elsewhere"
        )


def scheme_of(arguments: argparse.Namespace) -> Scheme | None:
    if not arguments.weights:
        return None
    lm_head, indexer = not arguments.keep_lm_head, arguments.int8_indexer
    return Scheme(arguments.weights, arguments.block_size or BLOCK_SIZES[0], lm_head, indexer)


def quantise_graphs(
    graphs: Mapping[str, ir.Model], stored: StoredModel, scheme: Scheme, windows: Tensor | None
) -> None:
    """Quantises the weights of all graphs and of the model, by GPTQ where there are windows to calibrate on."""
    rounded = {}
    if windows is not None:
        with progress_bar() as progress:
            task = progress.add_task("Calibrating", total=len(stored.model.model.layers) + scheme.lm_head)
            rounded = calibrate(stored, windows, scheme, lambda: progress.advance(task))
    with console.status("Quantising the weights"):
        names = quantise(graphs.values(), stored, scheme, rounded)
    if windows is not None:
        others = sum(scheme.bits(name) == BITS["int4"] for name in names - rounded.keys())
        console.print(
            f"Calibrated {len(rounded)} weights on {windows.numel():,} tokens; rounded to the nearest: {others}"
        )


def describe(variant: str, result: dict[str, Any]) -> str:
    """Two lines for people."""
    text = (
        f"Parity {variant}: largest logit error {result['max_abs_error']:.1e} (allowed {result['tolerance']:.1e}) over "
        f"{result['prompt_tokens']} prefilled + {result['decoded_tokens']} decoded tokens, greedy tokens "
        + ("identical" if not result["greedy_tokens_differ"] else f"differ at {result['greedy_tokens_differ']}")
    )
    sets = result.get("selected_sets")
    if sets:
        text += f"; selected sets identical in {sets['identical']} of {sets['rows']} rows"
        text += f", {sets['ties']} tied, {sets['different']} different"
        if sets["different"]:
            text += f" (in the worst layer in {sets['apart']:.1%} of what can differ)"
        if sets["unlawful"]:
            text += f", {sets['unlawful']} of them no selections (unseen tokens, tokens twice, too many or too few)"
        if sets["covered_layers"]:
            text += f"; k covers the text in {sets['covered_layers']} layers: their selection itself was not checked"
    text += ": ok" if result["passed"] else ": FAILED"
    quality = result["quality"]
    return (
        f"{text}\nQuality {variant}: loss {quality['loss']:.4f} (torch, unquantised: {quality['reference_loss']:.4f}), "
        f"{quality['greedy_agreement']:.0%} of the greedy tokens, over the {quality['tokens']} decoded; the weights' "
        f"loss in torch {quality['text_loss']:.4f} (unquantised: {quality['text_reference_loss']:.4f}) over all "
        f"{quality['text_tokens']}"
    )


def precision_of(arguments: argparse.Namespace) -> str:
    """The precision of the weights: fp32 | fp16 | bf16 | int8 | int4."""
    return arguments.weights or arguments.dtype


def write_export_manifest(
    out: Path,
    arguments: argparse.Namespace,
    models: Mapping[str, StoredModel],
    parity: dict[str, Any],
    same: Comparison | SharedWeights,
    quantisation: dict[str, Any] | None,
    *,
    random_indexer: bool,
) -> None:
    model = models["sparse"].model
    config = model.config
    source = model_source(arguments.model)
    if (folder := Path(arguments.model)).is_dir():
        source["path"] = str(folder.resolve())
    eos = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    write_manifest(
        out,
        "onnx",
        source,
        random_indexer=random_indexer,
        dtype=arguments.dtype,
        precision=precision_of(arguments),
        quantisation=quantisation,
        topk=compact_topk(config.topk_per_layer),
        selection=chosen_options(config),
        model={
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "query_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_size,
            "index_heads": config.index_heads,
            "index_dim": config.index_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "eos_token_id": [eos] if isinstance(eos, int) else list(eos or []),
        },
        graphs={
            variant: {
                "path": f"{variant}/{MODEL_FILE}",
                "sha256": sha256(out / variant / MODEL_FILE),
                "cache": [describe_cache(entry, variant_model) for entry in variant_model.model.model.cache_layouts[0]],
            }
            for variant, variant_model in models.items()
        },
        weights={
            "file": WEIGHTS_FILE,
            "bytes": (out / "dense" / WEIGHTS_FILE).stat().st_size,
            "sha256": sha256(out / "dense" / WEIGHTS_FILE),
        },
        parity=parity,
        identical_operators=asdict(same) if isinstance(same, Comparison) else None,
        shared_weights=asdict(same) if isinstance(same, SharedWeights) else None,
    )


def describe_cache(entry: CacheEntry, stored: StoredModel) -> dict[str, Any]:
    """One cached tensor for the manifest; `layers` only where not all have it."""
    layouts = stored.model.model.cache_layouts
    layers = [i for i, layout in enumerate(layouts) if entry in layout]
    facts: dict[str, Any] = {
        "name": entry.name,
        "shape": list(entry.shape("batch", "capacity")),
        "dtype": str(entry.dtype or stored.dtype).removeprefix("torch."),
    }
    if entry.recent is not None:
        facts["recent"] = entry.recent
    return facts if len(layers) == len(layouts) else facts | {"layers": layers}


if __name__ == "__main__":
    run(main)
