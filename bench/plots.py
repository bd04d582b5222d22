"""The pictures of a comparison, one PNG file each: latency, speed-up, memory, and where the time goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import LogLocator

from bench import summary
from bench.summary import Pair, Record, Series

DENSE, PEER = "#6b7280", "#a16207"
COLOURS = ("#2563eb", "#dc2626", "#059669", "#7c3aed", "#db2777", "#0891b2")
DPI = 130
TICKS = {
    2.3: (1, 2, 5),
    0.5: (1, 1.2, 1.5, 2, 3, 4, 6, 8),
    0: (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
}
"""The numbers of a logarithmic axis that spans at least so many decades."""


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes the pictures for which there are records; returns their paths in the order of the report."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    measured = summary.pairs(records)
    figures = {
        "latency.png": lambda: latency(measured, summary.of_kind(records, "peer")),
        "speedup.png": lambda: speedup(measured),
        "memory.png": lambda: memory(measured),
        "operators.png": lambda: operators(summary.of_kind(records, "profile")),
    }
    paths = []
    for name, make in figures.items():
        figure = make()
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI, bbox_inches="tight")  # legends of long names are wider
            plt.close(figure)
            paths.append(folder / name)
    return paths


def latency(measured: Sequence[Pair], peers: Sequence[Record]) -> Any:
    figure, panels = _panels(measured)
    for phase, panel in panels.items():
        _draw_sides(panel, measured, phase, "ms_median", band=("ms_p10", "ms_p90"))
        if phase == "decode":
            _draw_peers(panel, peers)
        call = "decoding step" if phase == "decode" else "prefill call"
        panel.set(title=f"Time of one {call}", ylabel="ms (median, p10–p90)")
        _log_axis(panel, "{x:,g}")
        _context_axis(panel, measured, phase)
    return figure


def _draw_peers(panel: Any, peers: Sequence[Record]) -> None:
    by_name: dict[str, list[Record]] = {}
    for peer in peers:
        by_name.setdefault(f"{peer['peer']}, {peer['precision']}", []).append(peer)
    for (name, line), marker in zip(by_name.items(), itertools.cycle("sd^vP*")):
        points = [record["context"] for record in line], [record["ms_median"] for record in line]
        panel.plot(*points, ":", marker=marker, ms=5, color=PEER, label=name)


def speedup(measured: Sequence[Pair]) -> Any:
    figure, panels = _panels(measured)
    for phase, panel in panels.items():
        lines = summary.by_series(measured, phase)
        for (series, line), colour in zip(lines.items(), _colours(lines), strict=True):
            name = summary.series_text(series, lines)
            contexts = [pair.context for pair in line]
            for key, label, style in (
                ("speedup", "measured", "-"),
                ("speedup_predicted", "predicted by the floors", ":"),
            ):
                text = ", ".join(part for part in (label, name) if part)
                values = [pair.sparse[key] for pair in line]
                fill = colour if key == "speedup" else "white"
                panel.plot(contexts, values, style, marker="o", ms=4, color=colour, mfc=fill, label=text)
            crossing = summary.crossover([(pair.context, pair.sparse["speedup"]) for pair in line])
            if crossing.tokens:
                panel.plot([crossing.tokens], [1], "x", ms=9, mew=2, color=colour)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(
            title=f"Speed-up of {'decoding' if phase == 'decode' else 'prefill'}",
            ylabel="dense time / sparse time",
        )
        _log_axis(panel, "{x:g}×")
        _context_axis(panel, measured, phase)
    return figure


def memory(measured: Sequence[Pair]) -> Any:
    known = [pair for pair in measured if pair.sparse.get("peak_mib") and pair.dense.get("peak_mib")]
    if not known:
        return None
    figure, panels = _panels(known)
    for phase, panel in panels.items():
        _draw_sides(panel, known, phase, "peak_mib")
        panel.set(title=f"Peak memory, {phase}", ylabel="MiB")
        panel.set_ylim(0, 1.08 * panel.dataLim.y1)
        _context_axis(panel, known, phase)
    return figure


def operators(profiles: Sequence[Record]) -> Any:
    """One stacked bar per engine: where a decoding step spends its time."""
    if not profiles:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.3 + 0.5 * len(profiles)), layout="constrained")
    several = len({(record["precision"], summary.describe_k(record)) for record in profiles}) > 1
    labels = [
        f"{record['core']}\n{record['precision']}, k = {summary.describe_k(record)}" if several else record["core"]
        for record in profiles
    ]
    left = [0.0] * len(profiles)
    shades = ("#93c5fd", "#1d4ed8", "#f59e0b", "#86efac", "#d1d5db")
    for part, colour in zip(profiles[0]["ms"], shades, strict=True):
        values = [record["ms"].get(part, 0.0) for record in profiles]
        axes.barh(range(len(profiles)), values, left=left, color=colour, label=part, height=0.65)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(range(len(profiles)), labels)
    axes.invert_yaxis()
    contexts = sorted({record["context"] for record in profiles})
    axes.set(xlabel="ms", title=f"One decoding step at {', '.join(f'{n:,}' for n in contexts)} tokens of context")
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.28 - 0.1 / len(profiles)), frameon=False)
    return figure


def _panels(measured: Sequence[Pair]) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel per phase, side by side."""
    import matplotlib.pyplot as plt

    phases = [phase for phase in ("decode", "prefill") if any(pair.phase == phase for pair in measured)]
    figure, axes = plt.subplots(1, len(phases), figsize=(5.4 * max(len(phases), 1.35), 4.4), squeeze=False)
    figure.set_layout_engine("constrained")
    return figure, dict(zip(phases, axes[0], strict=True))


def _draw_sides(
    panel: Any, measured: Sequence[Pair], phase: str, key: str, *, band: tuple[str, str] | None = None
) -> None:
    """Draws `key` of the dense and the sparse side of every series over the context, and a band between two others."""
    lines = summary.by_series(measured, phase)
    for (series, line), colour in zip(lines.items(), _colours(lines), strict=True):
        for side, style in (("dense", "--"), ("sparse", "-")):
            label = side if len(lines) == 1 else f"{side}, {summary.series_text(series, lines)}"
            shade = DENSE if len(lines) == 1 and side == "dense" else colour
            records = [getattr(pair, side) for pair in line]
            contexts = [record["context"] for record in records]
            panel.plot(contexts, [r[key] for r in records], style, marker="o", ms=4, color=shade, label=label)
            if band:
                low, high = ([record[edge] for record in records] for edge in band)
                panel.fill_between(contexts, low, high, color=shade, alpha=0.15, linewidth=0)


def _colours(lines: dict[Series, list[Pair]]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(lines))]


def _log_axis(panel: Any, form: str) -> None:
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    decades = math.log10(high / low)
    panel.yaxis.set_major_locator(LogLocator(subs=next(ticks for least, ticks in TICKS.items() if decades >= least)))
    panel.yaxis.set_major_formatter(form)


def _context_axis(panel: Any, measured: Sequence[Pair], phase: str) -> None:
    contexts = sorted({pair.context for pair in measured if pair.phase == phase})
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in contexts])
    panel.minorticks_off()
    panel.set_xlabel("context (tokens)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
