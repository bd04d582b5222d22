"""What is measured on a trained twin, and how long attention takes at other lengths."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_export.cli import UserError
from dsa_export.files import read_manifest, write_atomically
from dsa_export.memory import PeakMemory
from dsa_export.model import AttentionTrace, DSAForCausalLM, load_model
from train import precision
from train.data import TrainingData, Windows
from train.experiment.twins import Plan, Twin, stage_of
from train.selection import SelectionMeter
from train.study import Study
from train.timing import decode_call, in_turn, prefill_call
from train.trainer import read_steps

RECORD = "record.json"
WARM_UP_STEPS = 5
"""Steps that are left out of the time per step."""

Record = dict[str, Any]


def record_of(twin: Twin, folder: Path, plan: Plan, *, memory: bool) -> tuple[Record, Selection | None]:
    """The twin's figures, measured once and kept in its folder, and the selection if that was measured just now.

    memory: that of a step too, the same for all seeds.
    """
    kept = folder / RECORD
    if kept.is_file():
        record = json.loads(kept.read_text())
        if memory and record["step_peak_mib"] is None:
            record["step_peak_mib"] = step_peak_mib(twin, folder, plan)
            write_atomically(kept, json.dumps(record, indent=1) + "\n")
        return record, None
    manifest = read_manifest(folder, "checkpoint", "python -m train.experiment")
    model = load_model(folder).to(plan.processes.device)
    record = {
        "preset": twin.preset.name,
        "attention": twin.attention,
        "seed": twin.seed,
        "length": twin.preset.length,
        "updates": twin.preset.warm_up_updates + twin.preset.steps,
        "tokens": (twin.preset.warm_up_updates + twin.preset.steps) * twin.preset.batch_size * twin.preset.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        **manifest["after"],
        "ms_per_step": ms_per_step(read_steps(folder)),
        "step_peak_mib": step_peak_mib(twin, folder, plan) if memory else None,
        "device": str(plan.processes.device),
        "threads": torch.get_num_threads(),
    }
    selected = None
    if twin.attention == "dsa":
        selected = selection(model, plan.data[twin.preset.name].held_out)
        record |= {"topk": list(selected.topk), **selected.facts()}
    write_atomically(kept, json.dumps(record, indent=1) + "\n")
    return record, selected


def ms_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    """The median over the steps of the main stage, evaluation and saving left out."""
    seconds = [m["seconds"] for m in steps]
    single = [b - a for a, b in itertools.pairwise([0.0, *seconds])]
    return 1e3 * statistics.median(single[WARM_UP_STEPS:] or single)


# ---------------------------------------------------------------- memory


def step_peak_mib(twin: Twin, folder: Path, plan: Plan) -> float | None:
    """MiB that a training step of one process takes beside weights and optimizer, in a process of its own.

    None: not measured.
    """
    device = str(plan.processes.device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        arguments = twin, folder, plan.data[twin.preset.name], device, plan.processes.count, torch.get_num_threads()
        return pool.submit(_step_peak_mib, *arguments, plan.dtype).result()


def _step_peak_mib(
    twin: Twin, folder: Path, data: TrainingData, device: str, processes: int, threads: int, dtype: torch.dtype
) -> float | None:
    torch.set_num_threads(threads)
    model = load_model(folder).to(device).train()
    stage = stage_of(twin.preset, twin.attention, dtype, sparse=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(rows: int) -> None:
        batch = data.train.batch(torch.arange(rows) % len(data.train), device)
        with precision.autocast(torch.device(device), dtype):
            values = stage.terms(model, batch)
        sum(values[name] for name in stage.losses).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(1)  # loads what the libraries keep, and makes the optimizer's state
    memory = PeakMemory()
    memory.reset()
    step(max(1, twin.preset.batch_size // processes))
    return memory.mib()


# ---------------------------------------------------------------- selection


@dataclass
class Selection:
    """What a DSA model selects of held-out text, by layer."""

    meter: SelectionMeter
    topk: tuple[int, ...]
    length: int
    selected: list[float] = field(default_factory=list)  # pairs of query and key, over those a query may see

    def facts(self) -> Record:
        """sparsity: share of the visible pairs left out; coverage: of the attention mass caught, beside the last k keys
        and the best possible k; mean_distance, in tokens, of the selected keys. All but the first over the queries that
        see more than k keys, None where there is none."""
        by_k = {item["k"]: item["by_layer"] for item in self.meter.results()}
        facts: Record = {"sparsity": 1 - sum(self.selected) / len(self.selected)}
        names = {"coverage": "recall", "coverage_window": "window", "coverage_best": "best"}
        for name, source in {**names, "mean_distance": "mean_distance"}.items():
            layers = [by_k[k][source][layer] for layer, k in enumerate(self.topk) if k in by_k]
            facts[name] = sum(layers) / len(layers) if layers else None
        return facts


@torch.no_grad()
def selection(model: DSAForCausalLM, windows: Windows) -> Selection:
    """Runs the held-out windows through the model: densely for the shares of mass, sparsely for what is selected."""
    study, topk = Study(model, rungs=(), every=1, seed=0), model.config.topk_per_layer
    meter = study.meter(sorted(set(topk)), maps=True)
    selected, visible = [0] * len(topk), 0

    def count(trace: AttentionTrace) -> dict[str, Tensor]:
        assert trace.indices is not None
        selected[trace.layer] += int((trace.indices >= 0).sum())
        return {}

    for row in range(len(windows)):
        ids = windows.batch(torch.tensor([row]), study.device)["input_ids"]
        study.dense_states(ids, meter)
        model.sparse = True
        model.model(ids, observer=count)
        visible += ids.shape[1] * (ids.shape[1] + 1) // 2
    return Selection(meter, topk, windows.input_ids.shape[1], [pairs / visible for pairs in selected])


# ---------------------------------------------------------------- speed over lengths


def speed(
    models: Mapping[str, DSAForCausalLM],
    lengths: Sequence[int],
    prefill_limit: int,
    runs: int,
    tick: Callable[[], None],
) -> list[Record]:
    """Milliseconds of one decoded token after `length` tokens, and of reading `length` tokens (up to prefill_limit), in
    torch, batch 1; medians of `runs` calls in turn. Beyond the model's positions it is timed, not used."""
    records = []
    for model in models.values():
        model.eval()
        if hasattr(model.model.layers[0].self_attn, "sparse"):
            model.sparse = True
    for length in lengths:
        calls = {"decode": {name: decode_call(model, length) for name, model in models.items()}}
        if length <= prefill_limit:
            calls["prefill"] = {name: prefill_call(model, length) for name, model in models.items()}
        for phase, by_name in calls.items():
            times = in_turn(by_name, runs)
            records.append({"phase": phase, "length": length, "ms": times})
            tick()
    return records


def crossover(records: Sequence[Record], phase: str, attention: str, factor: float = 1.0) -> float | None:
    """Tokens from which `attention` is `factor` times as fast as dense at every longer measured length, by
    interpolation in log2.

    None: not within the lengths measured.
    """
    points = [(r["length"], r["ms"]["dense"] / r["ms"][attention] / factor) for r in records if r["phase"] == phase]
    if not points or points[-1][1] < 1:
        return None
    for (short, slow), (long, fast) in reversed(list(itertools.pairwise(points))):
        if slow < 1:
            return short * 2 ** (log2(long / short) * log2(1 / slow) / log2(fast / slow))
    return float(points[0][0])


def check_lengths(lengths: Sequence[int]) -> None:
    """Raises UserError for lengths that the timing cannot take."""
    if any(length < 2 for length in lengths):
        raise UserError(f"--speed-lengths must be at least 2, got {min(lengths)}")
    if list(lengths) != sorted(set(lengths)):
        raise UserError("--speed-lengths must grow")
