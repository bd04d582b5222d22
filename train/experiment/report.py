"""The experiment's results: records to a table with means and spreads, a verdict, and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_export.files import write_atomically, write_lines
from dsa_export.topk import describe_topk
from train.experiment.measure import Record, Selection, crossover

ALLOWED, AIM = 0.05, 0.01
"""Loss that sparsity may cost against the dense twin, and what is aimed at."""

SPEED_UP = 1.2
"""What counts as a gain in speed, where the length leaves room for one."""

COLOURS = {"dense": "black", "dsa": "tab:blue", "nsa": "tab:orange"}


@dataclass(frozen=True)
class Column:
    title: str
    value: Callable[[Record], float | None]
    form: Callable[[float], str]


COLUMNS = (
    Column("loss", lambda r: r["loss"], "{:.4f}".format),
    Column("accuracy", lambda r: 100 * r["accuracy"], "{:.2f} %".format),
    Column("perplexity", lambda r: r["perplexity"], "{:.2f}".format),
    Column("ms/update", lambda r: r["ms_per_step"], "{:.0f}".format),
    Column("step MiB", lambda r: r["step_peak_mib"], "{:.0f}".format),
    Column("sparsity", lambda r: _percent(r.get("sparsity")), "{:.1f} %".format),
    Column("coverage", lambda r: _percent(r.get("coverage")), "{:.1f} %".format),
    Column("window", lambda r: _percent(r.get("coverage_window")), "{:.1f} %".format),
    Column("best", lambda r: _percent(r.get("coverage_best")), "{:.1f} %".format),
    Column("mean distance", lambda r: r.get("mean_distance"), "{:.1f}".format),
)
SPREAD = ("loss", "accuracy", "perplexity")
"""Columns that show the spread over the seeds; the others show the mean."""


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def groups_of(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each (preset, attention), one per seed."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["preset"], record["attention"]), []).append(record)
    return groups


def increases(records: Sequence[Record], preset: str, attention: str) -> list[float]:
    """Held-out loss over that of the dense twin, less 1, seed by seed."""
    dense = {r["seed"]: r["loss"] for r in records if (r["preset"], r["attention"]) == (preset, "dense")}
    mine = [r for r in records if (r["preset"], r["attention"]) == (preset, attention)]
    return [r["loss"] / dense[r["seed"]] - 1 for r in mine if r["seed"] in dense]


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """A header and one row per preset and attention: means over the seeds, ± standard deviation."""
    rows = [["model", "attention", "seeds", COLUMNS[0].title, "vs dense", *(c.title for c in COLUMNS[1:])]]
    for (preset, attention), group in groups_of(records).items():
        cells = {}
        for column in COLUMNS:
            values = [value for record in group if (value := column.value(record)) is not None]
            cells[column.title] = _mean(values, column.form, spread=column.title in SPREAD)
        change = increases(records, preset, attention) if attention != "dense" else []
        against = _mean([100 * c for c in change], "{:+.2f} %".format, spread=True)
        k = f", k = {describe_topk(group[0]['topk'])}" if "topk" in group[0] else ""
        first, *others = cells.values()
        rows.append([preset, attention + k, str(len(group)), first, against, *others])
    return rows


def _mean(values: Sequence[float], form: Callable[[float], str], *, spread: bool) -> str:
    if not values:
        return "–"
    text = form(statistics.fmean(values))
    return f"{text} ± {form(statistics.stdev(values)).lstrip('+')}" if spread and len(values) > 1 else text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * 2 + ["--:"] * (len(header) - 2), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdicts(records: Sequence[Record], speeds: Sequence[Record]) -> list[str]:
    """One line per sparse twin on its loss, and one per phase on where it is faster than dense."""
    lines = []
    for preset, attention in groups_of(records):
        change = increases(records, preset, attention)
        if attention == "dense" or not change:
            continue
        mean = statistics.fmean(change)
        reached = "within the aim of" if mean <= AIM else "within" if mean <= ALLOWED else "NOT within"
        bound = AIM if mean <= AIM else ALLOWED
        lines.append(
            f"{preset}, {attention}: held-out loss {mean:+.2%} against dense over {len(change)} seed"
            f"{'s' if len(change) > 1 else ''}: {reached} {bound:.0%}"
        )
    for phase in ("decode", "prefill"):
        timed = [r for r in speeds if r["phase"] == phase]
        for attention in (name for name in (timed[0]["ms"] if timed else ()) if name != "dense"):
            faster, much_faster = (
                "at no measured length" if at is None else f"from about {at:,.0f} tokens on"
                for at in (crossover(speeds, phase, attention, factor) for factor in (1.0, SPEED_UP))
            )
            last = timed[-1]
            ratio = last["ms"]["dense"] / last["ms"][attention]
            lines.append(
                f"{phase}, {attention}: faster than dense {faster}, {SPEED_UP}× {much_faster}; {ratio:.2f}× at "
                f"{last['length']:,} tokens"
            )
    return lines


def speed_rows(speeds: Sequence[Record]) -> list[list[str]]:
    names = list(speeds[0]["ms"])
    rows = [["phase", "tokens", *(f"{name} ms" for name in names), *(f"{n} speed-up" for n in names if n != "dense")]]
    for record in speeds:
        ms = record["ms"]
        ratios = [f"{ms['dense'] / ms[name]:.2f}×" for name in names if name != "dense"]
        rows.append([record["phase"], f"{record['length']:,}", *(f"{ms[name]:.2f}" for name in names), *ratios])
    return rows


def write(folder: Path, records: Sequence[Record], speeds: Sequence[Record], notes: Sequence[str]) -> str:
    """results.json, results.jsonl (a line per run and per timing) and results.md, whose text is returned."""
    lines = [{"what": "run", **r} for r in records] + [{"what": "speed", **r} for r in speeds]
    write_lines(folder / "results.jsonl", lines)
    said = verdicts(records, speeds)
    everything = {"runs": records, "speed": speeds, "verdicts": said, "notes": notes}
    write_atomically(folder / "results.json", json.dumps(everything, indent=1) + "\n")
    text = markdown(table_rows(records)) + "\n" + "".join(f"- {line}\n" for line in [*said, *notes])
    if speeds:
        text += "\n" + markdown(speed_rows(speeds))
    write_atomically(folder / "results.md", text)
    return text


# ---------------------------------------------------------------- pictures


def plot_curves(curves: Mapping[tuple[str, str], Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Training loss over the updates of the main stage: a panel per preset, a line per seed, a colour per attention."""
    from matplotlib.figure import Figure

    presets = list(dict.fromkeys(preset for preset, _ in curves))
    figure = Figure(figsize=(5.5 * len(presets), 4.2), layout="constrained")
    for column, preset in enumerate(presets, start=1):
        axes = figure.add_subplot(1, len(presets), column, xlabel="update", ylabel="cross-entropy", title=preset)
        for (owner, attention), runs in curves.items():
            for number, steps in enumerate(runs if owner == preset else ()):
                losses = _smooth([m["cross_entropy"] for m in steps])
                label = attention if number == 0 else None
                axes.plot([m["step"] for m in steps], losses, color=COLOURS[attention], linewidth=1, label=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last twentieth of the curve."""
    width = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def plot_speed(speeds: Sequence[Record], path: Path) -> None:
    """Milliseconds over the length: a panel per phase, a line per attention."""
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(r["phase"] for r in speeds))
    figure = Figure(figsize=(5.5 * len(phases), 4.2), layout="constrained")
    for column, phase in enumerate(phases, start=1):
        axes = figure.add_subplot(1, len(phases), column, xlabel="tokens", ylabel="ms", title=phase)
        timed = [r for r in speeds if r["phase"] == phase]
        for name in timed[0]["ms"]:
            axes.plot(
                [r["length"] for r in timed], [r["ms"][name] for r in timed], "o-", color=COLOURS[name], label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


def plot_selection(selected: Selection, path_of: Callable[[str], Path]) -> None:
    """Attention pattern, what each indexer head selects, and the statistics by layer, where k leaves something out."""
    from train import plots

    meter = selected.meter
    attention = meter.results()
    if not attention:
        return
    length = selected.length
    plots.plot_maps(meter.maps, meter.ks[0], length, length, path_of("attention"), meter.mass_maps)
    plots.plot_heads(meter.heads(), length, path_of("heads"))
    plots.plot_recall([{"length": length, "attention": attention}], path_of("selection"))
