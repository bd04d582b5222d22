"""One training loop for all stages: steps, schedule, accumulation, evaluation, saving and resuming.

A run is a function of its arguments, its model and its data: killed at any moment and started again with the same
arguments, it goes on from `<out>.partial/` and ends (on a CPU) in the same bits.
"""

from __future__ import annotations

import json
import math
import re
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dsa_export.cli import UserError, console, progress_bar
from dsa_export.files import (
    TRAINING_STATE,
    as_in_manifest,
    output_folder,
    temporary_name,
    write_atomically,
    write_manifest,
)
from train import precision
from train.checkpoint import load_state, save_checkpoint, save_state
from train.data import Batch, TrainingData, Windows, label_count
from train.distributed import Processes, Spread, collect, like, load_optimizer_state, optimizer_state
from train.plots import plot_metrics
from train.positions import with_gaps

METRICS = "metrics.jsonl"

EXPLODED_STEPS, EXPLODED_FACTOR, EXPLODED_MARGIN = 10, 3.0, 1.0
"""A trained loss has exploded if its mean over the last 10 steps is more than 3 times that over the first 10, plus 1.

From step 21 on. A single odd window is no explosion, nor is a tiny loss that triples."""

SAVE_SECONDS = 600
"""A state is saved after so long, however few updates that are."""


@dataclass(frozen=True)
class Stage:
    """What one stage trains, by which losses, and how it is judged."""

    name: str
    groups: Callable[[nn.Module], dict[str, list[nn.Parameter]]]
    """Parameters to train. Each group is clipped by itself: its gradients do not depend on another group's."""
    terms: Callable[[nn.Module, Any], dict[str, Tensor]]
    """Scalars of a batch (or what `record` made of it): those in `losses` are trained, the others reported."""
    losses: tuple[str, ...]
    evaluate: Callable[[nn.Module, Windows], dict[str, float]]
    optimizers: Callable[[dict[str, list[nn.Parameter]], Settings], list[torch.optim.Optimizer]] = lambda groups, s: [
        adamw([p for parameters in groups.values() for p in parameters], s)
    ]
    prepare: Callable[[nn.Module], None] = lambda model: None
    """Changes the model in place before it trains (adapters), after the evaluation before."""
    finish: Callable[[nn.Module], None] = lambda model: None
    """Takes that back before the result is evaluated and saved."""
    passes: int = 1
    """Updates of a step, all from its batches."""
    record: Callable[[nn.Module, Batch], Any] | None = None
    """Computes what `terms` takes in the batch's place, without gradient and once per step: what its passes share."""


@dataclass(frozen=True)
class Phase:
    """The steps `first` to `end` (excluded) on windows of `length` tokens."""

    length: int
    first: int
    end: int


@dataclass(frozen=True)
class Settings:
    """What decides the weights, together with the model and the data."""

    steps: int
    lengths: tuple[int, ...]
    """T, tokens per window. With several the windows grow: every length gets the same number of tokens."""
    batch_size: int = 1
    accumulation: int = 1
    """Micro-batches of an update, over all processes."""
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    clip: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    position_span: int = 0
    """Windows of fewer tokens are spread over so many positions, with gaps."""

    def lr_factor(self, step: int) -> float:
        """Linear rise over warmup_steps, then constant, linear or cosine in the tokens read, down to a tenth."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        start, end = self.tokens_before(self.warmup_steps), self.tokens_before(self.steps)
        progress = (self.tokens_before(step) - start) / max(1, end - start)
        if self.schedule == "constant":
            return 1.0
        falling = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return 0.1 + 0.9 * falling

    def phases(self) -> list[Phase]:
        """One per length, with as many steps as give it an equal share of the tokens."""
        shares = [1 / length for length in self.lengths]
        bounds = [round(self.steps * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
        return [Phase(*phase) for phase in zip(self.lengths, bounds, bounds[1:], strict=False)]

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before `step` read, padding included."""
        read = sum(p.length * (min(step, p.end) - p.first) for p in self.phases() if step > p.first)
        return read * self.batch_size * self.accumulation

    def rows(self, step: int, micro_step: int, windows: int) -> Tensor:
        """Which windows of its phase a micro-batch takes, `step` counted within the phase.

        Every window once per epoch, each epoch in an order of its own.
        """
        first = (step * self.accumulation + micro_step) * self.batch_size
        taken = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, windows)
            taken.append(_order(nth_seed(self.seed, epoch), windows)[place])
        return torch.stack(taken)

    def seed_of(self, step: int, micro_step: int) -> int:
        """Seed of what is random in a micro-batch: it hangs neither on the process that takes it nor on a stop."""
        return nth_seed(self.seed, step * self.accumulation + micro_step)


def nth_seed(seed: int, number: int) -> int:
    """One of many seeds that hang on `seed`; those of neighbouring seeds are others."""
    return seed * 1_000_003 + number


@lru_cache(maxsize=2)  # an epoch may end within a micro-batch
def _order(seed: int, windows: int) -> Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


@dataclass
class Trainer:
    """Trains `model` and writes the folder `out`.

    `identity` is everything that a resumed run must share with the one that left the state (JSON values); it goes into
    the manifest. overwrite: the state of another run is forgotten instead of refused.
    """

    stage: Stage
    model: Any
    tokenizer: Any
    data: TrainingData
    settings: Settings
    out: Path
    source: dict[str, Any]
    identity: dict[str, Any]
    processes: Processes
    max_minutes: float | None = None
    save_every: int = 50
    overwrite: bool = False

    def run(self) -> None:
        """Trains to the end and writes the result. Raises UserError, KeyboardInterrupt, OSError."""
        self.folder = temporary_name(self.out)
        first = self.processes.is_first
        after: dict[str, float] = {}
        with output_folder(self.out, keep_partial=True) if first else nullcontext(), self._named_interrupt():
            self.processes.wait()
            self._prepare()
            with _stop_requests() as stop_requested:
                self._train(stop_requested)
            self.model = self.spread.gather()
            if first:
                self.stage.finish(self.model)
                after = self._evaluate("after")
                self._write(after)
        if first:
            (self.out / TRAINING_STATE).unlink(missing_ok=True)
            self._report(after)
        self.processes.wait()  # for what the first one writes: others may read it next

    @contextmanager
    def _named_interrupt(self) -> Iterator[None]:
        """An interrupt that says nothing, as in the middle of a step, says what is kept."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if str(interrupt) or not (self.folder / TRAINING_STATE).is_file():
                raise
            raise KeyboardInterrupt(
                f"stopped; the last state saved is in {self.folder}: the same command goes on from there"
            ) from None

    def _write(self, after: dict[str, float]) -> None:
        save_checkpoint(self.folder, self.model, self.tokenizer)
        plot_metrics(read_steps(self.folder), self.folder / "loss.png", f"{self.stage.name}: {self.source['path']}")
        write_manifest(
            self.folder,
            "checkpoint",
            self.source,
            **self.identity,
            data=self.data.facts,
            processes=self.processes.count,
            steps=self.settings.steps,
            steps_done=self.step,
            seconds=round(self.seconds, 1),
            before=self.before,
            after=after,
        )

    def _prepare(self) -> None:
        settings = self.settings
        self.device = self.processes.device
        self.step, self.seconds = 0, 0.0
        self.before: dict[str, float] = {}
        phases = settings.phases()
        self.phases = list(zip(phases, self.data.train.cut([p.length for p in phases]), strict=True))
        state = self._state_left()
        self.processes.wait()
        torch.manual_seed(settings.seed)
        if state is None and self.processes.is_first:
            (self.folder / TRAINING_STATE).unlink(missing_ok=True)
            (self.folder / METRICS).write_text("")
            self.before = self._evaluate("before")
        self.processes.wait()

        self.stage.prepare(self.model)
        trained = {id(p) for parameters in self.stage.groups(self.model).values() for p in parameters}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.spread = Spread(self.model, self.processes)
        self.groups = self.stage.groups(self.spread.model)
        self.trained = {name: p for name, p in self.spread.model.named_parameters() if p.requires_grad}
        self.optimizers = self.stage.optimizers(self.groups, settings)
        self.peak_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if state is not None:
            self._restore(state)
        self.processes.wait()
        self.history = read_steps(self.folder)

    # ------------------------------------------------------------ the loop

    def _train(self, stop_requested: Callable[[], bool]) -> None:
        settings = self.settings
        self.spread.model.train()
        shown = [*self.stage.losses, "recall"]
        with progress_bar("terms") as progress:
            # In tokens: where windows grow, the later steps take longer.
            total = settings.tokens_before(settings.steps)
            read = settings.tokens_before(self.step)
            task = progress.add_task(f"{self.stage.name}, tokens", total=total, completed=read, terms="")
            last_line = last_save = time.monotonic()
            (over,) = self.processes.any(self._out_of_time())
            while self.step < settings.steps and not over:
                start = time.perf_counter()
                metrics = self._step()
                self.step += 1
                self.seconds += time.perf_counter() - start
                self._log(metrics | {"seconds": round(self.seconds, 3)})

                terms = "  ".join(f"{name} {metrics[name]:.4f}" for name in shown if name in metrics)
                step_terms = f"step {self.step}/{settings.steps}  {terms}"
                progress.update(task, completed=settings.tokens_before(self.step), terms=step_terms)
                due = self.step % max(1, settings.steps // 10) == 0 or time.monotonic() - last_line > 30
                if not console.is_terminal and due:
                    console.print(f"{self.stage.name} {step_terms}  {self._eta()}")
                    last_line = time.monotonic()

                late = time.monotonic() - last_save >= SAVE_SECONDS
                stop, late, over = self.processes.any(stop_requested(), late, self._out_of_time())
                if self.step % self.save_every == 0 or self.step == settings.steps or stop or late:
                    self._save()
                    last_save = time.monotonic()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step} of {settings.steps}; the state is saved in {self.folder}: "
                        "the same command goes on from there"
                    )
        if self.step < settings.steps:
            self._save()
            console.print(f"{self.max_minutes:g} minutes are over: ending after step {self.step}")

    def _out_of_time(self) -> bool:
        return self.max_minutes is not None and self.seconds >= 60 * self.max_minutes

    def _step(self) -> dict[str, Any]:
        """The updates of one step. Terms are means over them: by labels of what is predicted, else by valid tokens."""
        settings = self.settings
        factor = settings.lr_factor(self.step)
        for optimizer, peaks in zip(self.optimizers, self.peak_lrs, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        phase, windows = next((p, w) for p, w in self.phases if self.step < p.end)
        rows = [settings.rows(self.step - phase.first, i, len(windows)) for i in range(settings.accumulation)]
        mine = range(self.processes.rank, settings.accumulation, self.processes.count)
        batches = []
        for i in mine:
            torch.manual_seed(settings.seed_of(self.step * self.stage.passes, i))
            batches.append(with_gaps(windows.batch(rows[i], self.device), settings.position_span))
        counts = [{"labels": label_count(batch), "tokens": int(batch["attention_mask"].sum())} for batch in batches]
        totals = self.processes.sum({unit: sum(count[unit] for count in counts) for unit in ("labels", "tokens")})
        recorded = batches
        if self.stage.record:
            with torch.no_grad(), precision.autocast(self.device, settings.dtype):
                recorded = [self.stage.record(self.spread.model, batch) for batch in batches]
        parts = list(zip(mine, recorded, counts, strict=True))
        updates = [self._update(number, parts, totals, rows) for number in range(self.stage.passes)]
        means = {name: statistics.fmean(update[name] for update in updates) for name in updates[0]}
        metrics = {"step": self.step + 1, **means, "lr": settings.lr * factor, "tokens": int(totals["tokens"])}
        self.history.append(metrics)
        return metrics

    def _update(
        self,
        number: int,
        parts: list[tuple[int, Any, dict[str, int]]],
        totals: dict[str, float],
        rows: list[Tensor],
    ) -> dict[str, float]:
        """One of a step's updates: the terms and gradient norms.

        parts: this process's micro-batches, each with its number in the step and its labels and tokens.
        rows: the windows of the step, to be named if it goes wrong.
        """
        settings = self.settings
        sums: dict[str, float] = defaultdict(float)
        for i, batch, count in parts:
            torch.manual_seed(settings.seed_of(self.step * self.stage.passes + number, i))
            with self.spread.exchange(last=i == parts[-1][0]):
                with precision.autocast(self.device, settings.dtype):
                    terms = self.spread.run(self.stage.terms, batch)
                loss = torch.zeros((), device=self.device)
                for name, term in terms.items():
                    unit = "labels" if name in ("cross_entropy", "distillation") else "tokens"
                    share = count[unit] / totals[unit]
                    sums[name] += term.item() * share
                    if name in self.stage.losses:
                        loss = loss + term * share
                self.spread.backward(loss)
        means = self.processes.sum(sums)
        norms = {
            f"grad_norm_{name}": collect(nn.utils.clip_grad_norm_(parameters, settings.clip)).item()
            for name, parameters in self.groups.items()
        }
        self._check_divergence(rows, means, norms)
        for optimizer in self.optimizers:
            optimizer.step()
        self.spread.model.zero_grad(set_to_none=True)
        return means | norms

    def _check_divergence(self, rows: list[Tensor], losses: dict[str, float], norms: dict[str, float]) -> None:
        """Stops at a value that is not finite or a loss that explodes; the state before this update is saved."""
        trained = {name: losses[name] for name in self.stage.losses}
        problems = [f"{name} is {value}" for name, value in {**trained, **norms}.items() if not math.isfinite(value)]
        if len(self.history) >= 2 * EXPLODED_STEPS:
            at_first = self.history[:EXPLODED_STEPS]
            lately = [*self.history[1 - EXPLODED_STEPS :], losses]
            for name in trained:
                first, last = (statistics.fmean(metrics[name] for metrics in part) for part in (at_first, lately))
                if last > EXPLODED_FACTOR * first + EXPLODED_MARGIN:
                    what = f"{first:.3g} at first, {last:.3g} in the last {EXPLODED_STEPS} steps"
                    problems.append(f"{name} explodes ({what})")
        if problems:
            self.spread.model.zero_grad(set_to_none=True)
            self._save()
            windows = ", ".join(str(row) for row in torch.cat(rows).tolist())
            raise UserError(
                f"{problems[0]} at step {self.step + 1} (windows {windows}); the weights before this update are "
                f"saved in {self.folder / TRAINING_STATE}: start again with a lower --lr and --overwrite"
            )

    def _eta(self) -> str:
        read, total = (self.settings.tokens_before(step) for step in (self.step, self.settings.steps))
        left = self.seconds / read * (total - read)
        return f"{1000 * self.seconds / read:.2f} s per 1,000 tokens, {left / 60:.1f} min left"

    # ------------------------------------------------------------ evaluation and report

    def _evaluate(self, when: str) -> dict[str, float]:
        """By the first process alone; empty without held-out windows. Raises UserError if a figure is not finite."""
        if not len(self.data.held_out):
            return {}
        if not console.is_terminal:
            windows, tokens = self.data.held_out.input_ids.shape
            console.print(f"{self.stage.name} evaluating {windows} × {tokens} held-out tokens …")
        result = self.stage.evaluate(self.model.to(self.device), self.data.held_out)
        for name, value in result.items():
            if not math.isfinite(value):
                mend = "check the checkpoint" if when == "before" else "start again with a lower --lr and --overwrite"
                raise UserError(f"{name} is {value} {when} training: {mend}")
        self._log({"evaluation": when, "step": self.step, **result})
        if not console.is_terminal:
            console.print(f"{when}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return result

    def _report(self, after: dict[str, float]) -> None:
        if after:
            self._show(after)
        console.print(f"written: {self.out}/ (checkpoint, tokenizer, manifest.json, {METRICS}, loss.png)")

    def _show(self, after: dict[str, float]) -> None:
        table = Table(
            "held-out", "before", "after", title=f"{self.stage.name}, {self.step} steps, {self.seconds:.0f} s"
        )
        for name, value in after.items():
            table.add_row(name, f"{self.before[name]:.4f}", f"{value:.4f}")
        console.print(table)
        if "loss_sparse" in after:
            change = after["loss_sparse"] / after["loss_dense"] - 1
            if "recall" in after:
                console.print(f"On these windows the selection costs {change:+.2%} of the dense loss")
            else:
                console.print("No measured token of the held-out windows sees more than k keys: next to nothing was "
                              "left out, and nothing is known of the selection (longer --length, or train.evaluate "
                              "with a smaller --topk)")  # fmt: skip

    # ------------------------------------------------------------ state

    def _save(self) -> None:
        state = self._state()
        if self.processes.is_first:
            save_state(self.folder, state)

    def _state(self) -> dict[str, Any]:
        """The same whatever the number of processes. Every process must call it; the first one's is complete."""
        keep = self.processes.is_first
        return {
            "identity": json.dumps(self._full_identity()),
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "weights": {name: collect(parameter, keep) for name, parameter in self.trained.items()},
            "optimizers": [optimizer_state(optimizer, keep) for optimizer in self.optimizers],
        }

    def _state_left(self) -> dict[str, Any] | None:
        """What a stopped run left of this very command. Raises UserError for that of another, unless to overwrite."""
        try:
            state = load_state(self.folder)
        except UserError:
            if not self.overwrite:
                raise
            return None
        if state is None:
            return None
        difference = first_difference(json.loads(state["identity"]), self._full_identity())
        if difference and not self.overwrite:
            raise another_run(self.folder, difference)
        return None if difference else state

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(like(parameter, state["weights"][name]))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer_state(optimizer, saved)
        self.step, self.seconds, self.before = state["step"], state["seconds"], state["before"]
        if self.processes.is_first:
            kept = [m for m in read_metrics(self.folder) if m["step"] <= self.step and m.get("evaluation") != "after"]
            write_atomically(self.folder / METRICS, "".join(json.dumps(m) + "\n" for m in kept))
        console.print(f"resuming from step {self.step} of {self.settings.steps} ({self.folder})")

    def _full_identity(self) -> dict[str, Any]:
        facts = {"model": self.source["sha256"], "data": self.data.facts["sha256"]}
        return as_in_manifest(self.identity | facts)

    def _log(self, entry: dict[str, Any]) -> None:
        if self.processes.is_first:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(entry) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the steps, without the evaluations."""
    return [m for m in read_metrics(folder) if "evaluation" not in m]


def first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str | None:
    """'lr: 0.001 there, 0.0001 now' for the first differing entry of two nested dicts, None if they are equal."""
    for name in [*old, *(n for n in new if n not in old)]:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            difference = first_difference(before, now, f"{prefix}{name}.")
            if difference:
                return difference
        elif before != now:
            return f"{prefix}{name}: {_short(before)} there, {_short(now)} now"
    return None


def another_run(folder: Path, difference: str) -> UserError:
    """Of the first difference between what left `folder` and the present command."""
    return UserError(
        f"{folder} holds an unfinished run with another configuration ({difference}): use the same arguments, "
        "another --out, or --overwrite to start again"
    )


def _short(value: Any) -> Any:
    """The beginning of a hash, anything else as it is."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; the second one stops as soon as Python is asked."""
    requested = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    previous = {number: signal.getsignal(number) for number in signals}

    def request(number: int, _frame: Any) -> None:
        requested.set()
        # Python runs no handler before torch is back, on a CPU from the whole backward pass.
        console.print("stopping after this step (once more: in the middle of it, when torch's current call is done) …")
        for n, handler in previous.items():
            signal.signal(n, handler)

    for number in signals:
        signal.signal(number, request)
    try:
        yield requested.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
