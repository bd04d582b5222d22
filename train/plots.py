"""What training and evaluation measured, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_metrics(steps: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws distillation, cross-entropy, KL and the shares of attention mass over the step: one panel each."""
    from matplotlib.figure import Figure

    names = [name for name in ("distillation", "cross_entropy", "kl") if any(name in m for m in steps)]
    recalls = [name for name in ("recall", "recall_best", "recall_window") if any(name in m for m in steps)]
    panels = [[name] for name in names] + ([recalls] if recalls else [])
    figure = Figure(figsize=(5 * max(1, len(panels)), 4), layout="constrained")
    figure.suptitle(title)
    for column, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), column, xlabel="step", title=panel[0])
        for name in panel:
            axes.plot([m["step"] for m in steps], [m[name] for m in steps], label=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, format="png")


RUNG_STYLES = {
    "best": ("tab:green", "most attention mass"),
    "output": ("tab:olive", "most of the output"),
    "trained": ("tab:blue", "trained indexer"),
    "auto": ("tab:purple", "trained indexer, k by layer"),
    "random": ("tab:orange", "random indexer"),
    "window": ("tab:red", "sliding window"),
}


def plot_losses(texts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against k: one panel per length, one line per rung of the ladder, dense as the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(texts), 4.2), layout="constrained")
    for column, text in enumerate(texts, start=1):
        axes = figure.add_subplot(1, len(texts), column, xlabel="k", title=f"{text['length']:,} tokens")
        axes.axhline(text["dense"]["loss"], color="black", linewidth=1, label="dense")
        for rung, (colour, label) in RUNG_STYLES.items():
            points = [r for r in text["ladder"] if r["rung"] == rung]
            ks = [r["mean_k"] for r in points]
            if not points:
                continue
            axes.plot(ks, [r["loss"] for r in points], "*" if rung == "auto" else "o-", color=colour, label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({r["mean_k"] for r in text["ladder"]})
        axes.set_xticks(ticks, [f"{k:g}" for k in ticks])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.set_ylabel("loss (log scale)")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def plot_recall(texts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Shares of attention mass by layer: a row per length, a panel per k, with the selection statistics below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = max(len(text["attention"]) for text in texts)
    figure = Figure(figsize=(5 * columns, 3.6 * 2 * len(texts)), layout="constrained")
    for row, text in enumerate(texts):
        for column, record in enumerate(text["attention"], start=1):
            by_layer = record["by_layer"]
            title = f"{text['length']:,} tokens, k = {record['k']}"
            axes = figure.add_subplot(2 * len(texts), columns, 2 * row * columns + column, title=title)
            for name, style in (("best", "g--"), ("recall", "b-"), ("window", "r--"), ("normalised", "k:")):
                axes.plot(by_layer[name], style, label={"recall": "indexer"}.get(name, name))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(ylim=(min(0.0, *by_layer["recall"]) - 0.02, 1.02), ylabel="share of attention mass")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
            place = (2 * row + 1) * columns + column
            below = figure.add_subplot(2 * len(texts), columns, place, xlabel="layer", ylabel="share")
            below.plot(by_layer["coverage"], label="tokens that some query selects")
            below.plot(by_layer["share_within_window"], label="selected within the last k")
            below.plot(
                [d / text["length"] for d in by_layer["mean_distance"]], label="mean distance / length of the text"
            )
            below.xaxis.set_major_locator(MaxNLocator(integer=True))
            below.set_ylim(-0.02, 1.02)
            below.grid(alpha=0.3)
            below.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def plot_heads(heads: Mapping[str, Any], length: int, path: Path) -> None:
    """Where each indexer head's own k best keys lie: a bar per head, stacked by distance, a panel per layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shares, bounds = heads["shares"], heads["bounds"]
    layers = len(shares)
    columns = min(6, layers)
    rows = -(-layers // columns)
    names = [f"{a}–{b - 1}" if b - 1 > a else f"{a}" for a, b in zip([0, *bounds], bounds, strict=False)]
    names.append(f"≥ {bounds[-1]}")
    colours = colormaps["viridis"]
    figure = Figure(figsize=(2.6 * columns + 2, 2.2 * rows + 1), layout="constrained")
    figure.suptitle(f"distance of each indexer head's own {heads['k']} best keys, {length:,} tokens")
    bars: list[Any] = []
    for layer, by_head in enumerate(shares):
        axes = figure.add_subplot(rows, columns, layer + 1, title=f"layer {layer}", ylim=(0, 1))
        base = [0.0] * len(by_head)
        bars = []
        for bucket in range(len(names)):
            heights = [head[bucket] for head in by_head]
            colour = colours(bucket / (len(names) - 1))
            bars.append(axes.bar(range(len(by_head)), heights, bottom=base, color=colour, width=0.9))
            base = [b + h for b, h in zip(base, heights, strict=True)]
        axes.set_xticks(range(len(by_head)))
        axes.tick_params(labelsize="x-small")
    figure.legend(bars, names, loc="outside right upper", title="distance")
    figure.savefig(path, dpi=120, format="png")


def plot_maps(
    maps: Mapping[int, Any], k: int, length: int, queries: int, path: Path, attention: Mapping[int, Any] | None = None
) -> None:
    """Selection maps {layer: [queries, keys]}: how dark a cell is says how many of its keys are selected.

    queries: they are the last so many tokens. attention: maps of the dense attention, mean over the heads, drawn above
    them (each row relative to its largest).
    """
    from matplotlib.figure import Figure

    rows = 2 if attention else 1
    figure = Figure(figsize=(4.6 * len(maps), 5.3 * rows), layout="constrained")
    above = "dense attention (above) and " if attention else ""
    figure.suptitle(f"{above}keys that the indexer selects, k = {k}, one text of {length:,} tokens")
    extent = (0, length, length, length - queries)
    place: dict[str, Any] = {"extent": extent, "aspect": length / queries, "interpolation": "nearest"}
    place |= {"vmin": 0, "vmax": 1}
    for column, (layer, image) in enumerate(sorted(maps.items()), start=1):
        if attention:
            mass = attention[layer]
            axes = figure.add_subplot(rows, len(maps), column, title=f"layer {layer}: attention", ylabel="query")
            axes.imshow((mass / mass.amax(1, keepdim=True)).sqrt(), cmap="Blues", **place)
        axes = figure.add_subplot(
            rows, len(maps), (rows - 1) * len(maps) + column, title=f"layer {layer}", xlabel="key", ylabel="query"
        )
        axes.imshow(image, cmap="Blues", **place)
    figure.savefig(path, dpi=120, format="png")


def plot_tasks(tasks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Scores of dense (hollow) and sparse (filled) by length: a panel per task."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(record["task"] for record in tasks))
    ks = list(dict.fromkeys(record["k"] for record in tasks))
    figure = Figure(figsize=(3.4 * len(names), 3.4), layout="constrained")
    for column, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), column, title=name, xlabel="tokens", ylim=(-0.05, 1.05))
        for number, k in enumerate(ks):
            records = [record for record in tasks if (record["task"], record["k"]) == (name, k)]
            lengths = [record["length"] for record in records]
            if number == 0:
                axes.plot(lengths, [r["dense"] for r in records], "o--", color="black", mfc="none", label="dense")
            axes.plot(lengths, [r["sparse"] for r in records], "o-", label=f"sparse, k = {k}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
