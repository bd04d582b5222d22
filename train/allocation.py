"""k per layer under a total budget: each step of k goes to the layer where it catches the most attention mass."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dsa_export.cli import UserError
from dsa_export.files import (
    MANIFEST,
    check_output,
    checkpoint_hash,
    link_or_copy,
    manifest_kind,
    output_folder,
    write_manifest,
)
from dsa_export.model.checkpoint import load_config, quiet_transformers
from dsa_export.topk import compact_topk


def check_budget(budget: int, *, step: int, floor: int) -> None:
    """Raises UserError where allocate() has no k to choose."""
    if floor % step:
        raise UserError(f"--k-floor {floor} must be a multiple of --k-step {step}")
    if budget < floor:
        raise UserError(f"--k-budget {budget} is less than --k-floor {floor}, one --k-step unless given")


def allocate(caught: Tensor, budget: int, *, step: int, floor: int, share: int = 1) -> list[int]:
    """k of every layer with mean `budget`: greedy by the mass that the next `step` keys catch.

    caught: [layers, T], the mean share of attention mass in the k best keys, at k = 1 … T. Every k is a multiple of
    `step`, from `floor` up to T; what is left of the budget when every layer has T is not spent. The shares grow ever
    more slowly with k, which makes greedy steps the best choice. `share` layers in a row, which follow one selection,
    have one k.
    Needs a budget that check_budget() accepts.
    """
    layers, longest = caught.shape
    groups = caught.split(share)
    ks = [floor] * len(groups)

    def gain(group: int) -> float:
        """Of one more step for each of its layers, as a heap entry: the largest first."""
        mass = groups[group].mean(0)
        return float(mass[ks[group] - 1] - mass[ks[group] + step - 1])

    room = (budget - floor) * layers
    heap = [(gain(group), group) for group in range(len(groups)) if floor + step <= longest]
    heapq.heapify(heap)
    while heap:
        _, group = heapq.heappop(heap)
        cost = step * len(groups[group])
        if cost > room:
            continue
        ks[group] += step
        room -= cost
        if ks[group] + step <= longest:
            heapq.heappush(heap, (gain(group), group))
    return [k for k, group in zip(ks, groups, strict=True) for _ in group]


def check_topk_output(out: Path, model: str, results: Path, overwrite: bool) -> None:
    """Raises UserError if write_topk() cannot write to `out`, or would replace what it must not.

    results: the folder that the evaluation writes. overwrite: another checkpoint than `model` may be replaced.
    """
    if not Path(model).is_dir():
        raise UserError(f"--write-topk links the weights of a checkpoint folder, {model} is none: download it first")
    if out.resolve().is_relative_to(results.resolve()):
        raise UserError(f"--write-topk {out} lies in --out {results}, which is replaced: choose another folder")
    for option, folder in (("--model", Path(model)), ("--out", results)):
        if folder.resolve().is_relative_to(out.resolve()):
            raise UserError(f"--write-topk {out} would replace {option} {folder}: choose another folder")
    check_output(out, "checkpoint")
    if not overwrite and manifest_kind(out):
        raise UserError(f"--write-topk {out} holds a checkpoint: choose another folder, or --overwrite to replace it")


def write_topk(folder: Path, ks: Sequence[int], selection: dict[str, Any], out: Path, **facts: Any) -> None:
    """Writes a checkpoint folder with k per layer to `out`: another config.json, all other files hard-linked.

    selection: the options under which the ks were chosen, as fields of DSAConfig; the rest is the checkpoint's.
    Where links are impossible (another file system) the files are copied. Needs an `out` that check_topk_output()
    accepts.
    """
    config = load_config(folder)
    for name, value in {**selection, "index_topk": compact_topk(ks)}.items():
        setattr(config, name, value)
    with output_folder(out) as partial:
        for file in sorted(folder.iterdir()):
            if not file.is_file() or file.name in (MANIFEST, "config.json"):
                continue
            link_or_copy(file, partial / file.name)
        with quiet_transformers():
            config.save_pretrained(partial)
        write_manifest(
            partial, "checkpoint", {"path": str(folder), "sha256": checkpoint_hash(folder)}, topk=list(ks), **facts
        )
