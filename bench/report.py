"""What the comparison shows: a table, a picture, JSON lines, one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from dsa_export.cli import console
from dsa_export.topk import describe_topk

Record = dict[str, Any]

COLUMNS = ("phase", "batch", "context", "dense ms", "sparse ms", "speed-up", "by bytes", "of floor", "MiB", "agreement")
TABLE_WIDTH = 132
CAPTION = (
    "ms of one call: median (p10–p90) of alternating runs. By bytes: the speed-up if only the bytes counted that a "
    "call must read; of floor: the share of that speed reached. MiB: peak memory. Pairs are dense, sparse. Agreement: "
    "the same next token preferred."
)


def write_jsonl(records: list[Record], path: Path) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pairs(records: list[Record]) -> list[tuple[Record, Record]]:
    """(dense, sparse) of each case, in the order of measurement."""
    dense = [record for record in records if record["variant"] == "dense"]
    sparse = [record for record in records if record["variant"] == "sparse"]
    return list(zip(dense, sparse, strict=True))


def print_table(records: list[Record]) -> None:
    """Prints the table; into a pipe or file at its full width."""
    wide = None if console.is_terminal else TABLE_WIDTH
    Console(file=console.file, width=wide, highlight=False).print(table(records))


def table(records: list[Record]) -> Table:
    first = records[0]
    title = f"{first['backend']}, {first['dtype']}, k = {describe_topk(first['k'])}, caches: {first['caches']}"
    shown = Table(title=title, caption=CAPTION, caption_justify="left")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for dense, sparse in pairs(records):
        phase = "decode" if sparse["phase"] == "decode" else f"prefill {sparse['queries']}"
        shown.add_row(
            phase,
            str(sparse["batch"]),
            f"{sparse['context']:,}",
            _ms_with_spread(dense),
            _ms_with_spread(sparse),
            f"{sparse['speedup']:.2f}×",
            f"{sparse['speedup_by_bytes']:.2f}×",
            f"{dense['floor_fraction']:.0%}, {sparse['floor_fraction']:.0%}",
            ", ".join("–" if side["peak_mib"] is None else f"{side['peak_mib']:.0f}" for side in (dense, sparse)),
            "–" if sparse["agreement"] is None else f"{sparse['agreement']['top1']:.0%}",
        )
    return shown


def sentence(records: list[Record]) -> str:
    """One sentence about the longest context of the first batch, decoding if it was measured; only from the numbers."""
    measured = pairs(records)
    phase = "decode" if any(sparse["phase"] == "decode" for _, sparse in measured) else "prefill"
    batch = measured[0][1]["batch"]
    dense, sparse = [pair for pair in measured if pair[1]["phase"] == phase and pair[1]["batch"] == batch][-1]
    call = "one decoding step" if phase == "decode" else f"a prefill call of {sparse['queries']} tokens"
    ratio = sparse["speedup"]
    verdict = f"{ratio:.2f}× as fast" if ratio >= 1 else f"slower, at {ratio:.2f}× the speed"
    agreement = ""
    if sparse["agreement"] is not None:
        share, tokens = sparse["agreement"]["top1"], sparse["agreement"]["tokens"]
        agreement = f", and both prefer the same next token in {share:.0%} of {tokens} cases"
    warning = "; the indexer is random, so only the timing means anything" if sparse["random_indexer"] else ""
    return (
        f"At {sparse['context']:,} tokens of context (batch {batch}) {call} takes {_ms(dense)} ms dense "
        f"and {_ms(sparse)} ms sparse (k = {describe_topk(sparse['k'])}): {verdict} where the bytes read predict "
        f"{sparse['speedup_by_bytes']:.2f}×{agreement}{warning}."
    )


def picture(records: list[Record], path: Path) -> None:
    """Latency and speed-up against context: one row of panels per phase, one line style per batch."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = pairs(records)
    phases = list(dict.fromkeys(sparse["phase"] for _, sparse in measured))
    batches = sorted({sparse["batch"] for _, sparse in measured})
    contexts = sorted({sparse["context"] for _, sparse in measured})
    figure, axes = plt.subplots(len(phases), 2, figsize=(11, 4.2 * len(phases)), squeeze=False, layout="constrained")
    for (latency, speedup), phase in zip(axes, phases, strict=True):
        for number, batch in enumerate(batches):
            chosen = [pair for pair in measured if pair[1]["phase"] == phase and pair[1]["batch"] == batch]
            style = ("-", "--", ":", "-.")[number % 4]
            suffix = f", batch {batch}" if len(batches) > 1 else ""
            _draw_pairs(latency, speedup, chosen, style, suffix)
        speedup.axhline(1, color="black", linewidth=0.8)
        call = "decoding step" if phase == "decode" else "prefill call"
        latency.set(title=f"time of one {call}", ylabel="ms (median, p10–p90)", yscale="log")
        speedup.set(title=f"{phase}: dense time / sparse time", ylabel="speed-up")
        for panel in (latency, speedup):
            panel.set_xscale("log", base=2)
            panel.set_xticks(contexts, [f"{n:,}" for n in contexts], rotation=30)
            panel.set_xlabel("context (tokens)")
            panel.grid(alpha=0.3)
            panel.legend()
    first = records[0]
    figure.suptitle(
        f"{first['machine']['cpu']} · {first['backend']} · {first['dtype']} · k = {describe_topk(first['k'])}"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_pairs(latency: Any, speedup: Any, chosen: list[tuple[Record, Record]], style: str, suffix: str) -> None:
    contexts = [sparse["context"] for _, sparse in chosen]
    for side, (variant, colour) in enumerate((("dense", "tab:gray"), ("sparse", "tab:blue"))):
        records = [pair[side] for pair in chosen]
        medians = [record["ms_median"] for record in records]
        latency.plot(contexts, medians, style, marker="o", color=colour, label=variant + suffix)
        low, high = ([record[key] for record in records] for key in ("ms_p10", "ms_p90"))
        latency.fill_between(contexts, low, high, color=colour, alpha=0.2)
    for key, label, colour in (
        ("speedup", "measured", "tab:blue"),
        ("speedup_by_bytes", "predicted by bytes", "tab:orange"),
    ):
        values = [sparse[key] for _, sparse in chosen]
        speedup.plot(contexts, values, style, marker="o", color=colour, label=label + suffix)


def _ms(record: Record, key: str = "ms_median") -> str:
    value = record[key]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms_with_spread(record: Record) -> str:
    return f"{_ms(record)} ({_ms(record, 'ms_p10')}–{_ms(record, 'ms_p90')})"
