"""Training of one twin: a decoder with one attention and one seed, from scratch, in two stages.

The warm-up attends to everything: the whole model learns by cross-entropy, and DSA's indexer, which starts from
nothing, learns the attention beside it (its input is detached: the base does not notice). The main stage attends as the
variant does: DSA by the losses of train.joint --objective next-token (the indexer by AdamW at the base's rate), NSA and
dense by cross-entropy. NSA's warm-up is its own attention already.

All twins of a seed start from the same weights, read the same windows in the same order, and make the same number of
updates with the same learning rates: whatever is counted for one is counted for all, the warm-up included.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.cli import console
from dsa_export.files import as_in_manifest
from dsa_export.model import DSAForCausalLM, load_model
from dsa_export.model.checkpoint import adapted_config
from dsa_export.model.feed_forward import VARIANTS
from train import joint
from train.allocation import allocate
from train.base import SCRATCH
from train.cross_entropy import cross_entropy_terms
from train.data import IGNORED, Batch, TrainingData, Windows
from train.distributed import Processes
from train.experiment.presets import Preset
from train.finetune import all_parameters, new_model
from train.losses import IndexerObserver
from train.options import is_done
from train.study import Study
from train.trainer import Settings, Stage, Trainer
from train.validation import Sum, means

MEASURE_EVERY = 8
KL_TARGET = "rms"
ALLOCATION_WINDOWS = 32
K_STEPS = 8
"""--k auto gives k out in steps of an eighth of its mean."""


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    out: Path  # folder of the runs
    data: Mapping[str, TrainingData]  # by preset
    data_source: str
    tokenizers: Mapping[int, Any]  # by vocabulary
    processes: Processes
    dtype: torch.dtype = torch.float32
    auto_k: bool = False
    save_every: int = 50


@dataclass(frozen=True)
class Twin:
    preset: Preset
    attention: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.preset.name}-{self.attention}-seed{self.seed}"

    def identity(self, plan: Plan) -> dict[str, Any]:
        """What a finished or stopped run must share with this one to be used."""
        data = plan.data[self.preset.name].facts
        facts = {"attention": self.attention, "seed": self.seed, "data": plan.data_source}
        facts |= {name: data[name] for name in ("sha256", "held_out_sha256")}
        facts["auto_k"] = plan.auto_k and self.attention == "dsa"
        facts["kl_target"] = KL_TARGET
        arguments = {**asdict(self.preset), **facts, "dtype": str(plan.dtype)}
        arguments["warmup_steps"] = arguments.pop("warm_up_updates")  # as it is called in the files of earlier versions
        return {"stage": "experiment", "arguments": as_in_manifest(arguments)}


def terms(model: Any, batch: Batch, indexer: bool, sparse: bool) -> dict[str, Tensor]:
    """{"cross_entropy"[, "balance"][, "kl", "recall", …]} of a batch."""
    observer = None
    if indexer:
        model.sparse = sparse
        observer = IndexerObserver(model.config.topk_per_layer, MEASURE_EVERY, target=KL_TARGET)
    return cross_entropy_terms(model, batch, observer)


def evaluate(
    model: Any, windows: Windows, *, indexer: bool, sparse: bool, batch_size: int, compute_dtype: torch.dtype
) -> dict[str, float]:
    """{"loss", "accuracy", "perplexity"} of the next token."""
    if indexer:
        model.sparse = sparse

    def sums(batch: Batch, labels: int) -> dict[str, Sum]:
        counted = batch["labels"][:, 1:] != IGNORED
        targets = batch["labels"][:, 1:][counted]
        logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1][counted]
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return {"loss": (float(loss), labels), "accuracy": (int((logits.argmax(-1) == targets).sum()), labels)}

    result = means(model, windows, sums, batch_size=batch_size, compute_dtype=compute_dtype)
    return {**result, "perplexity": exp(result["loss"])}


def stage_of(preset: Preset, attention: str, dtype: torch.dtype, *, sparse: bool) -> Stage:
    """sparse: attend as the variant does; False: to everything, where the variant can."""
    indexer = attention == "dsa"
    groups: Callable[[nn.Module], dict[str, list[nn.Parameter]]] = joint.parameter_groups if indexer else all_parameters
    return Stage(
        name="main" if sparse else "warm-up",
        groups=groups,
        terms=partial(terms, indexer=indexer, sparse=sparse),
        losses=("cross_entropy", *(("kl",) if indexer else ()), *VARIANTS[preset.feed_forward].LOSSES),
        evaluate=partial(
            evaluate, indexer=indexer, sparse=sparse, batch_size=preset.batch_size, compute_dtype=dtype
        ),
    )  # fmt: skip


def settings_of(preset: Preset, seed: int, plan: Plan, *, warmup: bool) -> Settings:
    steps = preset.warm_up_updates if warmup else preset.steps
    count = plan.processes.count
    return Settings(
        steps=steps,
        lengths=(preset.length,),
        batch_size=preset.batch_size // count,
        accumulation=count,
        lr=preset.warmup_lr if warmup else preset.lr,
        warmup_steps=steps // 20,
        seed=seed,
        dtype=plan.dtype,
    )


def parts_of(data: TrainingData, preset: Preset) -> tuple[TrainingData, TrainingData]:
    """The windows of the warm-up and those of the main stage, in the proportion of their steps."""
    share = preset.warm_up_updates / (preset.warm_up_updates + preset.steps)
    cut = min(max(1, round(len(data.train) * share)), len(data.train) - 1)

    def part(rows: slice) -> TrainingData:
        windows = data.train
        return replace(data, train=Windows(windows.input_ids[rows], windows.labels[rows], windows.lengths[rows]))

    return part(slice(0, cut)), part(slice(cut, None))


def train_twin(twin: Twin, plan: Plan) -> Path:
    """Trains a twin, or goes on where it was stopped; returns the folder of the finished checkpoint."""
    out, preset = plan.out / twin.name, twin.preset
    identity = twin.identity(plan)
    warm = plan.out / f"{twin.name}.warm-up"
    if is_done(out, None, identity, overwrite=False, knows_data=True):
        if plan.processes.is_first:
            shutil.rmtree(warm, ignore_errors=True)
        return out
    data, tokenizer = plan.data[preset.name], plan.tokenizers[preset.vocabulary]
    warmup_data, main_data = parts_of(data, preset)

    def run_stage(model: Any, part: TrainingData, folder: Path, *, warmup: bool) -> None:
        console.print(f"{twin.name}: {'warm-up' if warmup else 'main stage'}")
        stage = stage_of(preset, twin.attention, plan.dtype, sparse=not warmup)
        settings = settings_of(preset, twin.seed, plan, warmup=warmup)
        Trainer(
            stage, model, tokenizer, part, settings, folder, SCRATCH, identity, plan.processes,
            save_every=plan.save_every,
        ).run()  # fmt: skip

    if preset.warm_up_updates and not is_done(warm, None, identity, overwrite=False, knows_data=True):
        run_stage(fresh(twin), warmup_data, warm, warmup=True)
    model = load_model(warm) if preset.warm_up_updates else fresh(twin)
    if plan.auto_k and twin.attention == "dsa":
        model.set_topk(choose_topk(model, warmup_data.train, preset, twin.seed))
        console.print(f"{twin.name}: k by layer: {' '.join(map(str, model.config.topk_per_layer))}")
    run_stage(model, main_data, out, warmup=False)
    if plan.processes.is_first:
        shutil.rmtree(warm, ignore_errors=True)
    return out


def fresh(twin: Twin) -> DSAForCausalLM:
    """New weights, the same in all twins of a seed wherever they have the same parameters."""
    return new_model(adapted_config(twin.preset.config(), twin.attention), twin.seed)


def choose_topk(model: DSAForCausalLM, windows: Windows, preset: Preset, seed: int) -> list[int]:
    """k by layer with the preset's k as their mean, by the attention mass that the warmed-up indexers catch."""
    budget = preset.mean_topk
    step = max(1, budget // K_STEPS)
    study = Study(model, (), 1, seed)
    count = min(ALLOCATION_WINDOWS, len(windows))
    some = Windows(windows.input_ids[:count], windows.labels[:count], windows.lengths[:count])
    return allocate(study.caught(some), budget, step=step, floor=step)
